"""Evaluation: metrics, results, errors and the command."""

import json
import math
import random
from dataclasses import dataclass, field, replace

import pytest
from chats import TOOL, user
from click.testing import CliRunner
from support import RED, engine_of, refusal, square

from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli import main
from mlx_dgemma.decoding.events import Result, Stats
from mlx_dgemma.errors import DataError, OptionError
from mlx_dgemma.tune.data import Example, read
from mlx_dgemma.tune.evaluate import evaluate, wilson

TOLD = "name", "arguments"  # of a call
SPELL = "Spell the word cat."
WEATHER = "What is the weather in Oslo?"


def call(city="Oslo", name="get_weather"):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": {"city": city}}}


def pair(prompt, completion, **keys):
    return {"prompt": prompt, "completion": completion, **keys}


def stats(steps=1):
    return Stats(5, 0, 3, 1, steps, 4 * steps, {"total": 1.0}, 0.5, 3.0, 100, 0)


@dataclass
class Scripted:
    """An engine that returns answers from a list, indexed by seed, and records the calls."""

    answers: list
    asked: list = field(default_factory=list)

    def generate_batch(self, prompts, *, seeds, **options):
        self.asked.append((prompts, seeds, options))
        return [self.answers[seed] for seed in seeds]


def result(text="", calls=(), reason="stop", steps=1):
    return Result(text, "", list(calls), [], reason, stats(steps))


def example(expected, calls=(), prompt="Hi", **record):
    answer = {"role": "assistant", "content": expected, **({"tool_calls": list(calls)} if calls else {})}
    return Example("test.jsonl, line 1", [], record, [user(prompt), answer], record.get("thinking", False))


def mark(metric, expected, answered, expected_calls=(), calls=()):
    engine = Scripted([result(answered, calls)])
    return evaluate(engine, [example(expected, expected_calls)], metric).right


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


@pytest.fixture
def write(tmp_path):
    def writer(*records, name="test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in records))
        return tmp_path / name

    return writer


# Metrics


@pytest.mark.parametrize(
    ("metric", "expected", "answered", "right"),
    [
        ("exact", "a b", " a b\n", 1),
        ("exact", " a b ", "a b", 1),
        ("exact", "a b", "a  b", 0),
        ("exact", "a", "A", 0),
        ("contains", "31", "She is 31.", 1),
        ("contains", " 31\n", "She is 31.", 1),
        ("contains", "She is 31.", "31", 0),
        ("regex", r"\d+( years)?", "31", 1),
        ("regex", r"\d+( years)?", "31 years", 1),
        ("regex", r"\d+( years)?", "31 years old", 0),
        ("regex", "a|ab", "ab", 1),
        ("regex", "(([a-z]+)+)+X", "a" * 60, 0),
    ],
)
def test_texts_that_are_right(metric, expected, answered, right):
    assert mark(metric, expected, answered) == right


@pytest.mark.parametrize("metric", ["exact", "contains", "regex"])
def test_tool_calls_are_compared_by_name_and_arguments(metric):
    ours = {**call(), "id": "call_0"}
    assert mark(metric, "", "", [call()], [ours]) == 1
    for other in ([], [call("Rome")], [call(name="get_rain")], [ours, ours]):
        assert mark(metric, "", "", [call()], other) == 0
    assert mark(metric, "a", "b", [call()], [ours]) == 0
    assert mark(metric, "a", "a", [], [ours]) == (metric != "exact")


def test_a_function_gets_the_record_and_the_text():
    seen = []
    engine = Scripted([result("Yes.", [call()]), result("No."), result("Maybe.")])
    examples = [example("Yes.", number=number) for number in range(3)]
    marks = {"Yes.": True, "No.": 0, "Maybe.": 0.25}
    outcome = evaluate(engine, examples, lambda record, text: seen.append((record, text)) or marks[text.split("\n")[0]])
    assert seen == [
        ({"number": 0}, 'Yes.\n{"name": "get_weather", "arguments": {"city": "Oslo"}}'),
        ({"number": 1}, "No."),
        ({"number": 2}, "Maybe."),
    ]
    assert [one.score for one in outcome.answers] == [1, 0, 0.25]
    assert (outcome.right, outcome.of, outcome.share) == (1.25, 3, 1.25 / 3)


def test_a_function_in_a_file(tmp_path):
    file = tmp_path / "marks.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    b: int = 1\n"
        "def near(record, text): return abs(float(text) - record['number']) < A().b\n"
    )
    engine = Scripted([result("3.5"), result("5")])
    outcome = evaluate(engine, [example("3", number=3), example("3", number=3)], f"{file}:near")
    assert [one.score for one in outcome.answers] == [1, 0]


# Results


def test_wilsons_interval():
    """The ends of the interval are the roots of (share - p)**2 = z**2 * p * (1 - p) / n."""
    drawn = random.Random(0)
    for _ in range(200):
        of = drawn.randint(1, 400)
        right = drawn.choice([0, of, drawn.randint(0, of), drawn.uniform(0, of)])
        low, high = wilson(right, of)
        assert 0 <= low <= right / of <= high + 1e-12 <= 1 + 1e-12
        for p in (low, high):
            assert math.isclose((right / of - p) ** 2, 1.959963984540054**2 * p * (1 - p) / of, abs_tol=1e-12)
    assert [round(one, 4) for one in wilson(8, 10)] == [0.4902, 0.9433]


def test_numbers_are_means_and_sums():
    answers = [result("a", steps=1), result("b", steps=2), result("a", reason="length", steps=6)]
    engine = Scripted(answers)
    outcome = evaluate(engine, [example("a", task=task) for task in ("x", "y", "y")])
    assert (outcome.right, outcome.of, outcome.share, outcome.cut) == (2, 3, 2 / 3, 1)
    assert (outcome.low, outcome.high) == wilson(2, 3)
    assert (outcome.steps, outcome.positions) == (3, 12)
    assert outcome.seconds > 0
    assert {name: (one.right, one.of, one.steps) for name, one in outcome.groups.items()} == {
        "x": (1, 1, 1),
        "y": (1, 2, 4),
    }
    assert [(one.where, one.text, one.expected, one.score) for one in outcome.answers] == [
        ("test.jsonl, line 1", text, "a", score) for text, score in (("a", 1), ("b", 0), ("a", 1))
    ]


def test_groups_are_by_a_field():
    examples = [example("a", task="x", size=1), example("a"), example("a", size="large")]
    engine = Scripted([result("a")] * 3)
    assert list(evaluate(engine, examples).groups) == ["null", "x"]
    assert list(evaluate(engine, examples, by="size").groups) == ["1", "large", "null"]
    assert evaluate(engine, examples[1:]).groups == {}
    assert refusal(DataError, evaluate, engine, examples, by="kind") == (
        "No record has the field kind; give a field that some records have."
    )


def test_seeds_do_not_depend_on_the_batches():
    """A batch has the same tools and thinking, so examples are answered out of order."""
    kinds = [{}, {"tools": [TOOL]}, {}, {"thinking": True}, {}, {"tools": [TOOL]}]
    examples = [example(str(i), prompt=f"{i}?", **kind) for i, kind in enumerate(kinds)]
    engine = Scripted([None] * 10 + [result(str(i)) for i in range(6)])
    heard = []
    outcome = evaluate(engine, examples, batch_size=2, seed=10, watch=heard.append, max_tokens=9)
    assert [one.score for one in outcome.answers] == [1] * 6
    assert sorted(heard, key=outcome.answers.index) == outcome.answers
    for prompts, seeds, options in engine.asked:
        numbers = [seed - 10 for seed in seeds]
        assert 1 <= len(prompts) <= 2
        assert prompts == [[user(f"{i}?")] for i in numbers]
        for i in numbers:
            settings = {"thinking": kinds[i].get("thinking", False), "tools": kinds[i].get("tools")}
            assert options == {**settings, "max_tokens": 9}
    assert sorted(seed for _, seeds, _ in engine.asked for seed in seeds) == list(range(10, 16))


def test_each_answer_can_be_repeated(engine, write, tmp_path):
    square(RED, half=35).save(tmp_path / "red.png")
    picture = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "What color is the shape?"}]
    records = [
        pair(SPELL, "c a t"),
        {"messages": [user(WEATHER), {"role": "assistant", "content": None, "tool_calls": [call()]}], "tools": [TOOL]},
        {"messages": [user(picture), {"role": "assistant", "content": "The square is blue."}]},
        pair("What is 25 + 31?", "no", thinking=True),
    ]
    examples = read(engine, write(*records))
    outcome = evaluate(engine, examples, seed=3)
    assert [one.score for one in outcome.answers] == [1, 1, 0, 0]
    assert outcome.answers[1].text == '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
    for i, (one, asked) in enumerate(zip(outcome.answers, examples)):
        alone = engine.generate(asked.chat[:-1], seed=3 + i, thinking=asked.thinking, tools=asked.record.get("tools"))
        assert one.text == (alone.text or json.dumps({key: alone.tool_calls[0]["function"][key] for key in TOLD}))
        assert one.stats.denoising_steps == alone.stats.denoising_steps
        assert alone.stats.prompt_tokens == len(asked.targets[0].prompt)


# Errors


def test_mistakes_are_refused_before_anything_is_generated(tmp_path):
    engine = Scripted([])
    examples = [example("a"), replace(example("(a"), where="test.jsonl, line 2")]
    file = tmp_path / "marks.py"
    file.write_text("number = 1\n")
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    for metric, message in (
        ("equal", "metric is 'equal'; it should be exact, contains, regex or path.py:function."),
        (None, "metric is None; it should be exact, contains, regex or path.py:function."),
        ("marks:near", "metric is 'marks:near'; it should be exact, contains, regex or path.py:function."),
        (
            f"{tmp_path}/none.py:near",
            f"{tmp_path}/none.py does not exist; metric should name a Python file and one of its functions.",
        ),
        (f"{file}:near", f"{file} has no function near; metric should name one of its functions."),
        (f"{file}:number", f"{file} has no function number; metric should name one of its functions."),
        (f"{broken}:near", f"{broken} cannot be run (ZeroDivisionError: division by zero); correct it."),
    ):
        assert refusal(OptionError, evaluate, engine, examples, metric) == message
    assert refusal(DataError, evaluate, engine, examples, "regex") == (
        "test.jsonl, line 2: The answer is not a regular expression (missing ), unterminated subpattern at position 0)"
        "; correct it."
    )
    assert refusal(DataError, evaluate, engine, [replace(examples[0], chat=[])]) == (
        "test.jsonl, line 1: This is a plain text without a question; give a prompt or messages."
    )
    assert refusal(DataError, evaluate, engine, []) == "There are no examples; give at least one."
    for size in (0, 1.5, True):
        assert refusal(OptionError, evaluate, engine, examples, batch_size=size) == (
            f"batch_size is {size!r}; it should be a whole number, at least 1."
        )


@pytest.mark.parametrize("value", [None, "yes", 2, -0.5, float("nan"), [1]])
def test_a_function_that_returns_something_else(value):
    def odd(record, text):
        return value

    assert refusal(OptionError, evaluate, Scripted([result("a")]), [example("a")], odd) == (
        f"odd returned {value!r} at test.jsonl, line 1; it should return true, false or a number from 0 to 1."
    )


def test_a_function_that_fails():
    def odd(record, text):
        return record["none"]

    assert refusal(OptionError, evaluate, Scripted([result("a")]), [example("a")], odd) == (
        "odd failed at test.jsonl, line 1 (KeyError: 'none')."
    )


# The command line


def run(*arguments):
    return CliRunner().invoke(main.main, ["evaluate", *map(str, arguments), "-m", str(DEMO)], prog_name="mlx-dgemma")


def test_the_command_prints_a_table(write, tmp_path):
    write(pair(SPELL, "c a t", task="spell"), pair(SPELL, "d o g", task="spell"), pair(SPELL, "c a t", task="a"))
    done = run(tmp_path, "--batch-size", 2)
    assert (done.exit_code, done.stderr) == (0, "")
    *rows, last = done.stdout.splitlines()
    assert rows == [
        "       right  of    share             95 %  positions  steps",
        "a          1   1  100.0 %  20.7 to 100.0 %         64    1.0",
        "spell      1   2   50.0 %    9.5 to 90.5 %         64    1.0",
        "all        2   3   66.7 %   20.8 to 93.9 %         64    1.0",
    ]
    assert last.startswith("3 answers in ")


def test_the_command_prints_json_and_writes_answers(write, tmp_path):
    path = write(pair(SPELL, "c a t"), pair(WEATHER, "sunny", tools=[TOOL]))
    output = tmp_path / "answers.jsonl"
    options = ["--seed", 7, "--max-denoising-steps", 3, "--max-tokens", 8]
    done = run(path, "--json", "--output", output, *options)
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert set(printed) == set("right of share low high positions steps seconds cut groups bound".split())
    assert (printed["right"], printed["of"], printed["share"], printed["groups"]) == (1, 2, 0.5, {})
    lines = {one["where"]: one for one in map(json.loads, output.read_text().splitlines())}
    assert [set(one) for one in lines.values()] == [set("where text expected score finish_reason stats".split())] * 2
    first = lines["test.jsonl, line 1"]
    assert (first["text"], first["expected"], first["score"]) == ("c a t", "c a t", 1)
    assert (first["stats"]["seed"], lines["test.jsonl, line 2"]["stats"]["seed"]) == (7, 8)
    again = run(path, "--output", output)
    assert (again.exit_code, again.stderr) == (1, f"Error: {output} exists already; give another name, or remove it.\n")
    assert len(output.read_text().splitlines()) == 2


def test_which_split_is_evaluated(write, tmp_path):
    write(pair(SPELL, "c a t"), name="valid.jsonl")
    assert "all      1   1" in run(tmp_path).stdout
    write(pair(SPELL, "d o g"), name="test.jsonl")
    assert "all      0   1" in run(tmp_path).stdout
    assert "all      1   1" in run(tmp_path, "--split", "valid").stdout
    done = run(tmp_path, "--split", "train")
    assert (done.exit_code, done.stderr) == (
        1,
        f"Error: {tmp_path} has no train.jsonl; data files are JSON Lines, one object per line.\n",
    )
    path = tmp_path / "test.jsonl"
    done = run(path, "--split", "test")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        f"Error: --split test names a file of a folder, but {path} is a file; leave it out."
    )


def test_no_output_file_remains_after_an_error(write, tmp_path):
    output = tmp_path / "answers.jsonl"
    done = run(write(pair(SPELL, "c a t")), "--metric", "equal", "--output", output)
    assert (done.exit_code, done.stderr.partition("\n\n")[2]) == (
        2,
        "Error: --metric is 'equal'; it should be exact, contains, regex or path.py:function.\n",
    )
    assert not output.exists()


def test_a_warning_counts_answers_that_were_cut(write):
    done = run(write(pair(SPELL, "c a t")), "--max-tokens", 2)
    assert done.stderr == "Warning: 1 answer reached the limit; --max-tokens N makes room for more.\n"
