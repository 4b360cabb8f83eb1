"""Find a folder by path or Hub id; snapshots on this machine are looked for before anything is downloaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DgemmaError
from ..files import check_name
from .headers import TensorInfo, read_tensors

DEMO = Path(__file__).parent.parent / "demo"
SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")
NEEDED = ("config.json", "tokenizer.json")
SAMPLE = 256  # bytes from the middle of each tensor that are part of a digest
HINT = "give a folder or a Hub id such as google/diffusiongemma-26B-A4B-it"


def find(name: str | os.PathLike | None = None) -> Path:
    """The folder of a checkpoint.

    Args:
        name: a path or a Hub id; None takes $MLX_DGEMMA_MODEL, else the bundled demo.

    Raises:
        CheckpointError: no such folder, no such Hub id, or no network to ask.
    """
    return fetch(_named(name), (*SETTINGS, "*.safetensors"), _is_complete, HINT)


def find_settings(name: str | os.PathLike | None = None) -> Path:
    """As `find`, but of what is not on this machine all files except the weights are downloaded."""
    return fetch(_named(name), SETTINGS, lambda folder: all((folder / one).exists() for one in NEEDED), HINT)


def settings_of(folder: Path) -> list[Path]:
    """A checkpoint's files besides the weights."""
    return sorted(file for pattern in SETTINGS for file in folder.glob(pattern) if not file.name.startswith("._"))


def digest(folder: Path, tensors: Mapping[str, TensorInfo]) -> str:
    """SHA-256 of a checkpoint's settings, of its tensors' names, shapes and dtypes, and of bytes of each tensor.

    It does not depend on how the tensors lie in files, so that the index is left out.
    """
    digest = hashlib.sha256()
    for file in settings_of(folder):
        if not file.name.endswith(".index.json"):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    for name, info in sorted(tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        with info.file.open("rb") as stream:
            stream.seek(info.start + max(info.nbytes - SAMPLE, 0) // 2)
            digest.update(stream.read(min(SAMPLE, info.nbytes)))
    return digest.hexdigest()


def digest_of_path(name: str) -> str | None:
    """The digest of a checkpoint by its path; None: there is none, or this is a Hub id.

    Raises:
        CheckpointError: it is broken.
        OSError: a file cannot be read.
    """
    folder = Path(name).expanduser()
    return digest(folder, read_tensors(folder)) if folder.is_dir() else None


def _named(name: str | os.PathLike | None) -> str:
    return str(name or os.environ.get("MLX_DGEMMA_MODEL") or DEMO)


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot is a complete checkpoint; raises CheckpointError if a shard is missing."""
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors")) and bool(read_tensors(folder))


def fetch(
    name: str,
    patterns: Sequence[str],
    is_complete: Callable[[Path], bool],
    hint: str,
    kinds: tuple[str, str] = ("folder", "repository"),
    error: type[DgemmaError] = CheckpointError,
    **wanted: Any,
) -> Path:
    """An existing path, or the snapshot of a Hub id, which is downloaded if it is not complete on this machine.

    Args:
        name: path or id.
        patterns: names of the files to download.
        is_complete: whether a snapshot holds all that is needed. If not, or on CheckpointError, it is downloaded.
        hint: what to do if the path does not exist; part of the message.
        kinds: what is looked for on this machine and on the Hub, for messages.
        error: the exception that is raised.
        wanted: further arguments of `snapshot_download`.
    """
    path = Path(name).expanduser()
    if path.exists():
        check_name(path)
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise error(f"{name} does not exist; {hint}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    here, there = kinds
    asked: dict[str, Any] = {"allow_patterns": list(patterns), **wanted}
    try:
        try:
            found = Path(snapshot_download(name, local_files_only=True, **asked))
            if is_complete(found):  # an interrupted download is completed below
                return found
        except (LocalEntryNotFoundError, CheckpointError):
            pass
        return Path(snapshot_download(name, **asked))
    except GatedRepoError:
        raise error(f"{name} is gated; accept its terms on the Hub and run `hf auth login`.") from None
    except RepositoryNotFoundError:
        raise error(
            f"{name} is neither a {here} here nor a {there} on the Hub; check the name, or log in if it is private."
        ) from None
    except HFValidationError:
        raise error(f"{name!r} is neither a {here} here nor a valid Hub id.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
        raise error(
            f"{name} is not on this machine and the Hub cannot be reached ({type(problem).__name__}); "
            "connect and try again, or give a folder."
        ) from None
