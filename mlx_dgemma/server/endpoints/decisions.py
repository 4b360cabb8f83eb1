"""POST /v1/decisions: how probable each choice is as the answer to a question, read in one denoising step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...decoding.request import Request
from ...prompt.messages import Message, messages_of
from ...tasks.choose import Plan, neutral_of, plan_of, read_answers
from ...tasks.decide import Decision as Reading
from ...tasks.decide import decide
from ...tasks.labels import BOOL_TEXTS
from ...tasks.labels import Question as Labels
from ..events import FinishedAnswer, stats
from ..options import as_api_errors
from ..pipeline import Exchange
from ..schemas.decisions import MAX_NUMBERS, Choice, Decision, Number, Predicate, Score
from ..schemas.fields import reject, reject_missing
from ..schemas.messages import content_of
from ..settings import Settings

if TYPE_CHECKING:
    from ...engine import Engine

AnyQuestion = Predicate | Choice | Score | Number


class DecisionExchange(Exchange):
    """Questions about an input. Each is a prompt of its own; with an answer template all are one."""

    BODY = Decision
    KIND = ("decision", "decision", "decision")

    def __init__(self, body: Decision, engine: Engine, settings: Settings):
        super().__init__(body, engine, settings)
        self.arguments["seed"] = body.seed or 0
        self.messages = _messages(body)
        self.check_pictures(settings.pictures)
        _check(body.questions, body.answer is not None)
        self._readings: dict[int, Reading] = {}

    def prepare(self, engine: Engine, arguments: dict[str, Any]) -> Request:
        """Make the request that reads one prompt; all have the same seed."""
        seed = self.arguments["seed"]
        i = arguments["seed"] - seed
        group = self.body.groups[i % len(self.body.groups)]
        options = engine.options.override(**{name: value for name, value in arguments.items() if name != "seed"})
        with as_api_errors("input", answer="answer", label="questions", labels="questions"):
            plan = self._plan(engine, group)
            messages = messages_of(self._asked(group))
            if i >= len(self.body.groups):
                messages = neutral_of(messages)
            request, self._readings[i] = decide(engine.builder, messages, plan, seed, options)
            return request

    def _plan(self, engine: Engine, group: Sequence[AnyQuestion]) -> Plan:
        labels = [_labels(one, "" if self.body.answer is None else one.name or "") for one in group]
        return plan_of(engine.tokenizer, engine.config, labels, self.body.answer)

    def _asked(self, group: Sequence[AnyQuestion]) -> list[Message]:
        """The input with questions behind it, in the last user's message."""
        asked = "\n\n".join(self._question(one) for one in group)
        *before, last = self.messages
        if not isinstance(last["content"], str):
            return [*before, {**last, "content": [*last["content"], {"type": "text", "text": f"\n\n{asked}"}]}]
        text = f"{last['content'].rstrip()}\n\n{asked}" if last["content"].strip() else asked
        return [*before, {**last, "content": text}]

    def _question(self, question: AnyQuestion) -> str:
        listed = "" if self.body.list_choices is False else _listed(question)
        return f"{question.instructions}\n\n{listed}" if listed else question.instructions

    def events(self, i: int, event: Any) -> Iterator[dict[str, Any]]:
        """Nothing: choices are not streamed."""
        if isinstance(event, FinishedAnswer):
            self.answers[i] = event
        yield from ()

    def choice(self, i: int, answer: FinishedAnswer) -> dict[str, Any]:
        """The answer to a question."""
        return self._answers[i]

    def whole(self) -> dict[str, Any]:
        """The one body."""
        told = [one.result.stats for one in self._in_order()]
        read = sum(one.prompt_tokens for one in told)
        known = sum(one.reused_tokens for one in told)
        each = [stats(one) for one in self._in_order()]
        usage = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": known, "cache_write_tokens": read - known},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read,
        }
        more = {"usage": usage, "stats": each[0] if len(each) == 1 else each, **self.ignored}
        return {**self._envelope, "answers": self._answers, **more}

    @cached_property
    def _answers(self) -> list[dict[str, Any]]:
        groups, found = self.body.groups, []
        for i, group in enumerate(groups):
            neutral = self._readings[i + len(groups)].said if self.body.calibrate else [None] * len(group)
            for question, said, without in zip(group, self._readings[i].said, neutral):
                found.append(_answer(question, *read_answers(said, without)))
        return found


def _messages(body: Decision) -> list[Message]:
    """The input, which ends with a user's message."""
    if isinstance(body.input, str):
        return [{"role": "user", "content": body.input}]
    found: list[Message] = [{"role": one.role, "content": content_of(one.content)} for one in body.input]
    if found[-1]["role"] != "user":
        reject(f"input[{len(found) - 1}].role", found[-1]["role"], "the last message should be a user's, who asks")
    return found


def _check(questions: Sequence[AnyQuestion], together: bool) -> None:
    """Refuse what contradicts itself."""
    for i, one in enumerate(questions):
        path = f"questions[{i}]"
        if together and not one.name and len(questions) > 1:
            reject_missing(f"{path}.name")
        if together and one.name and not one.name.isidentifier():
            reject(f"{path}.name", one.name, "the answer template needs letters, digits and _, as in color")
        if together and one.name and one.name in [other.name for other in questions[:i]]:
            reject(f"{path}.name", one.name, "it stands twice: give every question a name of its own")
        if isinstance(one, Number) and not one.min <= one.max:
            reject(f"{path}.max", one.max, f"but min is {one.min}: give a greater one")
        if isinstance(one, Number) and (one.max - one.min) // one.step >= MAX_NUMBERS:
            reject(f"{path}.max", one.max, f"which makes more than {MAX_NUMBERS} numbers: give a larger step")
        for k, text in enumerate(_texts(one)):
            name = "choices" if isinstance(one, Choice) else "levels"
            if not text.strip():
                reject(f"{path}.{name}[{k}]", text, "it should be a text that is not empty")
            if text.strip() in [other.strip() for other in _texts(one)[:k]]:
                reject(f"{path}.{name}[{k}]", text, "it stands twice: give every choice once")


def _texts(question: AnyQuestion) -> list[str]:
    """The choices as texts; none where they need not be checked."""
    if isinstance(question, Choice):
        return [str(one.value).lower() if isinstance(one.value, bool) else one.value for one in question.choices]
    return [one.label for one in question.levels] if isinstance(question, Score) else []


def _labels(question: AnyQuestion, name: str) -> Labels:
    """The labels that are read for a question."""
    if isinstance(question, Predicate):
        return Labels(name, tuple(BOOL_TEXTS), tuple(BOOL_TEXTS.values()))
    if isinstance(question, Number):
        numbers = range(question.min, question.max + 1, question.step)
        return Labels(name, tuple(numbers), tuple((str(one),) for one in numbers))
    texts = [text.strip() for text in _texts(question)]
    return Labels(name, tuple(range(len(texts))), tuple((text,) for text in texts))


def _listed(question: AnyQuestion) -> str:
    """What the model is told of the choices."""
    if isinstance(question, Predicate):
        return "Answer yes or no."
    if isinstance(question, Number):
        return f"Answer with a number from {question.min} to {question.max}."
    about = [one.description for one in (question.choices if isinstance(question, Choice) else question.levels)]
    texts = _texts(question)
    if not any(about):
        return f"Answer with one of these: {', '.join(texts)}."
    lines = [f"- {text}: {more}" if more else f"- {text}" for text, more in zip(texts, about)]
    return "\n".join(["Answer with one of these:", *lines])


def _answer(question: AnyQuestion, probabilities: list[float], mass: float) -> dict[str, Any]:
    """A question's answer; `confidence` is the best choice's share of everything that the model might say."""
    told: dict[str, Any] = {"type": question.type, "name": question.name}
    if isinstance(question, Predicate):
        return {**told, "probability": probabilities[0], "mass": mass}
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    more = {"confidence": probabilities[best] * min(mass, 1.0), "mass": mass}
    values: list[Any]
    if isinstance(question, Choice):
        values = [one.value for one in question.choices]
        told["choice"] = values[best]
    elif isinstance(question, Score):
        values = list(range(len(question.levels)))
        told["score"] = sum(i * p for i, p in enumerate(probabilities))
    else:
        values = list(range(question.min, question.max + 1, question.step))
        told |= {"number": values[best], "mean": sum(value * p for value, p in zip(values, probabilities))}
    each = [{"value": value, "probability": p} for value, p in zip(values, probabilities)]
    if isinstance(question, Score):
        each = [{**one, "label": level.label} for one, level in zip(each, question.levels)]
    return {**told, "probabilities": each, **more}
