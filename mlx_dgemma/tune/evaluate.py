"""Mark a model's answers on data whose last answers are the expected ones."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decoding.events import Result, Stats
from ..errors import DataError, OptionError
from .data import Example, said

if TYPE_CHECKING:
    from ..engine import Engine


Z = 1.959963984540054  # deviations of a normal distribution that hold 95 % of it
COMPARISONS: dict[str, Callable[[str, str], bool]] = {  # of the expected text and the answer's
    "exact": lambda expected, text: text.strip() == expected.strip(),
    "contains": lambda expected, text: expected.strip() in text,
    "regex": lambda expected, text: re.fullmatch(expected, text) is not None,
}
Mark = Callable[[Example, Result], float]


@dataclass(frozen=True)
class Marked:
    """An answer and its mark. Tool calls stand in text and expected as JSON, one a line behind the text.

    Attributes:
        where: place of the example, such as "test.jsonl, line 3".
        text: what was answered, thinking left out.
        expected: the answer that the data have.
        score: 0 to 1.
        finish_reason: "stop", "length" or "tool_calls".
        stats: what the answer took.
    """

    where: str
    text: str
    expected: str
    score: float
    finish_reason: str
    stats: Stats


@dataclass(frozen=True)
class Score:
    """Marks of some answers.

    Attributes:
        right: their sum, a whole number where each is 0 or 1.
        of: how many answers there are.
        share: right / of.
        low, high: Wilson's interval of the share, 95 %.
        positions: positions denoised an answer, summed over its steps.
        steps: denoising steps an answer.
    """

    right: float
    of: int
    share: float
    low: float
    high: float
    positions: float
    steps: float


@dataclass(frozen=True)
class Evaluation(Score):
    """What `evaluate` found.

    Attributes:
        seconds: of all answers together.
        cut: answers that max_tokens cut short.
        groups: scores by the values of a field, in their order; empty without one.
        answers: in the order of the examples.
    """

    seconds: float
    cut: int
    groups: dict[str, Score]
    answers: list[Marked]


def evaluate(
    engine: Engine,
    examples: Sequence[Example],
    metric: str | Callable[[dict[str, Any], str], float] = "exact",
    batch_size: int = 8,
    seed: int = 0,
    by: str | None = None,
    watch: Callable[[Marked], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Let an engine answer what the examples ask, and mark the answers.

    Args:
        engine: who answers.
        examples: from `tune.data.read`; the last answer of each is the expected one.
        metric: "exact", the texts are equal but for space around them; "contains", the expected text is in the answer;
            "regex", the expected text is a regular expression that the whole answer matches; a function, or the
            "path.py:function" where it stands, that is called with the record and the answer's text and returns a
            truth or a number from 0 to 1. Of the first three, tool calls must be equal too, names and arguments.
        batch_size: answers generated together.
        seed: of the first example; each further one has the next, so that `generate` can repeat any of them.
        by: field of the records that the scores are grouped by; without one it is "task" where a record has that.
        watch: is told each answer as it is marked.
        options: `system`, `max_tokens`, `image_tokens` and whatever else `Engine.generate` takes but the prompt,
            tools and thinking, which the data set.

    Raises:
        OptionError: an unknown metric, a function that is not there, fails or returns something else, or an option
            outside its bounds.
        DataError: there are no examples, one is a plain text, an expected text is no regular expression, or no
            record has the field `by`.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise OptionError(f"batch_size is {batch_size!r}; it should be a whole number, at least 1.")
    if not examples:
        raise DataError("There are no examples to mark; give at least one.")
    mark, names = _mark(metric, examples), _groups(examples, by)
    started, found = time.perf_counter(), {}
    for batch in _batches(examples, batch_size):
        alike = examples[batch[0]]
        results = engine.generate_batch(
            [examples[i].chat[:-1] for i in batch],
            seeds=[seed + i for i in batch],
            thinking=alike.thinking,
            tools=alike.record.get("tools"),
            **options,
        )
        for i, result in zip(batch, results):
            one = examples[i]
            text, expected = _shown(result.text, result.tool_calls), _shown(said(one.chat[-1]), _calls(one))
            found[i] = Marked(one.where, text, expected, mark(one, result), result.finish_reason, result.stats)
            if watch:
                watch(found[i])
    answers = [found[i] for i in range(len(examples))]
    groups = {name: [answers[i] for i, own in enumerate(names) if own == name] for name in sorted(set(names))}
    return Evaluation(
        **vars(_score(answers)),
        seconds=time.perf_counter() - started,
        cut=sum(one.finish_reason == "length" for one in answers),
        groups={name: _score(some) for name, some in groups.items()},
        answers=answers,
    )


def wilson(right: float, of: int) -> tuple[float, float]:
    """Wilson's interval of a share, 95 %."""
    share, spread = right / of, Z * Z / of
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(max(share * (1 - share), 0) * spread + spread * spread / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _score(answers: list[Marked]) -> Score:
    of, right = len(answers), sum(one.score for one in answers)
    return Score(
        right,
        of,
        right / of,
        *wilson(right, of),
        positions=sum(one.stats.canvas_positions for one in answers) / of,
        steps=sum(one.stats.denoising_steps for one in answers) / of,
    )


def _batches(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Numbers of examples that are answered together: their tools and thinking are alike."""

    def setting(i: int) -> str:
        return json.dumps([examples[i].thinking, examples[i].record.get("tools")], sort_keys=True)

    for _, run in groupby(sorted(range(len(examples)), key=setting), setting):
        alike = list(run)
        yield from (alike[at : at + size] for at in range(0, len(alike), size))


def _groups(examples: Sequence[Example], by: str | None) -> list[str]:
    """The group of each example; none at all where there is no field."""
    field = "task" if by is None else by
    if not any(field in example.record for example in examples):
        if by is None:
            return []
        raise DataError(f"No record has the field {by}; name one that some have.")
    values = [example.record.get(field) for example in examples]
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def _calls(example: Example) -> list[dict]:
    return example.chat[-1].get("tool_calls") or []


def _plain(calls: list[dict]) -> list[dict]:
    return [{key: call["function"][key] for key in ("name", "arguments")} for call in calls]


def _shown(text: str, calls: list[dict]) -> str:
    return "\n".join(
        [*([text] if text or not calls else []), *(json.dumps(c, ensure_ascii=False) for c in _plain(calls))]
    )


def _mark(metric: Any, examples: Sequence[Example]) -> Mark:
    """How answers are marked; what is wrong with the metric or the examples is told before any is generated."""
    for example in examples:
        if not example.chat:
            raise DataError(f"{example.where}: This is a plain text, which asks nothing; give a prompt or messages.")
        if metric == "regex":
            try:
                re.compile(said(example.chat[-1]))
            except (re.error, OverflowError) as error:
                raise DataError(f"{example.where}: The answer is no regular expression ({error}); mend it.") from None
    if callable(metric):
        return _by_function(metric, getattr(metric, "__name__", "The function"))
    compare = COMPARISONS.get(metric) if isinstance(metric, str) else None
    if compare is None:
        return _by_function(_function(metric), metric)

    def mark(example: Example, result: Result) -> float:
        calls = _plain(_calls(example))
        same = _plain(result.tool_calls) == calls or not (calls or metric == "exact")
        return float(same and compare(said(example.chat[-1]), result.text))

    return mark


def _function(metric: Any) -> Callable:
    """The function that a "path.py:function" names."""
    path, colon, name = metric.rpartition(":") if isinstance(metric, str) else ("", "", "")
    if not colon or not path.endswith(".py"):
        raise OptionError(f"metric is {metric!r}; it should be {', '.join(COMPARISONS)} or path.py:function.")
    if not Path(path).is_file():
        raise OptionError(f"{path} does not exist; metric should name a Python file and one of its functions.")
    spec = spec_from_file_location(f"metric_{Path(path).stem}", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is anybody's code
        raise OptionError(f"{path} cannot be run ({type(error).__name__}: {error}); mend it.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"{path} has no function {name}; metric should name one of its functions.")
    return function


def _by_function(function: Callable, name: str) -> Mark:
    def mark(example: Example, result: Result) -> float:
        try:
            value = function(example.record, _shown(result.text, result.tool_calls))
        except Exception as error:  # it is anybody's code
            raise OptionError(f"{name} failed at {example.where} ({type(error).__name__}: {error}).") from error
        if not hasattr(value, "__float__") or not 0 <= float(value) <= 1:
            raise OptionError(
                f"{name} returned {value!r} at {example.where}; it should return true, false or a number from 0 to 1."
            )
        return float(value)

    return mark
