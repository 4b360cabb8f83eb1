"""Cache of encoded prefixes, so that a prompt that begins like an earlier one is encoded only in part.

A sliding layer forgets keys outside its window. A prefix can therefore be rewound only to a saved snapshot of these
layers. One is saved at the end of each prompt, and one where a prompt diverges from an earlier one.
"""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..adapters import peft
from ..decoding.session import Session
from ..errors import OptionError

if TYPE_CHECKING:
    from ..engine import Engine


MIN_REUSE_TOKENS = 64  # encoding a shorter prefix is as fast as copying it
FILE_STEM = "[0-9a-f]" * 32  # glob pattern of the cache's files; other files in the folder are left alone
SAMPLE_BYTES = 2**16  # read at the beginning and at the end of each shard for the fingerprint


class PrefixCache:
    """Sessions of earlier requests within a memory budget. The least recently used are evicted first.

    Args:
        engine: the engine that encodes the prompts.
        budget: bytes of unified memory.
        folder: keeps the cache across restarts, with the same budget on disk; None keeps it in memory only.

    Raises:
        OptionError: the folder cannot be created or read.
    """

    def __init__(self, engine: Engine, budget: int, folder: Path | None = None):
        self._engine, self._budget, self._folder = engine, budget, folder
        self._sessions: dict[str, Session] = {}  # by file stem, least recently used first
        self._unsaved: list[str] = []
        self._fingerprint = "" if folder is None else fingerprint(engine)
        if folder is not None:
            if folder.resolve() == engine.checkpoint.path.resolve():
                raise OptionError(f"The cache folder {folder} is the checkpoint's own; name another.")
            try:
                folder.mkdir(0o700, parents=True, exist_ok=True)  # private, since the files contain prompts
                self._load(folder)
            except OSError as error:
                raise OptionError(
                    f"The cache folder {folder} cannot be used ({error.strerror}); name another."
                ) from None

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
        return self._sessions[best].fork(), snapshot_at

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
        for other, old in list(self._sessions.items()):
            if (
                session.shared(old.cache_key)
                == len(old.cache_key)
                == session.prefix.rewindable_length(len(old.cache_key))
            ):
                self._drop(other, keep_file=other == name)
        self._sessions[name] = session
        if self._folder is not None and name not in self._unsaved and not self._file(name).exists():
            self._unsaved.append(name)
        while self.nbytes > self._budget:
            self._drop(next(iter(self._sessions)))

    def save_one(self) -> bool:
        """Write one unsaved session to the folder. Returns whether more are left."""
        if self._unsaved:
            name = self._unsaved.pop()
            try:
                self._write(self._file(name), self._sessions[name])
            except (OSError, RuntimeError) as error:  # MLX raises RuntimeError
                self._folder, self._unsaved = None, []
                warnings.warn(f"The prefix cache cannot be written ({error}); it stays in memory.", stacklevel=2)
        return bool(self._unsaved)

    def _drop(self, name: str, keep_file: bool = False) -> None:
        del self._sessions[name]
        if name in self._unsaved:
            self._unsaved.remove(name)
        if self._folder is not None and not keep_file:
            with suppress(OSError):
                self._file(name).unlink()

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"

    def _write(self, path: Path, session: Session) -> None:
        arrays, offset, mark = session.prefix.to_arrays()
        arrays.update({f"features.{name}": array for name, array in session.features.items()})
        metadata = {
            "key": self._fingerprint,
            "offset": str(offset),
            "mark": str(mark),
            "cache_key": json.dumps(session.cache_key),
        }
        part = path.with_suffix(".part.safetensors")  # MLX requires this file extension
        mx.save_safetensors(str(part), arrays, metadata)
        part.replace(path)

    def _load(self, folder: Path) -> None:
        """Load the files of an earlier process, the newest first, as far as the budget allows."""
        for part in folder.glob(f"{FILE_STEM}.part.safetensors"):
            part.unlink(missing_ok=True)
        with_times = [(path.stat().st_mtime, path) for path in folder.glob(f"{FILE_STEM}.safetensors")]
        loaded: list[tuple[str, Session]] = []
        bytes_left = self._budget
        for _, path in sorted(with_times, reverse=True):
            session = self._read(path)
            if session is None or session.nbytes > bytes_left:
                path.unlink(missing_ok=True)
                continue
            bytes_left -= session.nbytes
            loaded.append((path.stem, session))
        self._sessions = dict(reversed(loaded))

    def _read(self, path: Path) -> Session | None:
        """The session in a file, or None if the file is broken (with a warning) or belongs to another checkpoint."""
        try:
            check_size(path)
            loaded: Any = mx.load(str(path), return_metadata=True)
            arrays, metadata = loaded
            mx.eval(arrays)  # lazy arrays can only be evaluated on the thread that loaded them
            if metadata["key"] != self._fingerprint:
                return None
            session = Session(self._engine.model)
            session.cache_key = json.loads(metadata["cache_key"])
            features = {n.removeprefix("features."): a for n, a in arrays.items() if n.startswith("features.")}
            session.features = features
            rest = {name: array for name, array in arrays.items() if not name.startswith("features.")}
            session.prefix.load_arrays(rest, int(metadata["offset"]), int(metadata["mark"]))
            if len(session.cache_key) != session.prefix.offset:
                raise ValueError("its tokens and its keys differ in number")
            return session
        except Exception as error:  # a broken file can fail in any way
            warnings.warn(f"{path.name} in the prefix cache is broken ({error}); it is ignored.", stacklevel=2)
            return None


def check_size(path: Path) -> None:
    """Check that a safetensors file has the size that its header implies.

    Raises:
        ValueError, struct.error: the file is truncated or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size:
            raise ValueError("its header is cut short")
        header = json.loads(file.read(length))
    end = max((one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes and should have {8 + length + end}")


def fingerprint(engine: Engine) -> str:
    """Hash of what keys and values depend on besides the tokens: checkpoint, template, adapter, dtype, device, MLX."""
    digest = hashlib.sha256()
    dtypes = f"{engine.model.dtype} {engine.model.compute_dtype}"
    digest.update(f"1 {dtypes} {mx.default_device()} {version('mlx')}".encode())
    for path in sorted(engine.checkpoint.path.iterdir()):
        if path.suffix in (".json", ".jinja"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:
                size, changed = (
                    path.stat().st_size,
                    path.stat().st_mtime_ns,
                )  # the sampled bytes of two tuned checkpoints may be equal
                digest.update(f"{path.name} {size} {changed}".encode() + file.read(SAMPLE_BYTES))
                with suppress(OSError):
                    file.seek(-min(SAMPLE_BYTES, size), 2)
                digest.update(file.read())
    for path in [engine.adapter / name for name in (peft.CONFIG, peft.WEIGHTS)] if engine.adapter else ():
        content = path.read_bytes()  # read whole, since adapters of one training run may differ anywhere
        digest.update(f"adapter {path.name} {len(content)}".encode() + content)
    return digest.hexdigest()
