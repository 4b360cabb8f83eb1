"""Drafts for text that comes token by token: of the text so far where it repeats itself, else of one denoising step.

Whether and how long a draft pays is decided from how many of the last drafts' tokens were right, and from what the
passes cost on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..model import rng
from ..model.kv_cache import Prefix
from .costs import Costs

LENGTHS = (4, 8, 16, 32, 64)  # tokens of a draft
GRAM = 3  # tokens that must repeat before what followed them is taken for a draft
MEMORY = 0.5  # weight of the drafts before the last one
HOPE = 16.0, 0.5  # tokens that count as right and as wrong at first
REST, LONGEST_REST = 16, 256  # tokens without drafts once they have not paid; doubled each time


class Pace:
    """Whether and how long to draft.

    Args:
        costs: by length, what a draft and the pass that verifies it cost, in passes over one token.
    """

    def __init__(self, costs: dict[int, float]):
        self._costs, self._rest, self._next_rest = costs, 0, REST
        self._right, self._wrong = HOPE

    @property
    def length(self) -> int:
        """Tokens to draft; 0: none now."""
        if self._rest:
            return 0
        share = self._right / (self._right + self._wrong)
        gain = {n: sum(share**i for i in range(n + 1)) / cost for n, cost in self._costs.items()}
        best = max(gain, key=lambda n: gain[n])
        return best if gain[best] > 1 else 0

    def learn(self, drafted: int, accepted: int) -> None:
        """A draft of so many tokens came to so many that were right."""
        self._right = MEMORY * self._right + accepted
        self._wrong = MEMORY * self._wrong + (accepted < drafted)
        if accepted + 1 > min(self._costs.values()):
            self._next_rest = REST
        if not self.length:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LONGEST_REST)
            self._right, self._wrong = HOPE

    def pass_by(self) -> None:
        """A token was taken."""
        self._rest = max(self._rest - 1, 0)


class Drafter:
    """Drafts of one request.

    Args:
        tokens: of its prompt; what is no token is never drafted.
        costs: of the model's passes.
    """

    def __init__(self, tokens: Sequence[int | str], costs: Costs):
        verify = {n: costs.verify_cost(n + 1) / costs.token for n in LENGTHS}
        self._by_look_up = Pace(verify)
        self._by_model = Pace({n: cost + costs.draft_cost(n + 1) / costs.token for n, cost in verify.items()})
        self._last = self._by_model
        self._text: list[int | str] = []
        self._places: dict[tuple[int | str, ...], int] = {}  # behind which tokens the text goes on where
        for token in tokens:
            self._append(token)

    @property
    def ready(self) -> bool:
        """Whether a draft is worth its price now."""
        return bool(self._by_model.length or (self._by_look_up.length and self._place() is not None))

    def take(self, token: int) -> None:
        """The text goes on with a token."""
        self._append(token)
        self._by_look_up.pass_by()
        self._by_model.pass_by()

    def propose(self, most: int, most_by_model: int) -> list[int] | int:
        """A draft of at most so many tokens from the text so far, or how long one of the model's should be."""
        place, length = self._place(), min(self._by_look_up.length, most)
        if place is not None and length:
            self._last = self._by_look_up
            period, draft = len(self._text) - place, []
            for i in range(length):
                token = self._text[place + i % period]
                if not isinstance(token, int):
                    break
                draft.append(token)
            if draft:
                return draft
        self._last = self._by_model
        return min(self._by_model.length, most, most_by_model)

    def learn(self, drafted: int, accepted: int) -> None:
        """What became of the last draft."""
        if drafted:
            self._last.learn(drafted, accepted)

    def _place(self) -> int | None:
        """Where the text went on the last time that it stood as it does now."""
        return self._places.get(tuple(self._text[-GRAM:]))

    def _append(self, token: int | str) -> None:
        if len(self._text) >= GRAM:
            self._places[tuple(self._text[-GRAM:])] = len(self._text)
        self._text.append(token)


def draft_canvas(
    prefixes: Sequence[Prefix], first: Sequence[int], seeds: Sequence[int], length: int, vocab_size: int
) -> tuple[mx.array, mx.array]:
    """What a denoising step is to make drafts of: the token that each goes on from, and noise.

    Args:
        prefixes: B prefixes of one row each.
        first: [B] the token behind each prefix.
        seeds: [B] of the requests; the noise depends on them and the place alone.
        length: tokens of a draft.
        vocab_size: tokens that noise is drawn from.

    Returns:
        canvas: [B, 1 + length] int32.
        keys: [B, 2], a random key for each row.
    """
    keys = mx.stack([mx.random.key((seed + (one.offset << 32)) % 2**64) for seed, one in zip(seeds, prefixes)])
    start = mx.array(list(first), mx.int32)[:, None]
    return mx.concatenate([start, rng.noise(length, vocab_size, keys)], axis=1), keys
