"""The folder of a new checkpoint: created all or nothing, with tokenizer and configuration copied."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.errors import DgemmaError, OptionError, human

from .recipes import Quantization, part_of
from .writer import INDEX, write_json

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja")
_REWRITTEN = ("config.json", INDEX)


def require_absent(target: str | os.PathLike, option: str) -> Path:
    """Check that nothing exists at `target`.

    Args:
        target: path of a folder to be made; `~` is expanded.
        option: the option that sets the target, for the error message.

    Raises:
        OptionError: the path exists.
    """
    path = Path(target).expanduser()
    if os.path.lexists(path):
        raise OptionError(f"{path} exists; delete it or choose another {option}.")
    return path


@contextmanager
def atomic_folder(target: Path, nbytes: int, option: str) -> Iterator[Path]:
    """Yield a hidden folder beside `target`. It is renamed to `target` on success and removed on any error.

    Args:
        target: from `require_absent`.
        nbytes: bytes that will be written; the disk must have that much free space.
        option: the option that sets the target, for error messages.

    Raises:
        DgemmaError: too little free space, or a place that cannot be written.
    """
    missing_parents = [parent for parent in target.absolute().parents if not parent.exists()]
    parent = target.absolute().parent
    partial = parent / f".{target.name}.partial-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_partials(target)
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
        for created_parent in missing_parents:
            with suppress(OSError):
                created_parent.rmdir()
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DgemmaError(
                f"The disk under {parent} is full, and the result takes {human(nbytes)}; "
                f"free some space or choose another {option}."
            ) from None
        # Users do not know the hidden folder, so name its parent instead.
        where = parent if error.filename is None or str(partial) in str(error.filename) else error.filename
        raise DgemmaError(
            f"{where} cannot be used ({error.strerror or error}); fix that or choose another {option}."
        ) from None


def _remove_stale_partials(target: Path) -> None:
    """Remove partial folders of `target` whose process no longer runs."""
    for partial in target.absolute().parent.glob(f".{escape(target.name)}.partial-*"):
        pid = partial.name.rpartition("-")[2]
        if not pid.isdigit():
            continue
        try:
            if int(pid) != os.getpid():  # our own pid means that an earlier process had the same number
                os.kill(int(pid), 0)
                continue
        except ProcessLookupError:
            pass
        except OSError:  # another user's process, still running
            continue
        shutil.rmtree(partial, ignore_errors=True)


def copy_metadata(checkpoint: Checkpoint, folder: Path, dtype: str, quantized: dict[str, Quantization]) -> None:
    """Copy tokenizer, chat templates and the other configuration files, and write config.json.

    Args:
        checkpoint: the source.
        folder: the new checkpoint's folder.
        dtype: dtype of the weights that stay floats, such as "bfloat16".
        quantized: {module path: its quantization} of the new checkpoint.
    """
    for pattern in _COPIED:
        for file in sorted(checkpoint.path.glob(pattern)):
            if file.name not in _REWRITTEN and not file.name.startswith("._") and file.is_file():
                copy = folder / file.relative_to(checkpoint.path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    config = {k: v for k, v in checkpoint.raw_config.items() if k not in ("quantization", "quantization_config")}
    config["dtype"] = dtype
    for key in ("text_config", "vision_config"):
        if config.get(key) and (key == "text_config" or "dtype" in config[key]):
            config[key] = {**config[key], "dtype": dtype}
    config["text_config"] |= _classic_keys(checkpoint)
    config.pop("torch_dtype", None)
    if quantized:
        # Readers expect the experts' quantization as the default and the other modules as overrides.
        experts = (q for path, q in quantized.items() if part_of(path) == "experts")
        default = next(experts, next(iter(quantized.values())))
        overrides = {path: q.as_dict for path, q in sorted(quantized.items()) if q != default}
        config["quantization"] = config["quantization_config"] = {**default.as_dict, **overrides}
    write_json(folder / "config.json", config)


def _classic_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """Keys of text_config that mlx-vlm reads where Transformers writes or assumes something else.

    It does not know `per_layer_config`, and its default where `use_bidirectional_attention` is missing is "vision".
    """
    text, raw = checkpoint.config.text, checkpoint.raw_config["text_config"]
    keys: dict[str, Any] = {
        "global_head_dim": text.global_head_dim,
        "num_global_key_value_heads": text.num_global_key_value_heads,
    }
    if "use_bidirectional_attention" not in raw:
        keys["use_bidirectional_attention"] = text.use_bidirectional_attention
    full = text.full_rope or {}
    if int(full.get("partial_rotary_factor", 1) * text.global_head_dim) % 2:
        # mlx-lm rounds the half pair up and Transformers down; this share leaves neither a choice.
        share = (2 * text.rope("full_attention")[1] + 0.5) / text.global_head_dim
        full = {**full, "partial_rotary_factor": share}
        keys["rope_parameters"] = {"sliding_attention": text.sliding_rope, "full_attention": full}
    return keys
