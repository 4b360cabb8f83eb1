"""Cache of encoded prefixes, so that a prompt that begins like an earlier one is encoded only in part.

A sliding layer forgets keys outside its window. A prefix can therefore be rewound only to a saved snapshot of these
layers. One is saved at the end of each prompt, and one where a prompt diverges from an earlier one.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..decoding.session import Session
from ..errors import DgemmaError
from .prefix_store import PrefixStore

if TYPE_CHECKING:
    from ..decoding.request import Request
    from ..engine import Engine


MIN_REUSE_TOKENS = 64  # encoding a shorter prefix is as fast as copying it


class PrefixCache:
    """Sessions of earlier requests within a memory budget. The least recently used are evicted first.

    Args:
        engine: the engine that encodes the prompts.
        budget: bytes of unified memory.
        folder: keeps the cache across restarts, with the same budget on disk, see `PrefixStore`; None keeps it in
            memory only.

    Raises:
        OptionError: the folder cannot be created or read.
    """

    def __init__(self, engine: Engine, budget: int, folder: Path | None = None):
        self._budget = budget
        self._store = None if folder is None else PrefixStore(folder, engine, budget)
        # By the names of their files, the least recently used first.
        self._sessions: dict[str, Session] = {} if self._store is None else self._store.load()
        self._unsaved: dict[str, set[str]] = {}  # and the files that each of them makes needless
        self._failed = self._warned = False

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def nbytes(self) -> int:
        """Size of the cached sessions in bytes."""
        return sum(session.nbytes for session in self._sessions.values())

    def find(self, wanted: list[int | str]) -> tuple[Session | None, int]:
        """Find the longest reusable prefix of a prompt, and the position at which to save a snapshot.

        Args:
            wanted: the prompt, as a `Session.cache_key`.

        Returns:
            A copy of the session, or None if no prefix is long enough; and the position in tokens, or 0 for none.
        """
        best, reusable, longest = "", 0, 0
        for name, session in self._sessions.items():
            shared = session.shared(wanted)
            rewindable = session.prefix.rewindable_length(shared)
            longest = max(longest, shared)
            if rewindable >= max(reusable, MIN_REUSE_TOKENS):
                best, reusable = name, rewindable
        while 0 < longest < len(wanted) and isinstance(wanted[longest], str) and isinstance(wanted[longest - 1], str):
            longest -= 1  # a snapshot must not split a picture
        snapshot_at = longest if longest >= max(reusable, 1) + MIN_REUSE_TOKENS else 0
        if not best:
            return None, snapshot_at
        self._sessions[best] = self._sessions.pop(best)
        if self._store is not None:
            self._store.touch(best)
        return self._sessions[best].fork(), snapshot_at

    def keep(self, request: Request) -> None:
        """Take in what a request has encoded, and the snapshot that it was asked for."""
        for session in (request.session.take_snapshot(), request.session):
            if session is not None:
                self.put(session)

    def put(self, session: Session) -> None:
        """Add a session that is no longer in use, and drop the sessions that it supersedes."""
        if len(session.cache_key) < MIN_REUSE_TOKENS or self._budget == 0:
            return
        if session.prefix.rewind(len(session.cache_key)) < len(session.cache_key):
            return  # its encoding was interrupted
        session.prefix.trim()
        if session.nbytes > self._budget:
            return  # too large: it would evict all others and not fit
        name = hashlib.sha256(json.dumps(session.cache_key).encode()).hexdigest()[:32]
        superseded: set[str] = set()
        for other, old in list(self._sessions.items()):
            if (
                session.shared(old.cache_key)
                == len(old.cache_key)
                == session.prefix.rewindable_length(len(old.cache_key))
            ):
                superseded |= self._drop(other)
        self._sessions[name] = session
        superseded.discard(name)
        self._failed = False
        if self._store is not None and self._store.holds(name):
            self._store.remove(superseded)
        elif self._store is not None:
            self._unsaved[name] = superseded  # their files stay until this one is written
        while self.nbytes > self._budget:
            self._drop(next(iter(self._sessions)))

    def save_one(self) -> bool:
        """Write one unsaved session to the folder. Returns whether more are left that can be written now."""
        if self._store is None or self._failed or not self._unsaved:
            return False
        name, superseded = self._unsaved.popitem()
        try:
            self._store.write(name, self._sessions[name], superseded)
        except (DgemmaError, RuntimeError) as error:  # MLX raises RuntimeError
            self._unsaved[name] = superseded
            self._failed = True  # until the next `put`, since whoever waits for work calls this again at once
            if not self._warned:
                self._warned = True
                warnings.warn(f"The prefix cache stays in memory for now: {error}", stacklevel=2)
            return False
        self._warned = False
        return bool(self._unsaved)

    def _drop(self, name: str) -> set[str]:
        """Forget a session. Returns the names of the files that are of no use without it."""
        del self._sessions[name]
        return {name} | self._unsaved.pop(name, set())
