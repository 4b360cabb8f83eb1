"""Drafts for text that comes token by token: of the text so far where it repeats itself, else of one denoising step.

Whether and how long a draft pays is decided from how many of the last drafts' tokens were right, and from what the
passes cost on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..model import rng
from ..model.kv_cache import Prefix
from .costs import Costs

LENGTHS = (4, 8, 16, 32, 64, 128, 256)  # tokens of a draft
GRAM = 3  # tokens that must repeat before what followed them is taken for a draft
MEMORY = 0.5  # weight of the drafts before the last one
HOPE = 16.0, 0.5  # tokens that count as right and as wrong at first
CHANCE = 2.0, 0.5  # the same where all that is known is that the text stood so before
SURE = 0.9  # probability at which a token of what is left stays as it was drafted
SUREST = 0.999
REST, LONGEST_REST = 16, 256  # tokens without drafts once they have not paid; doubled each time


class Pace:
    """Whether and how long to draft.

    Args:
        costs: by length, what a draft and the pass that verifies it cost, in passes over one token.
        hope: tokens that count as right and as wrong at first.
    """

    def __init__(self, costs: dict[int, float], hope: tuple[float, float] = HOPE):
        self._costs, self._hope, self._rest, self._next_rest = costs, hope, 0, REST
        self._right, self._wrong = hope

    @property
    def share(self) -> float:
        """How probable a token of a draft is where those before it are right."""
        return min(self._right / (self._right + self._wrong), SUREST)

    @property
    def length(self) -> int:
        """Tokens to draft; 0: none now."""
        best = max(self._costs, key=self.gain)
        return 0 if self._rest or self.gain(best) <= 1 else best

    def gain(self, tokens: int) -> float:
        """Tokens that drafts of so many come to in the time of a pass over one token; 1: without drafts."""
        if not tokens:
            return 1.0
        cost = self._costs[min((n for n in self._costs if n >= tokens), default=max(self._costs))]
        return (1 - self.share ** (tokens + 1)) / (1 - self.share) / cost

    def learn(self, drafted: int, accepted: int) -> None:
        """A draft of so many tokens came to so many that were right."""
        self._right = MEMORY * self._right + accepted
        self._wrong = MEMORY * self._wrong + (accepted < drafted)
        if accepted + 1 > min(self._costs.values()):
            self._next_rest = REST
        if not self.length:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LONGEST_REST)
            self._right, self._wrong = self._hope

    def pass_by(self) -> None:
        """A token was taken."""
        self._rest = max(self._rest - 1, 0)


class Guess(NamedTuple):
    """Tokens that a text may go on with."""

    at: int  # tokens of prompt and text before them
    tokens: list[int]
    sure: list[float]  # how probable each is where those before it are right

    def behind(self, place: int) -> Guess:
        """What it has of the text from a place on; nothing where it begins behind it."""
        start = place - self.at if place >= self.at else len(self.tokens)
        return Guess(place, self.tokens[start:], self.sure[start:])


class Drafter:
    """Drafts of one request.

    A draft that was wrong at one place is often right behind it, so what is left of it is the next draft, for nothing.

    Args:
        tokens: of its prompt; what is no token is never drafted.
        costs: of the model's passes.
        longest: tokens of a draft of the model.
        end_tokens: that end the text.
        likely: tokens that the text may well begin with.
    """

    def __init__(
        self,
        tokens: Sequence[int | str],
        costs: Costs,
        longest: int,
        end_tokens: Sequence[int] = (),
        likely: Sequence[int] = (),
    ):
        verify = {n: costs.verify_cost(n + 1) / costs.token for n in LENGTHS}
        made = {max(min(n, longest), 1) for n in LENGTHS}
        self._made = {n: costs.draft_cost(n + 1) / costs.token for n in made}
        self._verify = [costs.verify_cost(n + 1) / costs.token for n in range(LENGTHS[-1] + 1)]
        self._by_look_up, self._by_rest = Pace(verify, CHANCE), Pace(verify)
        self._by_model = Pace({n: self._verify[n] + cost for n, cost in self._made.items()})
        self._last = self._by_model
        self._guess = Guess(len(tokens), list(likely), [self._by_rest.share] * len(likely))
        self._end_tokens = end_tokens
        self._text: list[int | str] = []
        self._places: dict[tuple[int | str, ...], int] = {}  # behind which tokens the text goes on where
        for token in tokens:
            self._append(token)

    @property
    def ready(self) -> bool:
        """Whether a draft is worth its price now."""
        of_text = self._by_look_up.length and self._place() is not None
        return bool(self._by_model.length or of_text or (self._by_rest.length and self._rest.tokens))

    def take(self, token: int) -> None:
        """The text goes on with a token."""
        self._append(token)
        for pace in (self._by_look_up, self._by_rest, self._by_model):
            pace.pass_by()

    def propose(self, most: int, most_by_model: int) -> list[int] | int:
        """A draft of at most so many tokens that costs nothing, or how long one of the model's should be."""
        free = []
        for pace, guess in ((self._by_look_up, self._repeated(most)), (self._by_rest, self._rest)):
            if pace.length:
                count, gain = paying(guess.sure[:most], self._verify)
                free.append((gain, count, pace, guess))
        length = min(self._by_model.length, most, most_by_model)
        gain, count, pace, guess = max(free, key=lambda one: one[0], default=(0.0, 0, self._by_model, self._guess))
        ends = count and guess.tokens[count - 1] in self._end_tokens  # then no other draft would come to more tokens
        if count and gain >= self._by_model.gain(min(length, count) if ends else length):
            self._last, self._guess = pace, guess
            return guess.tokens[:count]
        self._last, self._guess = self._by_model, Guess(len(self._text), [], [])
        return length

    def keep(self, tokens: Sequence[int], sure: Sequence[float], most: int) -> list[int]:
        """A draft that the model made: as much of it as is worth verifying, `most` tokens at most.

        Args:
            tokens: of the model's canvas behind the text.
            sure: probability of each.
            most: tokens that were asked for.
        """
        spent = self._made[min((n for n in self._made if n >= len(tokens)), default=max(self._made))]
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._end_tokens), len(tokens))
        self._guess = Guess(len(self._text), list(tokens[:end]), list(sure[:end]))
        return self._guess.tokens[: paying(self._guess.sure[:most], self._verify, spent)[0]]

    def learn(self, draft: Sequence[int], drawn: Sequence[int], accepted: int) -> None:
        """What became of the last draft.

        Args:
            draft: its tokens.
            drawn: those of the pass that verified it, and the one behind.
            accepted: how many of the draft's tokens are the text's.
        """
        if not draft:
            return
        guess = self._guess
        # What a canvas was too unsure of counts as wrong, so that canvases become shorter.
        self._last.learn(len(guess.tokens) if self._last is self._by_model else len(draft), accepted)
        if self._last is self._by_rest and not accepted:
            self._guess = Guess(0, [], [])
        elif accepted < len(draft):
            # What was drawn behind the wrong token saw all before it, but the wrong one, too.
            for i in range(accepted + 1, min(len(drawn), len(guess.tokens))):
                if guess.sure[i] < SURE:
                    guess.tokens[i] = drawn[i]

    @property
    def _rest(self) -> Guess:
        """What the last draft has behind the text."""
        return self._guess.behind(len(self._text))

    def _repeated(self, most: int) -> Guess:
        """What followed the last time that the text stood as it does now, again and again."""
        place, tokens = self._place(), []
        if place is not None and self._by_look_up.length:
            period = len(self._text) - place
            for i in range(min(most, LENGTHS[-1])):
                token = self._text[place + i % period]
                if not isinstance(token, int):
                    break
                tokens.append(token)
        return Guess(len(self._text), tokens, [self._by_look_up.share] * len(tokens))

    def _place(self) -> int | None:
        """Where the text went on the last time that it stood as it does now."""
        return self._places.get(tuple(self._text[-GRAM:]))

    def _append(self, token: int | str) -> None:
        if len(self._text) >= GRAM:
            self._places[tuple(self._text[-GRAM:])] = len(self._text)
        self._text.append(token)


def paying(sure: Sequence[float], verify: Sequence[float], spent: float = 0.0) -> tuple[int, float]:
    """How much of a draft is worth verifying.

    Args:
        sure: how probable each of its tokens is where those before it are right.
        verify: by tokens of a draft, what the pass that verifies it costs, in passes over one token.
        spent: what the draft itself has cost.

    Returns:
        The tokens, and how many the text then goes on by in the time of a pass over one token. No tokens: 1.
    """
    sure = sure[: len(verify) - 1]
    if not len(sure):
        return 0, 1.0
    expected = 1 + np.cumsum(np.cumprod(np.nan_to_num(np.asarray(sure, np.float64))))
    gain = expected / (spent + np.asarray(verify[1 : len(sure) + 1]))
    best = int(np.argmax(gain))
    return (best + 1, float(gain[best])) if gain[best] > 1 / (spent + 1) else (0, 1.0)


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
