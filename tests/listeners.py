"""Listeners of a scheduler that can hold it up, and tiny requests with their expected results."""

import threading
import time
from collections import deque

from loop import tiny_engine, tiny_request
from support import random_tokens

from mlx_dgemma.decoding.events import Finished
from mlx_dgemma.serving.scheduler import Failed

LIMIT = 300  # seconds; a test waits so long only if something hangs


class Listener:
    """Keeps what it is told, and holds the scheduler up after each kind of event in `stops`, in their order."""

    def __init__(self, *stops):
        self.events, self.stops = [], deque(stops)
        self.over, self._held, self._free = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.over.set()
        if self.stops and isinstance(event, self.stops[0]):
            self.stops.popleft()
            self._held.release()
            assert self._free.acquire(timeout=LIMIT)

    def wait(self):
        """Until the scheduler is held up."""
        assert self._held.acquire(timeout=LIMIT)

    def go_on(self):
        self._free.release()

    @property
    def kinds(self):
        return [type(event) for event in self.events]

    @property
    def last(self):
        """The last event, once there is one."""
        assert self.over.wait(LIMIT)
        return self.events[-1]


def tokens_of(n, length=9):
    return random_tokens(n, length).tolist()


def ask(scheduler, n=1, *stops, drafts=False, **options):
    """Submit a tiny request with its own prompt and seed."""
    listener = Listener(*stops)
    listener.ticket = scheduler.submit(lambda: tiny_request(tokens_of(n), seed=n, **options), listener, drafts)
    return listener


def alone(n=1, **options):
    """(tokens, steps) of that request by itself."""
    (*_, finished) = tiny_engine().run(tiny_request(tokens_of(n), seed=n, **options))
    return told(finished)


def told(finished):
    assert isinstance(finished, Finished), finished
    return finished.result.tokens, finished.result.stats.denoising_steps


def until(true):
    """Wait for what no event tells."""
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def load_of(scheduler):
    load = scheduler.load()
    return load.running, load.waiting
