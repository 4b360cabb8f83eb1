"""The tokens that end an answer, by their names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..decoding.options import GenerationOptions
from ..model.config import GenerationConfig, ProcessorConfig
from .vocabulary import HAND_OFF, TURN_END, vocabulary_of


def own_options(
    generation: GenerationConfig, processor: ProcessorConfig, tokenizer: Any, vocab_size: int
) -> tuple[GenerationOptions, tuple[str, ...]]:
    """A checkpoint's own options, and what is to be known of them. The turn's end ends, whatever files say.

    Tokens that the vocabulary does not have are left out and told.
    """
    options = GenerationOptions.of(generation, processor)
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
    return replace(options, end_tokens=tuple(ends)), tuple(notes)


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
