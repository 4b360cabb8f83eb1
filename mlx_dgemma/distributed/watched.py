"""A rank's own end of the link to the process that watches it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType
from typing import NoReturn

from ..errors import INTERRUPTS, DgemmaError, failure
from .launched import CHILD, Place, place_of
from .lines import Lines

_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux
TOLD_SECONDS = 3.0  # in which rank 0 ends by itself where it has the same error
PATIENCE = 30.0  # seconds in which the watching process ends a rank that has told of its failure


class Watched:
    """A rank that is watched.

    Args:
        place: the rank.
        link: to the process that watches it.

    Attributes:
        on_loss: called with a sentence on a thread of its own when the group has lost a rank and this process ends.
    """

    def __init__(self, place: Place, link: Lines):
        self.place, self._link = place, link
        self.on_loss: Callable[[str], None] = lambda sentence: None
        self._busy = self._interrupted = False
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
        signal.signal(signal.SIGINT, self._interrupt if place.rank == 0 else signal.SIG_IGN)
        threading.Thread(target=self._listen, name="watched", daemon=True).start()

    def fail(self, sentence: str) -> NoReturn:
        """Tell that this rank cannot go on. The watching process ends it, with a better reason if it has one."""
        self._link.send(failed=sentence)
        time.sleep(PATIENCE)
        os._exit(1)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Tell whatever is raised, which ends the group.

        What all ranks have agreed on, or came to alike, rank 0 has too; it gets a moment to say so by itself.
        """
        try:
            yield
        except INTERRUPTS:
            raise
        except BaseException as error:
            if isinstance(error, DgemmaError):
                time.sleep(TOLD_SECONDS)
            self.fail(failure(self.place.rank, error))

    def wait(self) -> NoReturn:
        """Wait for the end of the group, with rank 0: this rank has done its part, or has told of its error."""
        while True:
            time.sleep(PATIENCE)

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Let Ctrl-C wait: what ranks do together is done by all of them or by none.

        A second Ctrl-C ends the process, and with it the group.
        """
        if threading.current_thread() is not threading.main_thread() or self._busy:
            yield
            return
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            if self._interrupted:
                self._interrupted = False
                raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._busy:
            raise KeyboardInterrupt
        if self._interrupted:
            os._exit(128 + number)
        self._interrupted = True

    def _listen(self) -> None:
        while self._link.open:
            for message in self._link.receive():
                if "lost" in message:
                    with suppress(Exception):
                        if message["lost"]:
                            self.on_loss(str(message["lost"]))
                    os._exit(1)
        os._exit(1)


@cache
def watched() -> Watched | None:
    """What this process is as a rank; None: it is none, or it is not watched yet."""
    if CHILD not in os.environ:
        return None
    place = place_of()
    assert place is not None
    return Watched(place, Lines(socket.socket(fileno=int(os.environ.pop(CHILD)))))
