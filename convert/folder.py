"""The folder of a new checkpoint: all or nothing, with all files that are no weights."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.errors import DgemmaError, OptionError, human

from .recipes import Quantization, part_of
from .writer import INDEX, write_json

_CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja")
_REWRITTEN = ("config.json", INDEX)


def vacant(target: str | os.PathLike, option: str) -> Path:
    """The path of a folder to be made.

    Raises:
        OptionError: it exists; the message tells to choose another `option`.
    """
    path = Path(target).expanduser()
    if os.path.lexists(path):
        raise OptionError(f"{path} exists; delete it or choose another {option}.")
    return path


@contextmanager
def created(target: Path, nbytes: int, option: str) -> Iterator[Path]:
    """A hidden folder beside `target` that becomes `target`, or vanishes if anything goes wrong.

    Args:
        target: from `vacant`.
        nbytes: what is going to be written; less space on the disk is refused.
        option: what names the target, for messages.

    Raises:
        DgemmaError: too little space, or a place that cannot be written.
    """
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    parent = target.absolute().parent
    partial = parent / f".{target.name}.partial-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise DgemmaError(
                f"{parent} has {human(free)} free, but the result takes {human(nbytes)}; "
                f"free some space or choose another {option}."
            )
        partial.mkdir()
        yield partial
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for one in made:
            with suppress(OSError):
                one.rmdir()
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DgemmaError(
                f"The disk under {parent} is full, and the result takes {human(nbytes)}; "
                f"free some space or choose another {option}."
            ) from None
        # The hidden folder means nothing to a user; the one that holds it does.
        where = parent if error.filename is None or str(partial) in str(error.filename) else error.filename
        raise DgemmaError(
            f"{where} cannot be used ({error.strerror or error}); mend that or choose another {option}."
        ) from None


def _sweep(target: Path) -> None:
    """Remove what killed runs left: folders for this target whose process is gone."""
    for left in target.absolute().parent.glob(f".{escape(target.name)}.partial-*"):
        number = left.name.rpartition("-")[2]
        if not number.isdigit():
            continue
        try:
            if int(number) != os.getpid():  # its number may have come round again, to us
                os.kill(int(number), 0)
                continue
        except ProcessLookupError:
            pass
        except OSError:  # somebody else's, and alive
            continue
        shutil.rmtree(left, ignore_errors=True)


def carry(checkpoint: Checkpoint, folder: Path, dtype: str, packed: dict[str, Quantization]) -> None:
    """Copy tokenizer, templates and the other configurations; write config.json.

    Args:
        checkpoint: where they come from.
        folder: where they go.
        dtype: of the floats that stay floats, such as "bfloat16".
        packed: {module path: how it is packed} of the new checkpoint.
    """
    for pattern in _CARRIED:
        for file in sorted(checkpoint.path.glob(pattern)):
            if file.name not in _REWRITTEN and file.is_file():
                copy = folder / file.relative_to(checkpoint.path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    config = {k: v for k, v in checkpoint.raw_config.items() if k not in ("quantization", "quantization_config")}
    config["dtype"] = dtype
    for key in ("text_config", "vision_config"):
        if config.get(key) and (key == "text_config" or "dtype" in config[key]):
            config[key] = {**config[key], "dtype": dtype}
    config.pop("torch_dtype", None)
    if packed:
        # The experts' quantization is the base, as readers expect it; other modules are exceptions to it.
        experts = (q for path, q in packed.items() if part_of(path) == "experts")
        base = next(experts, next(iter(packed.values())))
        others = {path: q.as_dict for path, q in sorted(packed.items()) if q != base}
        config["quantization"] = config["quantization_config"] = {**base.as_dict, **others}
    write_json(folder / "config.json", config)
