"""Fit the stop rules on a user's own prompts, to a stated agreement with `exact`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from ...checkpoint.calibration import Calibration
from ...errors import DataError, OptionError
from ...prompt.endings import with_hand_off
from .answers import Answer, Step, answer_together
from .prompts import Question
from .replay import Rule, Trajectory, outcome

if TYPE_CHECKING:
    from ...engine import Engine

BOUNDS = (1, 2, 4, 8)  # times the checkpoint's own entropy bound
CERTAINTIES = (0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)  # nats
PATIENCES = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Tried:
    """A setting that was tried.

    Attributes:
        entropy_bound, rule: the setting.
        agreement: share of the answers that it leaves as they are.
        positions: positions denoised an answer.
    """

    entropy_bound: float
    rule: Rule
    agreement: float
    positions: float


@dataclass(frozen=True)
class Fitted:
    """What a calibration found.

    Attributes:
        chosen: the setting with the fewest positions that agrees often enough.
        tried: all settings.
        exact_positions: positions denoised an answer in exact mode.
        self_agreement: share of exact mode's answers that are the same with another seed.
        checked: as `Tried`, of the setting chosen: answers generated with another seed, and the share of them that are
            those of exact mode.
        prompts: number of prompts.
    """

    chosen: Tried
    tried: list[Tried]
    exact_positions: float
    self_agreement: float
    checked: Tried
    prompts: int

    @property
    def front(self) -> list[Tried]:
        """The settings that no other one beats in both agreement and positions, from the fewest positions on."""
        found: list[Tried] = []
        for one in sorted(self.tried, key=lambda one: (one.positions, -one.agreement)):
            if not found or one.agreement > found[-1].agreement:
                found.append(one)
        return found

    @property
    def calibration(self) -> Calibration:
        """What is saved."""
        chosen = self.chosen
        options = {"entropy_bound": chosen.entropy_bound, **vars(chosen.rule)}
        return Calibration(options, self.prompts, chosen.agreement, chosen.positions, self.exact_positions)


def calibrate(
    engine: Engine,
    questions: Sequence[Question],
    agreement: float = 0.98,
    seed: int = 0,
    batch_size: int = 8,
    max_tokens: int | None = None,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> Fitted:
    """Find the quickest stop rule that leaves answers as they are.

    The prompts are answered in exact mode, and once for each entropy bound by a run that only the reference's rule
    stops. A rule's agreement is the share of these runs whose text it leaves as it is. That of another entropy bound is
    multiplied by how often its answers are those of exact mode, beside those of the checkpoint's own bound.

    All canvases are whole: a step's canvas is then the same whatever rule stops it, which the replay rests on. So the
    positions are those of whole canvases, and narrow ones compute fewer.

    Args:
        engine: with the model.
        questions: from `read_prompts`.
        agreement: share of the answers that must stay as they are.
        seed: of the first prompt's answer; others take the following ones.
        batch_size: prompts that are answered together.
        max_tokens: longest answer; None for the checkpoint's.
        watch: called with the number of answers done and of all.

    Raises:
        OptionError: an agreement outside 0 to 1.
        DataError: there are no prompts.
    """
    if not 0 < agreement <= 1:
        raise OptionError(f"agreement is {agreement}; it should be above 0 and at most 1.")
    if not questions:
        raise DataError("There are no prompts; give at least one.")
    passes, done = len(BOUNDS) + 3, 0

    def answers(seed: int, **options: Any) -> Iterator[tuple[Answer, list[list[Step]]]]:
        nonlocal done
        for start in range(0, len(questions), batch_size):
            drafts: list[list[list[Step]]] = []
            some = questions[start : start + batch_size]
            seeds = range(seed + start, seed + start + len(some))
            made = answer_together(engine, some, seeds, drafts, max_tokens=max_tokens, canvas="full", **options)
            done += len(made)
            watch(done, passes * len(questions))
            yield from zip(made, drafts)

    exact = [one for one, _ in answers(seed, exact=True)]
    tried, own_share = [], 0.0
    own = engine.checkpoint.generation.entropy_bound
    for bound in (own * factor for factor in BOUNDS):
        runs = list(answers(seed, entropy_bound=bound, certainty_threshold=0, patience=0))
        share = _agreement([one for one, _ in runs], exact)
        own_share = own_share or share
        fidelity = min(share / own_share, 1.0) if own_share else float(bound == own)
        known = [_trajectories(engine, one, drafts, max_tokens) for one, (_, drafts) in zip(questions, runs)]
        tried += _tried(known, bound, fidelity)
    chosen = min((one for one in tried if one.agreement >= agreement), key=lambda one: (one.positions, -one.agreement))
    other = seed + len(questions)
    again = [one for one, _ in answers(other, exact=True)]
    made = [one for one, _ in answers(other, entropy_bound=chosen.entropy_bound, **vars(chosen.rule))]
    return Fitted(
        chosen,
        tried,
        float(np.mean([one.positions for one in exact])),
        _agreement(again, exact),
        replace(chosen, agreement=_agreement(made, exact), positions=float(np.mean([one.positions for one in made]))),
        len(questions),
    )


def _tried(known: Sequence[list[Trajectory]], bound: float, fidelity: float) -> list[Tried]:
    """All stop rules on the answers that an entropy bound came to."""
    found = []
    for rule in (Rule(*values) for values in product(CERTAINTIES, PATIENCES)):
        same, positions = (float(np.mean(column)) for column in zip(*(outcome(blocks, rule) for blocks in known)))
        found.append(Tried(bound, rule, same * fidelity, positions))
    return found


def _agreement(answers: Sequence[Answer], others: Sequence[Answer]) -> float:
    return float(np.mean([one.tokens == other.tokens for one, other in zip(answers, others)]))


def _trajectories(
    engine: Engine, question: Question, blocks: list[list[Step]], max_tokens: int | None
) -> list[Trajectory]:
    """The canvases of an answer, step by step."""
    options = engine.options
    ends = with_hand_off(options, options, engine.tokenizer).end_tokens if question.tools else options.end_tokens
    room, found = max_tokens or options.max_tokens, []
    for steps in blocks:
        argmax, entropy = (np.stack(column) for column in zip(*steps))
        found.append(Trajectory.of(argmax, entropy, ends, room))
        room -= argmax.shape[1]  # of a canvas that does not end the text
    return found
