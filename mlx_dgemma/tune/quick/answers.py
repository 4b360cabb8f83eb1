"""The model's own answers, and which of them can be trusted: those that several seeds agree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...decoding.events import Block, Draft, Finished
from ...decoding.loop import Loop
from .prompts import Question

if TYPE_CHECKING:
    from ...engine import Engine


class Step(NamedTuple):
    """A canvas after one denoising step; arrays [C]."""

    argmax: np.ndarray  # int32
    entropy: np.ndarray  # float32, nats


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Attributes:
        blocks: its canvases, with whatever lies behind the end; token by token its tokens.
        length: tokens up to the end token, that included.
        text: the answer without markers.
        log_prob: mean log-probability of its tokens, nats.
        steps: denoising steps.
        positions: positions denoised, summed over steps.
    """

    blocks: tuple[tuple[int, ...], ...]
    length: int
    text: str
    log_prob: float
    steps: int
    positions: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """The answer as token ids, with its end token if it has one."""
        return tuple(token for block in self.blocks for token in block)[: self.length]

    def canvases(self, length: int, fill: int) -> list[list[int]]:
        """The answer in canvases of `length`; what its blocks do not tell lies behind the end and is `fill`."""
        flat = [token for block in self.blocks for token in block]
        flat += [fill] * (-len(flat) % length)
        return [flat[at : at + length] for at in range(0, self.length, length)]


def answer_together(
    engine: Engine,
    questions: Sequence[Question],
    seeds: Sequence[int],
    drafts: list[list[list[Step]]] | None = None,
    ways: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> list[Answer]:
    """Answer some questions in one batch, each with its seed.

    Args:
        engine: with the model.
        questions, seeds: one seed for each question.
        drafts: filled with every step's canvas: a list for each question of a list for each block.
        ways: options of `Engine.generate` for each question, beside those for all; None: none.
        options: of `Engine.generate` for all.
    """
    requests = [
        engine.prepare(one.messages, seed=seed, thinking=one.thinking, tools=one.tools, **way, **options)
        for one, seed, way in zip(questions, seeds, ways or [{}] * len(questions))
    ]
    index = {id(request): i for i, request in enumerate(requests)}
    blocks: list[list[tuple[int, ...]]] = [[] for _ in requests]
    found: dict[int, Answer] = {}
    if drafts is not None:
        drafts += [[] for _ in requests]
    with closing(Loop(engine.model)) as loop:
        for request in requests:
            request.drafts = drafts is not None
            loop.add(request)
        while loop.requests:
            for request, event in loop.step():
                i = index[id(request)]
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Draft) and drafts is not None:
                    if event.block == len(drafts[i]):
                        drafts[i].append([])
                    drafts[i][-1].append(Step(np.asarray(event.tokens), np.asarray(event.entropy)))
                elif isinstance(event, Block):
                    blocks[i].append(event.tokens)
                elif isinstance(event, Finished):
                    result, flat = event.result, [token for block in blocks[i] for token in block]
                    ends = request.options.end_tokens
                    length = next((at + 1 for at, token in enumerate(flat) if token in ends), len(flat))
                    log_probs = result.log_probs or [0.0]
                    found[i] = Answer(
                        tuple(blocks[i]),
                        length,
                        result.text,
                        sum(log_probs) / len(log_probs),
                        result.stats.denoising_steps,
                        result.stats.canvas_positions,
                    )
    return [found[i] for i in range(len(requests))]


def fill_token(engine: Engine, question: Question, seed: int) -> int:
    """What the model puts behind the end of an answer: seen in one, or the padding token if that fills its canvas."""
    (answer,) = answer_together(engine, [question], [seed], exact=True)
    behind = [token for block in answer.blocks for token in block][answer.length :]
    return Counter(behind).most_common(1)[0][0] if behind else engine.tokenizer.pad_token_id or 0


def vote(answers: Sequence[Answer]) -> tuple[Answer, int]:
    """The answer that most of them give, and how many do; of equal numbers the one that is the most probable."""
    votes = Counter(one.tokens for one in answers)
    best = max(answers, key=lambda one: (votes[one.tokens], one.log_prob))
    return best, votes[best.tokens]


def trusted(families: Sequence[str], votes: Sequence[int], agree: int, family_agreement: float) -> list[bool]:
    """Which prompts are learned.

    Args:
        families: of each prompt.
        votes: how many of its answers are equal.
        agree: how many it takes.
        family_agreement: share of a family's prompts that must agree for any of them to be learned; where all prompts
            are of one family, each counts for itself.
    """
    agreed = [count >= agree for count in votes]
    if len(set(families)) < 2:
        return agreed
    of, right = Counter(families), Counter(family for family, one in zip(families, agreed) if one)
    return [one and right[family] >= family_agreement * of[family] for family, one in zip(families, agreed)]
