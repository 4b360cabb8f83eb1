"""The body of /v1/decisions: OpenAI's Decisions API as vLLM serves it, and what `Engine.choose` does beyond it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from .bodies import Flag, Shared, String
from .fields import Body, doc, number, only, whole
from .items import MessageItem
from .messages import EITHER, PartsOf

MAX_QUESTIONS = 32
MAX_CHOICES = 255
MAX_NUMBERS = 1000
BIG = 10**9
NOT_STREAMED = only(False, why="choices come together: leave it out")
ONE_STEP = only(why="choices are read in one step without it: leave it out")
Instructions = Annotated[str, doc("What is asked.", pattern="\\S"), Field(min_length=1)]


class Asked(Body):
    instructions: Instructions
    name: String = None


class Predicate(Asked):
    type: Literal["predicate"]


class Option(Body):
    value: str | bool
    description: str = ""


class Choice(Asked):
    type: Literal["choice"]
    choices: Annotated[list[Option], Field(min_length=2, max_length=MAX_CHOICES)]


class Level(Body):
    label: str
    description: str = ""


class Score(Asked):
    type: Literal["score"]
    levels: Annotated[list[Level], Field(min_length=2, max_length=MAX_CHOICES), doc("From the lowest on.")]


class Number(Asked):
    type: Literal["number"]
    min: Annotated[int, whole(-BIG, BIG)]
    max: Annotated[int, whole(-BIG, BIG)]
    step: Annotated[int, whole(1, BIG)] = 1


Question = Annotated[Predicate | Choice | Score | Number, Field(discriminator="type")]


class Decision(Shared):
    """A body of /v1/decisions."""

    NAMES: ClassVar[dict[str, str]] = {"messages": "input"}

    input: Annotated[
        Annotated[str, Tag("text")] | PartsOf[MessageItem],
        EITHER,
        doc("What the questions are about, with pictures as data URLs; may be empty."),
    ]
    questions: Annotated[list[Question], Field(min_length=1, max_length=MAX_QUESTIONS)]
    answer: Annotated[
        String, doc("A template that answers all questions together, with each name in braces: {color} {shape}.")
    ] = None
    calibrate: Annotated[Flag, doc("Divide by what the choices get where nothing is asked.")] = None
    list_choices: Annotated[Flag, doc("Tell the model what it may choose from; true unless given.")] = None
    temperature: Annotated[float | None, only(0, 1, why="choices are read at temperature 1: leave it out")] = None
    stream: Annotated[Flag, NOT_STREAMED] = None
    drafts: Annotated[Flag, NOT_STREAMED] = None
    mode: Literal["diffusion"] | None = None
    stop: Annotated[String, ONE_STEP] = None
    top_p: Annotated[float | None, number(1, 1)] = None
    top_k: Annotated[int | None, ONE_STEP] = None
    min_p: Annotated[float | None, ONE_STEP] = None
    repetition_penalty: Annotated[float | None, ONE_STEP] = None
    exact: Annotated[Flag, ONE_STEP] = None
    fast: Annotated[Flag, ONE_STEP] = None
    max_denoising_steps: Annotated[int | None, ONE_STEP] = None
    stability_threshold: Annotated[int | None, ONE_STEP] = None
    patience: Annotated[int | None, ONE_STEP] = None
    canvas: Annotated[Literal["auto", "full"] | int | None, ONE_STEP] = None
    entropy_bound: Annotated[float | None, ONE_STEP] = None
    entropy_rise: Annotated[float | None, ONE_STEP] = None
    effort: Annotated[Literal["low", "medium", "high"] | None, ONE_STEP] = None
    t_min: Annotated[float | None, ONE_STEP] = None
    t_max: Annotated[float | None, ONE_STEP] = None
    confidence_threshold: Annotated[float | None, ONE_STEP] = None
    certainty_threshold: Annotated[float | None, ONE_STEP] = None

    @property
    def groups(self) -> list[list[Predicate | Choice | Score | Number]]:
        """Questions that are read together: all of an answer template, else each by itself."""
        return [self.questions] if self.answer is not None else [[one] for one in self.questions]

    @property
    def choices(self) -> int:
        """Number of prompts that are read."""
        return len(self.groups) * (2 if self.calibrate else 1)
