"""A checkpoint's own options: the tokens that end an answer, by their names, and stop rules that were fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.calibration import FILE, read_calibration
from ..checkpoint.folder import Checkpoint, Settings
from ..decoding.options import GenerationOptions
from ..errors import CheckpointError, OptionError
from .vocabulary import HAND_OFF, TURN_END, vocabulary_of


def own_options(
    checkpoint: Checkpoint | Settings, tokenizer: Any, vocab_size: int, adapter: Path | None = None
) -> tuple[GenerationOptions, tuple[str, ...]]:
    """A checkpoint's own options, and what is to be known of them. The turn's end ends, whatever files say.

    Tokens that the vocabulary does not have are left out and told. Stop rules that were fitted on prompts are taken
    from the adapter's folder, else from the checkpoint's.

    Raises:
        CheckpointError: the file of fitted stop rules is broken.
    """
    options = GenerationOptions.of(checkpoint.generation, checkpoint.processor)
    ends = [token for token in options.end_tokens if token < vocab_size]
    notes = [
        f"The checkpoint's eos_token_id has {token}, but the vocabulary has {vocab_size} tokens; it is left out."
        for token in options.end_tokens
        if token >= vocab_size
    ]
    turn_end = vocabulary_of(tokenizer)[TURN_END]
    if turn_end is not None and turn_end < vocab_size and turn_end not in ends:
        ends.append(turn_end)
        notes.append(f"The checkpoint's eos_token_id lacks {TURN_END}, the turn's end; answers end there all the same.")
    options = replace(options, end_tokens=tuple(ends))
    fitted = (read_calibration(adapter) if adapter else None) or read_calibration(checkpoint.path)
    if fitted:
        notes.append(f"The stop rules are calibrated: {fitted}.")
        try:
            options = options.calibrated(fitted.options)
        except OptionError as error:
            raise CheckpointError(f"{FILE} cannot be used: {error}") from None
    return options, tuple(notes)


def with_hand_off(options: GenerationOptions, own: GenerationOptions, tokenizer: Any) -> GenerationOptions:
    """The options of an answer that may call tools: it ends where it waits for a tool's response.

    Args:
        options: of the answer; end tokens that the user chose stay as they are.
        own: the checkpoint's.
        tokenizer: mlx-lm's wrapper.
    """
    hand_off = vocabulary_of(tokenizer)[HAND_OFF]
    if hand_off is None or hand_off in options.end_tokens or options.end_tokens != own.end_tokens:
        return options
    return replace(options, end_tokens=(*options.end_tokens, hand_off))
