"""`Opened`: a checkpoint without its weights, which suffices to prepare requests and to see what is wrong with them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.find import find_settings
from ..checkpoint.folder import Settings
from ..checkpoint.tokenizer import load_tokenizer
from ..decoding.options import GenerationOptions
from .builder import PromptBuilder
from .endings import own_options


@dataclass(frozen=True)
class Opened:
    """What a checkpoint's small files say.

    Attributes:
        settings: its JSON files.
        tokenizer: mlx-lm's wrapper.
        options: the checkpoint's own.
        notes: what is to be known of the options, one sentence each.
    """

    settings: Settings
    tokenizer: Any
    options: GenerationOptions
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str | os.PathLike | None = None, adapter: Path | None = None) -> Opened:
        """Open a checkpoint. No file of weights is opened or downloaded.

        Args:
            name: what `mlx_dgemma.load` takes.
            adapter: the folder of an adapter, whose stop rules go before the checkpoint's.

        Raises:
            CheckpointError: nothing there, something broken, or another model.
        """
        settings = Settings.read(find_settings(name))
        tokenizer = load_tokenizer(settings)
        return cls(settings, tokenizer, *own_options(settings, tokenizer, settings.config.text.vocab_size, adapter))

    @cached_property
    def builder(self) -> PromptBuilder:
        """What makes requests of prompts; costs of passes are reckoned."""
        return PromptBuilder(self.tokenizer, self.settings.config, self.options, self.settings.processor.video_tokens)
