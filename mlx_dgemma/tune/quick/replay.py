"""Stop rules on trajectories that are known: which step a rule takes, and whether the text is that of the end.

What a canvas is at a step does not depend on the rule that stops it. So one run that goes on to the reference's stop
tells what every other rule would have come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...decoding import sampler


@dataclass(frozen=True)
class Rule:
    """A stop rule of the default mode, as `GenerationOptions` has it; 0 switches a part off."""

    certainty_threshold: float
    patience: int


@dataclass(frozen=True)
class Trajectory:
    """One canvas, step by step.

    Attributes:
        worst: [S] float32, the highest entropy in the text, nats.
        unchanged: [S] int, for how many steps the text has been what it is.
        same: [S] bool, whether the text is that of the last step.
        length: positions of the canvas.
    """

    worst: np.ndarray
    unchanged: np.ndarray
    same: np.ndarray
    length: int

    @classmethod
    def of(cls, argmax: np.ndarray, entropy: np.ndarray, ends: Sequence[int], room: int) -> Trajectory:
        """A trajectory from what its steps show.

        Args:
            argmax, entropy: [S, C], the most probable tokens and entropies in nats of every step.
            ends: tokens that end a text.
            room: tokens that the text has room for.
        """
        steps = len(argmax)
        text = np.asarray(sampler.text(mx.array(argmax), mx.array(list(ends)), mx.full((steps,), room, mx.int32)))
        unchanged = np.zeros(steps, int)
        for step in range(steps):
            own = text[step]
            earlier = argmax[:step][::-1]
            differs = (earlier[:, own] != argmax[step][own]).any(axis=1)
            unchanged[step] = int(differs.argmax()) if differs.any() else step
        last = argmax[-1][text[-1]]
        same = np.array([np.array_equal(tokens[own], last) for tokens, own in zip(argmax, text)])
        return cls(np.where(text, entropy, 0).max(axis=1), unchanged, same, argmax.shape[1])

    def stop(self, rule: Rule) -> int:
        """The step, from 1, in which a rule stops the canvas; at the latest the last that is known."""
        found = self.worst < rule.certainty_threshold
        if rule.patience:
            found = found | (self.unchanged >= rule.patience)
        return int(found.argmax()) + 1 if found.any() else len(self.worst)


def outcome(blocks: Sequence[Trajectory], rule: Rule) -> tuple[bool, int]:
    """Whether a rule leaves an answer as it is, and the positions denoised for it.

    Where a canvas comes to another text, those behind it are counted as they are.
    """
    stops = [block.stop(rule) for block in blocks]
    same = all(block.same[stop - 1] for block, stop in zip(blocks, stops))
    return bool(same), sum(stop * block.length for block, stop in zip(blocks, stops))
