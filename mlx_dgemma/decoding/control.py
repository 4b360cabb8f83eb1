"""What may be asked of canvases beyond answering: fixed positions, a draft to begin with, texts to choose from.

A `Control` is told of every canvas before it is denoised and of every block that came of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..model.diffusion_gemma import DiffusionGemma
from ..model.kv_cache import Prefix
from .options import GenerationOptions

PARTS = 4  # a canvas may be shorter by whole quarters


def fitting_size(count: int, canvas_length: int) -> int:
    """Positions of the shortest canvas that holds `count` tokens, in quarters of the model's canvas."""
    part = max(canvas_length // PARTS, 1)
    return min(-(-count // part) * part, canvas_length)


class Layout(NamedTuple):
    """What a canvas begins with instead of noise; arrays [B, C], where C may be less than the model's canvas."""

    tokens: mx.array  # int32
    fixed: mx.array  # bool; these keep their token, have entropy 0, and are ignored by acceptance and stop rules
    initial: mx.array  # bool; these begin with their token


class Guide(Protocol):
    """Chooses the text of every step among those that are allowed."""

    tokens: mx.array  # [N] int32, whose log-probabilities it needs at every position

    def choose(self, row: int, seen: dict[str, np.ndarray]) -> np.ndarray:
        """The text of one row, [C] int32.

        Args:
            row: its number among the rows that the guide was made for.
            seen: "argmax" [C] with "argmax_log_p" [C]; "likely" tokens [C, K] with "likely_log_p" [C, K]; and
                "asked" [C, N], log-probabilities of `tokens`.
        """


class TokenLanguage(Protocol):
    """Says which tokens may follow where text comes token by token. States are whole numbers."""

    state: int  # at the beginning
    scanner: Any  # what checks more than states tell, at the beginning; None: there is nothing
    reserve: int  # tokens that `allowed` leaves free where there is a scanner

    def allowed(self, state: int, left: int) -> np.ndarray:
        """[V] bool, tokens that may follow `state` where the text has room for `left`, its end token included."""

    def after(self, state: int, token: int) -> int:
        """The state behind a token."""

    def scan(self, scanner: Any, state: int, token: int) -> Any:
        """The scanner behind a token that was allowed in `state`; None: it must not follow all the same."""


class Control:
    """Leaves every canvas of a request as it is; the base of those that don't."""

    def layout(self) -> Layout | None:
        """What the next canvas begins with; None: noise."""
        return None

    def guide(self, left: int) -> Guide | None:
        """What chooses the text of the next canvas, where the text has room for `left` tokens; None: nothing."""
        return None

    def next_tokens(self) -> TokenLanguage | None:
        """What bounds each token of a text that comes token by token; None: nothing."""
        return None

    def commit(self, tokens: Sequence[int]) -> None:
        """Take note of a finished canvas."""

    def prepare(
        self, model: DiffusionGemma, prefix: Prefix, options: GenerationOptions, key: mx.array
    ) -> Iterator[int]:
        """Find out what must be known before the first canvas, a pass at a time, so that others get on in between.

        Args:
            model: the model.
            prefix: the encoded prompt; it is as it was between two passes.
            options: of the request.
            key: [2], its random key.

        Yields:
            The number of positions that a pass denoised.
        """
        yield from ()


def rows_of(prefix: Prefix, count: int) -> Prefix:
    """A prefix of one row as a batch of `count`; with one it is the prefix itself."""
    if count == 1:
        return prefix
    rows = prefix.fork()
    rows.select_rows([0] * count)
    return rows
