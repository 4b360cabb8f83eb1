"""Automata of constraints, made by processes that can be ended: a short pattern may take hours and gigabytes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from io import BytesIO
from multiprocessing.connection import Connection, Pipe
from typing import Any

from ..constraints.language import Language
from ..constraints.tokens import TokenBytes
from ..errors import OptionError
from .automaton_worker import COMMAND, Unpickler

PROCESSES = 2
SECONDS = 10  # of processor time that one automaton may take
PATIENCE = 6  # times as many seconds may pass on the clock, for a machine that has much to do
POLL_SECONDS = 0.1
MAX_SECONDS = 2  # a process that worked longer on one language is replaced
IDLE_SECONDS = 30.0  # after which processes without work end


class Cancelled(Exception):
    """Nobody waits for the automaton any more."""


class _Died(Exception):
    """The process has ended without an answer."""


class Automata:
    """Makes languages in processes, which start when they are first needed.

    Args:
        processes: how many at a time; others wait.
        seconds: of processor time for each language.
        idle_seconds: after which processes without work end.
    """

    def __init__(self, processes: int = PROCESSES, seconds: int = SECONDS, idle_seconds: float = IDLE_SECONDS):
        self._seconds, self._idle_seconds = seconds, idle_seconds
        self._free, self._lock = threading.Semaphore(processes), threading.Lock()
        self._idle: list[_Process] = []  # the lock guards this and the next three
        self._busy: list[_Process] = []
        self._closed = False
        self._timer: threading.Timer | None = None  # since a process last became idle

    def make(
        self, kind: str, source: Any, token_bytes: TokenBytes, what: str, stop: Callable[[], bool] = lambda: False
    ) -> Language:
        """The language of a constraint; takes what `prompt.lanes.make_language` takes, and raises the same.

        Args:
            stop: asked now and then; once it returns true nobody wants the language any more.

        Raises:
            OptionError: also when it takes too much time or memory.
            Cancelled: `stop` returned true, or `close` was called.
        """
        while not self._free.acquire(timeout=POLL_SECONDS):
            if stop() or self._closed:
                raise Cancelled
        try:
            process = self._take()
            try:
                language = process.make((kind, source, what), token_bytes, self._seconds, stop)
            except _Died:
                if self._closed:
                    raise Cancelled from None
                raise OptionError(
                    f"{what} takes more than {self._seconds} s or too much memory to prepare: ask for smaller bounds "
                    "(maxLength, maxItems, {m,n}), or for less that may be read in several ways."
                ) from None
            finally:
                self._give_back(process)
        finally:
            self._free.release()
        return language

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._closed = True
            for process in self._busy:
                process.interrupt()  # who waits for it gives it back
        self._end_idle()

    def _take(self) -> _Process:
        with self._lock:
            if self._closed:
                raise Cancelled
            process = self._idle.pop() if self._idle else None
        if process is None or process.ended:
            process = _Process()
        with self._lock:
            self._busy.append(process)
        return process

    def _give_back(self, process: _Process) -> None:
        with self._lock:
            self._busy.remove(process)
            if process.usable and not self._closed:
                self._idle.append(process)
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = threading.Timer(self._idle_seconds, self._end_idle)
                self._timer.daemon = True
                self._timer.start()
                return
        process.kill()

    def _end_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
            if self._timer is not None:
                self._timer.cancel()
        for process in idle:
            process.kill()


class _Process:
    """A process that makes languages of one tokenizer, one after the other."""

    def __init__(self) -> None:
        self._connection, other = Pipe()
        with other:
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # each thread would take memory
            self._popen = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(other.fileno()), *sys.path],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the server, which ends it
            )
        self._token_bytes: TokenBytes | None = None
        self.usable = True

    def make(
        self, job: tuple[str, Any, str], token_bytes: TokenBytes, seconds: int, stop: Callable[[], bool]
    ) -> Language:
        """Let the process make a language. After an exception other than OptionError it is not `usable`."""
        self.usable, started = False, time.monotonic()
        try:
            if token_bytes is not self._token_bytes:
                self._connection.send_bytes(pickle.dumps(token_bytes))
                self._token_bytes = token_bytes
            self._connection.send_bytes(pickle.dumps((*job, seconds)))
            made = receive(self._connection, token_bytes, time.monotonic() + PATIENCE * seconds, stop)
        except (EOFError, OSError):
            raise _Died from None
        self.usable = time.monotonic() - started < MAX_SECONDS  # what took long may have taken memory, too
        if isinstance(made, Exception):
            raise made
        return made

    @property
    def ended(self) -> bool:
        """Whether something else has ended it."""
        return self._popen.poll() is not None

    def interrupt(self) -> None:
        """End it while another thread waits for it."""
        self._popen.kill()

    def kill(self) -> None:
        """End it, whatever it does."""
        self._popen.kill()
        self._popen.wait()
        self._connection.close()


def receive(connection: Connection, token_bytes: TokenBytes, deadline: float, stop: Callable[[], bool]) -> Any:
    """A language, or the exception that making it raised.

    Args:
        connection: to the process.
        token_bytes: of the language.
        deadline: in terms of time.monotonic().
        stop: as `Automata.make` takes it.
    """
    while not connection.poll(POLL_SECONDS):
        if stop():
            raise Cancelled
        if time.monotonic() > deadline:
            raise _Died
    return Unpickler(BytesIO(connection.recv_bytes()), token_bytes).load()
