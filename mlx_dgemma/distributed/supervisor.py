"""The process that watches a rank: it starts the rank as a child, and ends it when another rank is lost.

A rank that waits for a lost one hangs inside MLX, perhaps with Python's lock held, so it cannot watch by itself. The
watching processes tell each other every second that they live, and rank 0's alone says what went wrong. Silence is
counted in ticks of the own clock: a machine that sleeps, or a group that was stopped as a whole, has missed nothing.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Any

from ..errors import CircumstanceError
from .launched import CHILD, Place
from .lines import MOST, Lines
from .meeting import Fact, Peer, meet

TICK_SECONDS = 1.0
SILENT_TICKS = 7  # without a word, or in which a rank is stopped, after which it is lost
NEWS_SECONDS = 1.0  # within which a better reason may come: a rank that lost a peer tells of it before the peer's end
END_SECONDS = 2.0  # that a rank gets to end by itself, a server to tell its clients
REPEAT_SECONDS = 0.5  # one Ctrl-C reaches every rank of a terminal
NOISE = b"[ring] "  # lines that MLX writes when a peer is gone


class _Ended(Exception):
    """The group has ended."""

    def __init__(self, code: int, sentence: str = ""):
        super().__init__(sentence)
        self.code, self.sentence = code, sentence


def supervise(place: Place, facts: Sequence[Fact], trouble: str = "") -> int:
    """Run this command as a rank's child, watched; returns its exit code. Takes what `Supervisor` takes."""
    return Supervisor(place, [sys.executable, *sys.orig_argv[1:]], facts, trouble).run()


class Supervisor:
    """Watches one rank.

    Args:
        place: of the rank.
        command: of the child.
        facts: in which all ranks must be equal.
        trouble: why this rank cannot take part; that of rank 0 is left to its child.
    """

    def __init__(self, place: Place, command: list[str], facts: Sequence[Fact] = (), trouble: str = ""):
        self._place, self._command, self._facts, self._trouble = place, command, facts, trouble
        self._peers: list[Peer] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._link: Lines | None = None
        self._exit: int | None = None  # the child's exit code; negative: the signal that killed it
        self._stopped = False  # whether the child is stopped
        self._stopped_ticks = 0
        self._reason, self._sure, self._until = "", False, float("inf")  # why the group ends, and when at the latest
        self._signals: list[int] = []  # that have come and were not looked at
        self._told_to_end = False
        self._interrupted = float("-inf")  # when the child last was
        self._tail, self._muted = b"", place.rank > 0
        self._next_tick = 0.0

    def run(self) -> int:
        """Meet the others, start the child and watch; returns the exit code of the group."""
        wakeup, self._wakeup = socket.socketpair()
        with closing(wakeup), closing(self._wakeup):
            wakeup.setblocking(False)
            self._wakeup.setblocking(False)
            signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
            for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(one, lambda number, _: self._signals.append(number))
            try:
                self._peers = meet(self._place, self._command, self._give_up, self._facts, self._trouble)
                self._start()
                self._next_tick = time.monotonic() + TICK_SECONDS
                while True:
                    self._turn()
            except CircumstanceError as error:  # the others need not say that they have not met rank 0: it says so
                return self._end(_Ended(1, "" if self._place.rank else str(error)))
            except _Ended as ended:
                return self._end(ended)
            finally:
                signal.set_wakeup_fd(-1)

    def _give_up(self) -> None:
        """Before the child has started, signals end this process."""
        for number in self._signals:
            if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                raise _Ended(128 + number)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._link = Lines(ours)
        quiet = None if self._place.rank == 0 else subprocess.DEVNULL
        apart = self._place.rank > 0 or not (sys.stdin and sys.stdin.isatty())  # the others may not read a terminal
        with theirs:
            self._child = subprocess.Popen(
                self._command,
                stdin=quiet,
                stdout=quiet,
                stderr=subprocess.PIPE,
                env={**os.environ, CHILD: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                start_new_session=apart,  # Ctrl-C then comes from here, once
            )
        self._alone_in_group = apart
        for peer in self._peers:
            peer.lines.send(child=self._child.pid)

    def _turn(self, seconds: float = TICK_SECONDS) -> None:
        """Wait for something to happen, and see to it."""
        assert self._child is not None and self._child.stderr is not None and self._link is not None
        wait = min(self._next_tick, self._until) - time.monotonic()
        watched: list[Any] = [peer.lines for peer in self._peers if peer.lines.open]
        watched += [self._link] if self._link.open else []
        watched += [] if self._child.stderr.closed else [self._child.stderr]
        ready, _, _ = select.select([*watched, self._wakeup], [], [], max(min(wait, seconds), 0))
        for peer in self._peers:
            if peer.lines in ready:
                self._hear(peer)
        if self._link in ready:
            for message in self._link.receive():
                if "failed" in message:
                    self._suspect(str(message["failed"]))
        if self._child.stderr in ready:
            self._relay()
        if self._wakeup in ready:
            self._wakeup.recv(MOST)
        self._reap()
        while self._signals:
            self._obey(self._signals.pop(0))
        if time.monotonic() >= self._next_tick:
            self._tick()
        if time.monotonic() >= self._until:
            self._conclude()

    def _hear(self, peer: Peer) -> None:
        for message in peer.lines.receive():
            peer.silent = 0
            if "child" in message:
                peer.processes.append(int(message["child"]))
            elif "failed" in message:
                self._suspect(str(message["failed"]), sure=True)
            elif "interrupt" in message:
                self._interrupt()
            elif "end" in message:
                raise _Ended(int(message["end"]))
        if not peer.lines.open:
            if self._place.rank:
                self._lose_first(f"{peer} has ended")
            self._suspect(f"{peer} has ended before the others.", sure=True)

    def _lose_first(self, what: str) -> None:
        """Without rank 0 nothing goes on; the first of the others says so, since rank 0 cannot."""
        self._kill_there(self._peers)
        raise _Ended(1, f"{what}, so all ranks end." if self._place.rank == 1 else "")

    def _suspect(self, reason: str, sure: bool = False) -> None:
        """There is a reason to end the group. A better one, or the child's own end, may come within a moment."""
        if self._place.rank:
            self._peers[0].lines.send(failed=reason)
            self._until = min(self._until, time.monotonic() + 5 * NEWS_SECONDS)
        elif not self._reason or (sure and not self._sure):
            self._reason, self._sure = reason, sure
            self._until = min(self._until, time.monotonic() + NEWS_SECONDS)

    def _conclude(self) -> None:
        raise _Ended(1, self._reason)

    def _reap(self) -> None:
        """See whether the child was stopped, or has ended."""
        assert self._child is not None
        if self._exit is not None:
            return
        pid, status = os.waitpid(self._child.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if pid == 0:
            return
        if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
            self._stopped, self._stopped_ticks = os.WIFSTOPPED(status), 0
            return
        self._exit = self._child.returncode = os.waitstatus_to_exitcode(status)
        self._relay()
        rank, who = self._place.rank, f"Rank {self._place.rank} (process {self._child.pid} on {socket.gethostname()})"
        if rank == 0 and self._exit == -signal.SIGINT:
            raise _Ended(128 + signal.SIGINT)
        if self._exit < 0 and not (self._told_to_end and rank == 0):
            self._suspect(f"{who} was killed by {signal.Signals(-self._exit).name}.", sure=True)
        elif rank == 0:
            raise _Ended(self._exit if self._exit >= 0 else 128 - self._exit)
        elif self._exit:
            said = self._tail.decode(errors="replace").strip().rpartition("\n")[2]
            self._suspect(f"{who} has ended with exit code {self._exit}{f' ({said})' if said else ''}.")
        else:  # it has heard the end before this process
            self._until = min(self._until, time.monotonic() + 5 * NEWS_SECONDS)

    def _obey(self, number: int) -> None:
        if number == signal.SIGINT:
            if self._place.rank:
                self._peers[0].lines.send(interrupt=True)
            elif self._alone_in_group:
                self._interrupt()
        elif number in (signal.SIGTERM, signal.SIGHUP):
            self._told_to_end = True
            if self._place.rank:
                self._suspect(f"Rank {self._place.rank} was told to end by {signal.Signals(number).name}.", sure=True)
            elif self._child is not None and self._exit is None:
                self._child.send_signal(number)

    def _interrupt(self) -> None:
        """Ctrl-C of any rank is rank 0's: what it does there ends the others."""
        if self._child is not None and time.monotonic() - self._interrupted > REPEAT_SECONDS:
            self._interrupted = time.monotonic()
            self._child.send_signal(signal.SIGINT)

    def _tick(self) -> None:
        self._next_tick = time.monotonic() + TICK_SECONDS
        for peer in self._peers:
            peer.lines.send(alive=True)
            peer.silent += 1
            if peer.silent > SILENT_TICKS:
                silence = f"{peer} has said nothing for {SILENT_TICKS} s"
                if self._place.rank:
                    self._lose_first(silence)
                self._suspect(f"{silence}, so it is taken for lost.", sure=True)
        self._stopped_ticks += self._stopped
        if self._stopped_ticks > SILENT_TICKS:
            assert self._child is not None
            who = f"Rank {self._place.rank} (process {self._child.pid} on {socket.gethostname()})"
            self._suspect(f"{who} has been stopped for {SILENT_TICKS} s, so it is taken for lost.", sure=True)

    def _relay(self) -> None:
        """Pass on what the child writes to stderr, without MLX's lines on a lost peer."""
        assert self._child is not None and self._child.stderr is not None
        while not self._child.stderr.closed and select.select([self._child.stderr], [], [], 0)[0]:
            data = os.read(self._child.stderr.fileno(), MOST)
            if not data:
                self._child.stderr.close()
            if self._muted:
                self._tail = (self._tail + data)[-MOST:]
                continue
            *lines, self._tail = (self._tail + data).split(b"\n")
            shown = b"".join(line + b"\n" for line in lines if not line.startswith(NOISE))
            if self._tail and not self._tail.startswith(NOISE[: len(self._tail)]):
                shown, self._tail = shown + self._tail, b""
            with suppress(OSError):
                os.write(2, shown)

    def _end(self, ended: _Ended) -> int:
        """End the child and the others, and say why."""
        if ended.sentence:
            self._muted = True
            print(f"Error: {ended.sentence}", file=sys.stderr, flush=True)
        if self._child is not None and self._exit is None:
            assert self._link is not None
            self._link.send(lost=ended.sentence)
            self._wait(0 if self._stopped else END_SECONDS)
            if self._exit is None:
                self._child.kill()
                self._exit = self._child.wait()
        if self._place.rank == 0:
            self._kill_there([peer for peer in self._peers if not peer.lines.open])  # whose rank may be left
            for peer in self._peers:
                peer.lines.send(end=ended.code)
            deadline = time.monotonic() + END_SECONDS + NEWS_SECONDS
            while (left := [peer for peer in self._peers if peer.lines.open]) and time.monotonic() < deadline:
                for one in select.select([peer.lines for peer in left], [], [], TICK_SECONDS)[0]:
                    one.receive()
            self._kill_there(left)
        for peer in self._peers:
            peer.lines.close()
        return ended.code

    def _wait(self, seconds: float) -> None:
        """Wait for the child's end."""
        assert self._child is not None and self._child.stderr is not None
        deadline = time.monotonic() + seconds
        while self._exit is None and time.monotonic() < deadline:
            streams: list[Any] = [] if self._child.stderr.closed else [self._child.stderr]
            select.select([*streams, self._wakeup], [], [], 0.1)
            self._relay()
            with suppress(BlockingIOError):
                self._wakeup.recv(MOST)
            pid, status = os.waitpid(self._child.pid, os.WNOHANG)
            if pid:
                self._exit = self._child.returncode = os.waitstatus_to_exitcode(status)

    @staticmethod
    def _kill_there(peers: list[Peer]) -> None:
        """Kill what is left of other ranks on this machine: a process that is stopped ends no other way."""
        for peer in peers:
            if peer.here:
                for pid in reversed(peer.processes):
                    with suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
