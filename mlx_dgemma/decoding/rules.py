"""Rules of a denoising step as named values: what it accepts, when its canvas has settled, what stands elsewhere.

A rule is a function of `Seen`, pure and lazy: it builds arrays from arrays and computes nothing. Whoever writes one
sees a single canvas, so that a row cannot depend on the rows beside it. The named rules below look at the last axis
alone and can be given as rules, too; those that are equal go into one batch.

C is the canvas length, K the number of likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import OptionError, shown
from . import sampler

EARLIER = 8  # steps that a rule can look back
Accept = Callable[["Seen"], mx.array]
Settle = Callable[["Seen", mx.array], mx.array]
Renoise = Callable[["Seen", mx.array, mx.array], mx.array]


class Seen(NamedTuple):
    """What a rule sees of one canvas after a step; arrays [C] unless a shape is given."""

    step: Any  # denoising steps done before this one; a list of them where there are many rows
    steps: int  # `max_denoising_steps`
    canvas: mx.array  # int32, what the step denoised
    kept: mx.array  # bool, positions that the step before accepted; in the first step those that are fixed
    argmax: mx.array  # int32, the most probable tokens; where a guide chooses the text, its choice
    sample: mx.array  # int32, tokens drawn from the distribution
    confidence: mx.array  # float32, probability of the most probable token
    entropy: (
        mx.array
    )  # float32, nats; 0 where fixed. `settle` sees 0 where `fast` keeps, 1 at least where a guide chose
    likely: mx.array  # [C, K] int32, likely tokens, the most probable first
    likely_p: mx.array  # [C, K] float32, their probabilities
    earlier: mx.array  # [8, C] int32, `argmax` of the steps before, oldest first; -1 where there was no step
    text: mx.array  # bool, positions of the answer: up to its first end token and within its room, without the fixed
    fixed: mx.array  # bool, positions whose tokens stay whatever a rule says

    def row(self, index: int) -> Seen:
        """One row of a batch, whose arrays are [B, C], [B, C, K] and [8, B, C]."""
        arrays = {
            name: value[:, index] if name == "earlier" else value[index]
            for name, value in self._asdict().items()
            if name != "steps"
        }
        return self._replace(**arrays)


def of_rows(name: str, rule: Callable[..., mx.array], seen: Seen, *more: mx.array) -> mx.array:
    """What a rule says of every row of a batch.

    Args:
        name: of the option.
        rule: of one's own.
        seen: of the batch.
        more: [B, C], what the rule takes besides.

    Returns:
        [B, C], or [B] of `settle`: int32 of `renoise`, bool of the others.

    Raises:
        OptionError: it returned another type or shape.
    """
    shape = () if name == "settle" else seen.argmax.shape[1:]
    dtype = mx.int32 if name == "renoise" else mx.bool_
    told = []
    for index in range(seen.argmax.shape[0]):
        one = rule(seen.row(index), *(array[index] for array in more))
        if not isinstance(one, mx.array) or one.shape != shape or one.dtype != dtype:
            got = f"{one.dtype} of shape {one.shape}" if isinstance(one, mx.array) else shown(one)
            raise OptionError(f"{name} returned {got}; it should return an array, {dtype} of shape {shape}.")
        told.append(one)
    return mx.stack(told)


@dataclass(frozen=True)
class EntropyBound:
    """Accept the most certain positions while the entropies before each sum to a bound of nats at most.

    It is `bound` in a canvas's first step, and each step adds `rise` times as much.
    """

    bound: float = 0.1
    rise: float = 0.0

    def __call__(self, seen: Seen) -> mx.array:
        """[..., C] bool."""
        return sampler.accept(mx.where(seen.fixed, mx.inf, seen.entropy), self.bound * (1 + self.rise * seen.step))


@dataclass(frozen=True)
class Confident:
    """Keep for good what has this probability, and up to two of the others: see `sampler.accept_confident`."""

    threshold: float = 0.9
    likely: float = 0.7
    unlikely: float = 0.3

    def __call__(self, seen: Seen) -> mx.array:
        """[..., C] bool."""
        return sampler.accept_confident(seen.confidence, seen.kept, self.threshold, self.likely, self.unlikely)


@dataclass(frozen=True)
class Settled:
    """The reference's stop rule, over the answer: the text unchanged, and certain on average."""

    stability: int = 1
    confidence: float = 0.005  # nats

    def __call__(self, seen: Seen, accepted: mx.array) -> mx.array:
        """[...] bool."""
        return sampler.settled(
            seen.argmax, list(seen.earlier), seen.entropy, self.stability, self.confidence, seen.text
        )


@dataclass(frozen=True)
class Certain:
    """No position of the answer has an entropy of `threshold` nats or more; the threshold rises by `rise` a step.

    A threshold that rises with the steps done is SchED's rule (arXiv 2512.02892).
    """

    threshold: float = 0.1
    rise: float = 0.0

    def __call__(self, seen: Seen, accepted: mx.array) -> mx.array:
        """[...] bool."""
        return sampler.certain(seen.entropy, self.threshold + self.rise * seen.step, seen.text)


@dataclass(frozen=True)
class Unchanged:
    """The answer is that of the last `steps` steps, of which there were as many."""

    steps: int = 2

    def __call__(self, seen: Seen, accepted: mx.array) -> mx.array:
        """[...] bool."""
        return sampler.unchanged(seen.argmax, list(seen.earlier), self.steps, seen.text)


@dataclass(frozen=True)
class AnyOf:
    """Settled where one of the rules says so."""

    rules: tuple[Settle, ...]

    def __call__(self, seen: Seen, accepted: mx.array) -> mx.array:
        """[...] bool."""
        told = [rule(seen, accepted) for rule in self.rules]
        return mx.stack(told).any(axis=0)
