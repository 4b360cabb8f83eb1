"""The tokenizer of a checkpoint."""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import CheckpointError
from ..model.config import read_json, refuse_pointer
from .folder import Checkpoint, Settings

MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Transformers looks for the template in the first; exporters also write the others.
TEMPLATES = ("chat_template.jinja", "chat_template.json")
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    *TEMPLATES,
)


def load_tokenizer(checkpoint: Checkpoint | Settings) -> Any:
    """mlx-lm's wrapper around the tokenizer, with the checkpoint's end tokens.

    Raises:
        CheckpointError: tokenizer.json is missing, is a git-lfs pointer or cannot be read.
    """
    if not (checkpoint.path / "tokenizer.json").exists():
        raise CheckpointError(f"{checkpoint.path} has no tokenizer.json; download the whole checkpoint.")
    from tokenizers import Tokenizer

    from .. import upstream

    try:
        with _without_marks(checkpoint.path) as folder:
            tokenizer = upstream.load_tokenizer(folder, eos_token_ids=list(checkpoint.generation.eos_token_ids))
            # Transformers' GemmaTokenizer sets a pre-tokenizer of its own; the model was trained with the file's.
            stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.backend_tokenizer.pre_tokenizer = stored.pre_tokenizer
        return tokenizer
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"The tokenizer in {checkpoint.path} cannot be read ({error}); download it again."
        ) from None


@contextmanager
def _without_marks(path: Path) -> Iterator[Path]:
    """The folder, or a temporary copy of its tokenizer that Transformers can read.

    The copy has no byte order marks, and a template that only chat_template.json holds in chat_template.jinja.
    """
    marked = []
    for name in FILES:
        if (path / name).exists():
            with (path / name).open("rb") as stream:
                start = stream.read(32)
            refuse_pointer(path / name, start)
            marked += [name] if start.startswith(MARKS) else []
    hidden = (path / TEMPLATES[1]).exists() and not (path / TEMPLATES[0]).exists()
    if not marked and not hidden:
        yield path
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in FILES:
            if name in marked:
                data = (path / name).read_bytes()
                code = json.detect_encoding(data)  # utf-8-sig, or utf-16, whose decoders drop the mark
                (folder / name).write_text(data.decode(code), encoding="utf-8")
            elif (path / name).exists():
                shutil.copyfile(path / name, folder / name)
        if hidden and isinstance(template := read_json(path / TEMPLATES[1]).get("chat_template"), str):
            (folder / TEMPLATES[0]).write_text(template, encoding="utf-8")
        yield folder
