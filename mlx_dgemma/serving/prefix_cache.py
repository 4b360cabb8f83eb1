"""Prefixes of earlier requests: what a new prompt begins with need not be encoded again.

Sliding layers hold only what their window sees, so a prefix can be gone back in only to where its rings were kept: the
end of its prompt. Where a prompt leaves an earlier one elsewhere, a copy is kept at that place, for the next one that
comes that way.
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


WORTH = 64  # tokens; a shorter beginning is encoded as fast as it is fetched
NAME = "[0-9a-f]" * 32  # of a file: nothing else in the folder is touched
SAMPLE = 2**16  # bytes of a shard at its beginning and end that tell it from others


class PrefixCache:
    """Sessions of earlier requests within a budget, the least recently used out first.

    Args:
        engine: whose prefixes they are.
        budget: bytes of unified memory.
        folder: where they outlive the process, as many bytes again; None: nowhere.

    Raises:
        OptionError: a folder that cannot be made or read.
    """

    def __init__(self, engine: Engine, budget: int, folder: Path | None = None):
        self._engine, self._budget, self._folder = engine, budget, folder
        self._kept: dict[str, Session] = {}  # by name, the oldest use first
        self._unsaved: list[str] = []
        self._key = "" if folder is None else fingerprint(engine)
        if folder is not None:
            if folder.resolve() == engine.checkpoint.path.resolve():
                raise OptionError(f"The cache folder {folder} is the checkpoint's own; name another.")
            try:
                folder.mkdir(0o700, parents=True, exist_ok=True)  # files hold prompts
                self._load(folder)
            except OSError as error:
                raise OptionError(
                    f"The cache folder {folder} cannot be used ({error.strerror}); name another."
                ) from None

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(session.nbytes for session in self._kept.values())

    def find(self, wanted: list[int | str]) -> tuple[Session | None, int]:
        """A session to go on with for a prompt, and where a copy of it should be kept on the way.

        Args:
            wanted: the prompt, as `Session.cache_key`.

        Returns:
            A session of its own, or None where none would save anything; and a position of the prompt, or 0.
        """
        best, reach, longest = "", 0, 0
        for name, session in self._kept.items():
            shared = session.shared(wanted)
            reached = session.prefix.rewindable_length(shared)
            longest = max(longest, shared)
            if reached >= max(reach, WORTH):
                best, reach = name, reached
        while 0 < longest < len(wanted) and isinstance(wanted[longest], str) and isinstance(wanted[longest - 1], str):
            longest -= 1  # not within a picture
        snapshot_at = longest if longest >= max(reach, 1) + WORTH else 0
        if not best:
            return None, snapshot_at
        self._kept[best] = self._kept.pop(best)
        return self._kept[best].fork(), snapshot_at

    def put(self, session: Session) -> None:
        """Keep a session that nobody goes on with; what it makes useless goes."""
        if len(session.cache_key) < WORTH or self._budget == 0:
            return
        if session.prefix.rewind(len(session.cache_key)) < len(session.cache_key):
            return  # it was interrupted
        session.prefix.trim()
        if session.nbytes > self._budget:
            return  # it would drive out all others for nothing
        name = hashlib.sha256(json.dumps(session.cache_key).encode()).hexdigest()[:32]
        for other, old in list(self._kept.items()):
            if (
                session.shared(old.cache_key)
                == len(old.cache_key)
                == session.prefix.rewindable_length(len(old.cache_key))
            ):
                self._drop(other, keep_file=other == name)
        self._kept[name] = session
        if self._folder is not None and name not in self._unsaved and not self._file(name).exists():
            self._unsaved.append(name)
        while self.nbytes > self._budget:
            self._drop(next(iter(self._kept)))

    def save_one(self) -> bool:
        """Write one session that is not in the folder yet; returns whether more are left."""
        if self._unsaved:
            name = self._unsaved.pop()
            try:
                self._write(self._file(name), self._kept[name])
            except (OSError, RuntimeError) as error:  # MLX raises the latter
                self._folder, self._unsaved = None, []
                warnings.warn(f"The prefix cache cannot be written ({error}); it stays in memory.", stacklevel=2)
        return bool(self._unsaved)

    def _drop(self, name: str, keep_file: bool = False) -> None:
        del self._kept[name]
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
        about = {"key": self._key, "offset": str(offset), "mark": str(mark), "cache_key": json.dumps(session.cache_key)}
        part = path.with_suffix(".part.safetensors")  # MLX wants the ending
        mx.save_safetensors(str(part), arrays, about)
        part.replace(path)

    def _load(self, folder: Path) -> None:
        """Take in what an earlier process left; the newest files first, within the budget."""
        for part in folder.glob(f"{NAME}.part.safetensors"):
            part.unlink(missing_ok=True)
        with_time = [(path.stat().st_mtime, path) for path in folder.glob(f"{NAME}.safetensors")]
        found: list[tuple[str, Session]] = []
        left = self._budget
        for _, path in sorted(with_time, reverse=True):
            session = self._read(path)
            if session is None or session.nbytes > left:
                path.unlink(missing_ok=True)
                continue
            left -= session.nbytes
            found.append((path.stem, session))
        self._kept = dict(reversed(found))

    def _read(self, path: Path) -> Session | None:
        """A file's session; None, with a warning, where it is broken, and silently where it is another checkpoint's."""
        try:
            check_size(path)
            loaded: Any = mx.load(str(path), return_metadata=True)
            arrays, about = loaded
            mx.eval(arrays)  # on the thread that they were loaded on
            if about["key"] != self._key:
                return None
            session = Session(self._engine.model)
            session.cache_key = json.loads(about["cache_key"])
            features = {n.removeprefix("features."): a for n, a in arrays.items() if n.startswith("features.")}
            session.features = features
            rest = {name: array for name, array in arrays.items() if not name.startswith("features.")}
            session.prefix.load_arrays(rest, int(about["offset"]), int(about["mark"]))
            if len(session.cache_key) != session.prefix.offset:
                raise ValueError("its tokens and its keys differ in number")
            return session
        except Exception as error:  # garbage can be wrong in every way
            warnings.warn(f"{path.name} in the prefix cache is broken ({error}); it is ignored.", stacklevel=2)
            return None


def check_size(path: Path) -> None:
    """Compare a safetensors file's length with what its header says.

    Raises:
        ValueError, struct.error: it was cut short, or is none.
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
    """What keys and values depend on beside the tokens: checkpoint, chat template, adapter, and how it is computed."""
    seen = hashlib.sha256()
    seen.update(f"1 {engine.model.dtype} {mx.default_device()} {version('mlx')}".encode())
    for path in sorted(engine.checkpoint.path.iterdir()):
        if path.suffix in (".json", ".jinja"):
            seen.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:
                size, changed = path.stat().st_size, path.stat().st_mtime_ns  # tuned weights can be alike here
                seen.update(f"{path.name} {size} {changed}".encode() + file.read(SAMPLE))
                with suppress(OSError):
                    file.seek(-min(SAMPLE, size), 2)
                seen.update(file.read())
    for path in [engine.adapter / name for name in (peft.CONFIG, peft.WEIGHTS)] if engine.adapter else ():
        content = path.read_bytes()  # whole: adapters of one training differ anywhere
        seen.update(f"adapter {path.name} {len(content)}".encode() + content)
    return seen.hexdigest()
