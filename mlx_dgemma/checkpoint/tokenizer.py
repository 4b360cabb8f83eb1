"""The tokenizer of a checkpoint."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from .folder import Checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """mlx-lm's wrapper around the tokenizer, with the checkpoint's end tokens.

    Raises:
        CheckpointError: tokenizer.json is missing or cannot be read.
    """
    if not (checkpoint.path / "tokenizer.json").exists():
        raise CheckpointError(f"{checkpoint.path} has no tokenizer.json; download the whole checkpoint.")
    from tokenizers import Tokenizer

    from .. import upstream

    try:
        tokenizer = upstream.load_tokenizer(checkpoint.path, eos_token_ids=list(checkpoint.generation.eos_token_ids))
        # Transformers' GemmaTokenizer sets a pre-tokenizer of its own; the model was trained with the file's.
        stored = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
        tokenizer.backend_tokenizer.pre_tokenizer = stored.pre_tokenizer
        return tokenizer
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"The tokenizer in {checkpoint.path} cannot be read ({error}); download it again."
        ) from None
