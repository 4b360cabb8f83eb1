"""`mlx-dgemma choose` on the demo."""

import json

import pytest
from click.testing import CliRunner
from support import RED, engine_of, square

from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli import main

LARGER, COLOR = "Which is larger, 51 or 23?", "What color is the shape?"
JSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
FORM = '{{"name": "Anna", "age": {age}, "city": "{city}"}}'


@pytest.fixture(scope="module")
def engine():
    return engine_of(DEMO)


# The command


def run(*arguments, data=b""):
    return CliRunner().invoke(main.main, ["choose", *map(str, arguments)], input=data)


@pytest.fixture
def loaded(engine, monkeypatch):
    monkeypatch.setattr("mlx_dgemma.cli.common.ModelChoice.load", lambda *_: engine)


@pytest.mark.usefixtures("loaded")
def test_a_label_a_line_the_most_probable_first(engine):
    found = engine.choose(LARGER, ["23", "51"])
    done = run(LARGER, 23, 51)
    assert (done.exit_code, done.stdout) == (0, f"51\t{found['51']:.4f}\n23\t{found['23']:.4f}\n")
    assert run("-", 23, 51, data=LARGER.encode()).stdout == done.stdout
    verbose = run(LARGER, 23, 51, "-v", "--calibrate").stderr
    assert verbose.startswith("23 prompt tokens, ")


@pytest.mark.usefixtures("loaded")
def test_ranges_bool_and_questions_on_the_command_line(tmp_path):
    assert run(JSON, "--range", 30, 32).stdout.splitlines()[0].split("\t")[0] == "31"
    done = run(LARGER, "--bool")
    assert {line.split("\t")[0] for line in done.stdout.splitlines()} == {"true", "false"}
    assert done.stderr.startswith("Warning: The model answers with none of the labels (0.0%); give an answer template")
    asked = ("--ask", "age=30,31", "--ask", "city=Rome, Oslo")
    lines = run(JSON, *asked, "--answer", FORM).stdout.splitlines()
    assert [line.rsplit("\t", 1)[0] for line in lines] == ["age\t31", "age\t30", "city\tOslo", "city\tRome"]
    square(RED).save(tmp_path / "red.png")
    assert run(COLOR, "red", "blue", "--image", tmp_path / "red.png").stdout.startswith("red\t")


@pytest.mark.usefixtures("loaded")
def test_one_json_object(engine):
    done = json.loads(run(LARGER, 51, 23, "--json", "--seed", 2).stdout)
    assert done["probabilities"] == engine.choose(LARGER, ["51", "23"], seed=2)
    assert list(done["stats"]) == [
        "named", "prompt_tokens", "canvases", "images", "seconds", "peak_memory_bytes", "seed",
    ]  # fmt: skip
    assert (done["stats"]["prompt_tokens"], done["stats"]["seed"]) == (23, 2)


WAYS = "Give the labels in one way: as arguments, with --range, with --bool or with --ask."


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["x"], 2, WAYS),
        (["x", "a", "--bool"], 2, WAYS),
        (["x", "--range", 3, 1], 2, "--range is 3 1; give the lower number first."),
        (["x", "--ask", "color"], 2, "--ask color has no labels; write NAME=label,label."),
        (["x", "--ask", "c=a", "--ask", "c=b"], 2, "--ask c is given twice; join its labels."),
        (["-", "a", "-f", "-"], 2, "- is given twice, but stdin can be read once."),
        (["x", "a", ""], 2, "Label 1 is ''; it should be a text that is not empty."),
        (["x", "a", "c", "--answer", "b"], 2, "--answer 'b' has 0 slots {}; give it one."),
        ([" ", "a"], 1, "The prompt is empty; say what you want."),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_mistakes_on_the_command_line(arguments, code, message):
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1] == f"Error: {message}"
