"""What a distillation did, on prompts that it did not train on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ...files import atomic_file
from .answers import Answer, answer_together, vote
from .prompts import Question

if TYPE_CHECKING:
    from ...engine import Engine

FILE = "held_back.json"


@dataclass(frozen=True)
class Measured:
    """How a model answers.

    Attributes:
        prompts: number of prompts.
        of: prompts whose expected answer is known, because several seeds of the frozen model gave it.
        agreement: share of these that the model answers so; 0 if there are none.
        steps: denoising steps an answer.
        positions: positions denoised an answer, summed over steps.
    """

    prompts: int
    of: int
    agreement: float
    steps: float
    positions: float


@dataclass
class HeldBack:
    """Prompts that are not trained on.

    Attributes:
        questions: the prompts.
        seed: of the first answer.
        expected: the tokens of each answer that several seeds of the frozen model agree on, else None.
        before: what the frozen model comes to.
    """

    questions: Sequence[Question]
    seed: int
    expected: list[list[int] | None] | None = None
    before: Measured | None = None

    def expect(
        self, engine: Engine, batch: int, agree: int, best_of: int, teacher: Callable[[int], dict[str, Any]]
    ) -> Iterator[int]:
        """Find out the expected answers; yields the number of answers done. `teacher` says the options of each take."""
        takes: list[list[Answer]] = [[] for _ in self.questions]
        for take in range(best_of):
            for i, answer in self._answers(engine, batch, 2 + take, **teacher(take)):
                takes[i].append(answer)
                yield sum(map(len, takes))
        voted = [vote(answers) for answers in takes]
        self.expected = [list(best.tokens) if votes >= agree else None for best, votes in voted]

    def measure(self, engine: Engine, batch: int, **options: Any) -> Iterator[int | Measured]:
        """Answer the prompts, always with the same seeds; yields the number of answers done, at last the result."""
        answers: list[Answer] = []
        for _, answer in self._answers(engine, batch, 1, **options):
            answers.append(answer)
            yield len(answers)
        known = [(one, own) for one, own in zip(self.expected or [], answers) if one is not None]
        right, count = sum(tuple(one) == own.tokens for one, own in known), max(len(answers), 1)
        yield Measured(
            len(answers),
            len(known),
            right / max(len(known), 1),
            sum(one.steps for one in answers) / count,
            sum(one.positions for one in answers) / count,
        )

    def _answers(self, engine: Engine, batch: int, take: int, **options: Any) -> Iterator[tuple[int, Answer]]:
        for start in range(0, len(self.questions), batch):
            some = self.questions[start : start + batch]
            seeds = [self.seed + (take << 24) + start + i for i in range(len(some))]
            yield from enumerate(answer_together(engine, some, seeds, **options), start)

    def save(self, folder: Path) -> None:
        """Write what is known into a folder."""
        told = {"expected": self.expected, "before": asdict(self.before) if self.before else None}
        with atomic_file(folder / FILE) as draft:
            draft.write_text(json.dumps(told), "utf-8")

    def load(self, folder: Path) -> None:
        """Read what an earlier part of the run found out, if it did.

        Raises:
            DataError: the file is broken.
        """
        file = folder / FILE
        if not file.exists():
            return
        try:
            told = json.loads(file.read_text("utf-8"))
            self.expected, self.before = told["expected"], Measured(**told["before"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file} is broken; start a new run without --resume.") from None
