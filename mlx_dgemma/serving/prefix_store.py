"""The prefix cache's files: a folder that servers share, with a subfolder for each model that keys and values are of.

A subfolder is named after the fingerprint of its model, and owner.json in it says which model that is. Files are named
after the tokens that they hold, so two servers of one model can write the same folder: what both write is the same.
Of the own subfolder files are removed that a longer one holds, too, and the least recently used ones where all of them
exceed the budget. That is the largest budget that any server of the subfolder was given. A subfolder of another model
is removed where nobody has used it for `KEPT_DAYS` and no running server holds its lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..adapters import peft
from ..decoding.session import Session
from ..errors import CircumstanceError, OptionError
from ..files import atomic_file, check_name, sweep_folder, told_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from ..engine import Engine


OWNER, LOCK = "owner.json", "lock"
KEPT_DAYS = 30  # that a subfolder stays which nobody uses: a checkpoint, adapter or MLX that was replaced
FILE_STEM = "[0-9a-f]" * 32  # glob pattern of the cache's files; other files in the folder are left alone
SAMPLE_BYTES = 2**16  # read at the beginning and at the end of each shard for the fingerprint


class PrefixStore:
    """The files of one model's prefixes.

    Args:
        folder: shared by servers; created if it does not exist, readable by its owner alone.
        engine: what encodes the prefixes.
        budget: bytes on disk.

    Raises:
        OptionError: the folder cannot be created or read.
    """

    def __init__(self, folder: Path, engine: Engine, budget: int):
        check_name(folder)
        if folder.resolve() == engine.checkpoint.path.resolve():
            raise OptionError(f"The cache folder {folder} is the checkpoint's own; name another.")
        self._engine, self._budget, self._fingerprint = engine, budget, fingerprint(engine)
        self._folder = folder / self._fingerprint[:32]
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)  # private, since the files contain prompts
            os.listdir(folder)
        except OSError as error:
            raise CircumstanceError(
                f"The cache folder {folder} cannot be used ({error.strerror}); name another."
            ) from None
        self._released: weakref.finalize | None = None
        if self._folder.is_dir():
            self._hold()
        sweep_folder(self._folder)
        for other in folder.glob(FILE_STEM):
            if other != self._folder:
                remove_unused(other)

    def load(self) -> dict[str, Session]:
        """The prefixes of earlier processes by name, the least recently used first, as far as the budget allows.

        Broken files are removed with a warning; those that exceed the budget stay for a server with a larger one.
        """
        loaded: dict[str, Session] = {}
        bytes_left = self._budget
        for _, path in sorted(self._files(), reverse=True):
            session = self._read(path, bytes_left)
            if session is not None:
                bytes_left -= session.nbytes
                loaded[path.stem] = session
        return dict(reversed(loaded.items()))

    def holds(self, name: str) -> bool:
        """Whether a prefix is on disk."""
        return self._file(name).exists()

    def touch(self, name: str) -> None:
        """Note that a prefix was used."""
        with suppress(OSError):  # it may not be saved yet, or another server may have removed it
            os.utime(self._file(name))

    def write(self, name: str, session: Session, superseded: Iterable[str] = ()) -> None:
        """Write a prefix, remove those that it holds, too, and keep the folder within its budget.

        Raises:
            DgemmaError: the file cannot be written.
        """
        arrays, offset, mark = session.prefix.to_arrays()
        arrays.update({f"features.{feature}": array for feature, array in session.features.items()})
        metadata = {
            "key": self._fingerprint,
            "offset": str(offset),
            "mark": str(mark),
            "cache_key": json.dumps(session.cache_key),
        }
        with told_errors(self._file(name)):
            self._folder.mkdir(0o700, parents=True, exist_ok=True)
        self._hold()
        with atomic_file(self._file(name), mode=0o600, flush=False) as draft:  # a file that gets lost is encoded again
            mx.save_safetensors(str(draft), arrays, metadata)
        self.remove(superseded)
        self._keep_budget(name)

    def remove(self, names: Iterable[str]) -> None:
        """Remove prefixes that another one holds, too."""
        for name in names:
            with suppress(OSError):
                self._file(name).unlink()

    def _hold(self) -> None:
        """Let no other server remove the subfolder while this one runs."""
        if fcntl is None or (self._released is not None and (self._folder / LOCK).exists()):
            return
        with suppress(OSError):  # a folder that can only be read is not removed either
            lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            if self._released is not None:
                self._released()
            self._released = weakref.finalize(self, os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _files(self) -> Iterator[tuple[float, Path]]:
        """Time of the last use and path of each file."""
        for path in self._folder.glob(f"{FILE_STEM}.safetensors"):
            with suppress(FileNotFoundError):  # another server may remove it meanwhile
                yield path.stat().st_mtime, path

    def _keep_budget(self, newest: str) -> None:
        budget, files = self._shared_budget(), sorted(self._files())
        sizes = {}
        for _, path in files:
            with suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
        total = sum(sizes.values())
        for path, size in sizes.items():
            if total > budget and path.stem != newest:
                self.remove([path.stem])
                total -= size

    def _shared_budget(self) -> int:
        """The largest budget of all servers that wrote here; owner.json keeps it."""
        file, checkpoint, model = self._folder / OWNER, self._engine.checkpoint, self._engine.model
        known = 0
        with suppress(OSError, ValueError, KeyError, TypeError):  # a broken file is written again
            known = int(json.loads(file.read_text(encoding="utf-8"))["budget"])
        if known >= self._budget:
            return known
        owner = {
            "model": str(checkpoint.path),
            "adapter": None if self._engine.adapter is None else str(self._engine.adapter),
            "dtype": str(model.dtype),
            "compute_dtype": str(model.compute_dtype),
            "kv_bits": model.kv_bits,
            "mlx": version("mlx"),
            "budget": self._budget,
        }
        with atomic_file(file, mode=0o600, flush=False) as draft:
            draft.write_text(json.dumps(owner, indent=2) + "\n", encoding="utf-8")
        return self._budget

    def _read(self, path: Path, bytes_left: int) -> Session | None:
        """The session in a file. None if it is too large, gone, of another model, or broken, which is told."""
        try:
            if tensor_bytes(path) > bytes_left:
                return None
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
            return session if session.nbytes <= bytes_left else None
        except Exception as error:  # a broken file can fail in any way
            if path.exists():  # if not, another server has just removed it
                self.remove([path.stem])
                warnings.warn(f"{path.name} in the prefix cache is broken ({error}); it is ignored.", stacklevel=2)
            return None


def remove_unused(folder: Path) -> None:
    """Remove a model's subfolder that nobody has used for `KEPT_DAYS` and no running server holds.

    What is no file of the cache stays, and the subfolder with it.
    """
    files = [*folder.glob(f"{FILE_STEM}.safetensors"), folder / OWNER]
    with suppress(OSError):  # another server may remove it meanwhile
        last = max(file.stat().st_mtime for file in files)
        if fcntl is None or time.time() - last < KEPT_DAYS * 86400:
            return
        with (folder / LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for file in (*files, folder / LOCK):
                file.unlink()
            folder.rmdir()


def tensor_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file, which must have the size that its header implies.

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
    return end


def fingerprint(engine: Engine) -> str:
    """Hash of what keys and values depend on besides the tokens: checkpoint, template, adapter, dtype, device, MLX."""
    digest = hashlib.sha256()
    dtypes = f"{engine.model.dtype} {engine.model.compute_dtype}"
    dtypes += "" if engine.model.kv_bits is None else f" kv {engine.model.kv_bits} values"  # how full layers keep them
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
