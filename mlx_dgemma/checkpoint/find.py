"""Find a folder by path or Hub id; snapshots on this machine are looked for before anything is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DgemmaError
from ..files import check_name
from .headers import read_tensors

DEMO = Path(__file__).parent.parent / "demo"
SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")
NEEDED = ("config.json", "tokenizer.json")
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
