"""Score a model's answers on data whose last answers are the expected ones."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..constraints.matching import Pattern, PatternError
from ..decoding.events import Result, Stats
from ..errors import CircumstanceError, DataError, OptionError
from .data import Example, text_of

if TYPE_CHECKING:
    from ..engine import Engine


Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations
COMPARISONS: dict[str, Callable[[str, str], bool]] = {  # called with the expected text and the answer's
    "exact": lambda expected, text: text.strip() == expected.strip(),
    "contains": lambda expected, text: expected.strip() in text,
    "regex": lambda expected, text: Pattern(expected).fullmatch(text),
}
Scorer = Callable[[Example, Result], float]


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer and its score. In `text` and `expected`, tool calls are lines of JSON after the text.

    Attributes:
        where: place of the example, such as "test.jsonl, line 3".
        text: the answer without thinking.
        expected: the expected answer.
        score: 0 to 1.
        finish_reason: "stop", "length" or "tool_calls".
        stats: of the generation.
    """

    where: str
    text: str
    expected: str
    score: float
    finish_reason: str
    stats: Stats


@dataclass(frozen=True)
class ScoreSummary:
    """The scores of several answers.

    Attributes:
        right: sum of the scores; the number of right answers if each score is 0 or 1.
        of: number of answers.
        share: right / of.
        low, high: 95 % confidence interval of the share (Wilson).
        positions: positions denoised per answer, summed over steps.
        steps: denoising steps per answer.
    """

    right: float
    of: int
    share: float
    low: float
    high: float
    positions: float
    steps: float


@dataclass(frozen=True)
class Evaluation(ScoreSummary):
    """The result of `evaluate`.

    Attributes:
        seconds: duration for all answers.
        cut: number of answers that max_tokens cut short.
        groups: scores by the values of a field, sorted; empty if nothing is grouped.
        answers: in the order of the examples.
    """

    seconds: float
    cut: int
    groups: dict[str, ScoreSummary]
    answers: list[ScoredAnswer]


def evaluate(
    engine: Engine,
    examples: Sequence[Example],
    metric: str | Callable[[dict[str, Any], str], float] = "exact",
    batch_size: int = 8,
    seed: int = 0,
    by: str | None = None,
    watch: Callable[[ScoredAnswer], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Generate an answer for each example and score it.

    Args:
        engine: with the model.
        examples: from `tune.data.read`; the last answer of each is the expected one.
        metric: how answers are scored. "exact": the texts are equal except for surrounding whitespace. "contains": the
            answer contains the expected text. "regex": the expected text is a regular expression that matches the
            full answer. With these three, names and arguments of tool calls must be equal, too. Or a function, or its
            place as "path.py:function": it is called with the record and the answer's text, and returns a bool or a
            number from 0 to 1.
        batch_size: number of answers that are generated together.
        seed: of the first example; each further example uses the next one, so `generate` can repeat every answer.
        by: field of the records by which scores are grouped; None uses "task" if a record has it.
        watch: called with each answer when it is scored.
        options: `system`, `max_tokens`, `image_tokens` and all other options of `Engine.generate`, except the prompt,
            tools and thinking, which the data set.

    Raises:
        OptionError: an unknown metric, a function that does not exist, fails or returns another value, or an option
            outside its bounds.
        DataError: there are no examples, an example is a plain text, an expected text is not a regular expression or
            takes too many steps to match, or no record has the field `by`.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise OptionError(f"batch_size is {batch_size!r}; it should be a whole number, at least 1.")
    if not examples:
        raise DataError("There are no examples; give at least one.")
    score, names = scorer_of(metric, examples), _group_names(examples, by)
    started, scored = time.perf_counter(), {}
    for batch in _batches(examples, batch_size):
        first = examples[batch[0]]
        results = engine.generate_batch(
            [examples[i].chat[:-1] for i in batch],
            seeds=[seed + i for i in batch],
            thinking=first.thinking,
            tools=first.record.get("tools"),
            **options,
        )
        for i, result in zip(batch, results):
            one = examples[i]
            text = answer_text(result.text, result.tool_calls)
            expected = answer_text(text_of(one.chat[-1]), calls_of(one))
            scored[i] = ScoredAnswer(one.where, text, expected, score(one, result), result.finish_reason, result.stats)
            if watch:
                watch(scored[i])
    answers = [scored[i] for i in range(len(examples))]
    groups = {name: [answers[i] for i, own in enumerate(names) if own == name] for name in sorted(set(names))}
    return Evaluation(
        **vars(_summarize(answers)),
        seconds=time.perf_counter() - started,
        cut=sum(one.finish_reason == "length" for one in answers),
        groups={name: _summarize(members) for name, members in groups.items()},
        answers=answers,
    )


def wilson(right: float, of: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of the share right / of."""
    share, spread = right / of, Z * Z / of
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(max(share * (1 - share), 0) * spread + spread * spread / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _summarize(answers: list[ScoredAnswer]) -> ScoreSummary:
    of, right = len(answers), sum(one.score for one in answers)
    return ScoreSummary(
        right,
        of,
        right / of,
        *wilson(right, of),
        positions=sum(one.stats.canvas_positions for one in answers) / of,
        steps=sum(one.stats.denoising_steps for one in answers) / of,
    )


def _batches(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Yield the indices of examples that are answered together; they have the same tools and thinking."""

    def settings(i: int) -> str:
        return json.dumps([examples[i].thinking, examples[i].record.get("tools")], sort_keys=True)

    for _, group in groupby(sorted(range(len(examples)), key=settings), settings):
        indices = list(group)
        yield from (indices[at : at + size] for at in range(0, len(indices), size))


def _group_names(examples: Sequence[Example], by: str | None) -> list[str]:
    """The group of each example; empty if nothing is grouped.

    Raises:
        DataError: no record has the field `by`.
    """
    field = "task" if by is None else by
    if not any(field in example.record for example in examples):
        if by is None:
            return []
        raise DataError(f"No record has the field {by}; give a field that some records have.")
    values = [example.record.get(field) for example in examples]
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def calls_of(example: Example) -> list[dict]:
    """The tool calls of the expected answer."""
    return example.chat[-1].get("tool_calls") or []


def _names_and_arguments(calls: list[dict]) -> list[dict]:
    return [{key: call["function"][key] for key in ("name", "arguments")} for call in calls]


def answer_text(text: str, calls: list[dict]) -> str:
    """The text, and each tool call as a line of JSON."""
    lines = [text] if text or not calls else []
    return "\n".join([*lines, *(json.dumps(call, ensure_ascii=False) for call in _names_and_arguments(calls))])


def scorer_of(metric: Any, examples: Sequence[Example]) -> Scorer:
    """The function that scores an answer. The metric and all examples are checked here, before any answer is generated.

    Raises:
        OptionError, DataError: see `evaluate`.
    """
    for example in examples:
        if not example.chat:
            raise DataError(f"{example.where}: This is a plain text without a question; give a prompt or messages.")
        if metric == "regex":
            try:
                Pattern(text_of(example.chat[-1]))
            except PatternError as error:
                raise DataError(
                    f"{example.where}: The answer is not a regular expression ({error}); correct it."
                ) from None
    if callable(metric):
        return _user_scorer(metric, getattr(metric, "__name__", "The function"))
    compare = COMPARISONS.get(metric) if isinstance(metric, str) else None
    if compare is None:
        return _user_scorer(_load_function(metric), metric)

    def score(example: Example, result: Result) -> float:
        calls = _names_and_arguments(calls_of(example))
        same = _names_and_arguments(result.tool_calls) == calls or not (calls or metric == "exact")
        try:
            return float(same and compare(text_of(example.chat[-1]), result.text))
        except PatternError as error:
            raise DataError(f"{example.where}: The answer's regular expression cannot be used ({error}).") from None

    return score


def _load_function(metric: Any) -> Callable:
    """The function at "path.py:function".

    Raises:
        OptionError: there is no such function, or the file fails.
    """
    path, colon, name = metric.rpartition(":") if isinstance(metric, str) else ("", "", "")
    if not colon or not path.endswith(".py"):
        raise OptionError(f"metric is {metric!r}; it should be {', '.join(COMPARISONS)} or path.py:function.")
    if not Path(path).is_file():
        raise OptionError(f"{path} does not exist; metric should name a Python file and one of its functions.")
    spec = spec_from_file_location(f"metric_{Path(path).stem}", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look up their module here
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code can raise anything
        raise CircumstanceError(f"{path} cannot be run ({type(error).__name__}: {error}); correct it.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"{path} has no function {name}; metric should name one of its functions.")
    return function


def _user_scorer(function: Callable, name: str) -> Scorer:
    def score(example: Example, result: Result) -> float:
        try:
            value = function(example.record, answer_text(result.text, result.tool_calls))
        except Exception as error:  # user code can raise anything
            raise CircumstanceError(f"{name} failed at {example.where} ({type(error).__name__}: {error}).") from error
        if not hasattr(value, "__float__") or not 0 <= float(value) <= 1:
            raise CircumstanceError(
                f"{name} returned {value!r} at {example.where}; it should return true, false or a number from 0 to 1."
            )
        return float(value)

    return score
