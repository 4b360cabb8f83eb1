"""`mlx-dgemma shortcut` and the AppleScript library, the latter as text alone: no Mac was at hand."""

import json
import re

import pytest
from click.testing import CliRunner

from mlx_dgemma.cli.commands import desktop
from mlx_dgemma.cli.main import main
from mlx_dgemma.desktop import applescript
from mlx_dgemma.desktop.requests import Asked, read_answer, read_request
from mlx_dgemma.errors import DgemmaError


def shortcut(request):
    """(what was printed as JSON, stderr)."""
    data = request if isinstance(request, bytes) else json.dumps(request).encode()
    done = CliRunner().invoke(main, ["shortcut"], input=data, env={"MLX_DGEMMA_MODEL": None})
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_json_in_and_json_out():
    edit = {
        "action": "edit",
        "text": "The cat saw a cat in the barn.",
        "instruction": "Replace cat with dog",
        "seed": 0,
    }
    assert shortcut(edit) == {"text": "The dog saw a dog in the barn.", "error": None}
    assert shortcut({"action": "generate", "instruction": "Spell the word frog.", "seed": 0, "text": None}) == {
        "text": "f r o g",
        "error": None,
    }


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (b"{", "The request is not JSON ("),
        (b"\xff", "The request is not JSON ("),
        (b"[" * 10**5, "The request is not JSON ("),
        (
            {"action": "generate", "text": "\ud83e"},
            "text has half of a surrogate pair, which is no character, in '\\ud83e'",
        ),
        ({"action": "generate", "text": "x", "files": ["\udfff"]}, "files has half of a surrogate pair"),
        ({"action": "generate", "text": "x", "images": ["a\0.png"]}, "images is 'a\\x00.png', which has a zero byte;"),
        ({"action": "generate", "text": "x", "files": ["-"]}, "Invalid value for '-f' / '--file': File './-' does not"),
        ([], "The request is []; it should be an object"),
        ({}, "action is None; it should be one of edit, generate."),
        ({"action": "edit", "text": " ", "instruction": "x"}, "There is no text to edit;"),
        ({"action": "edit", "text": "x"}, "There is no instruction;"),
        ({"action": "generate"}, "There is no prompt;"),
        ({"action": "generate", "txt": "x"}, "The request has the field 'txt'; it should be one of action"),
        ({"action": "generate", "text": 3}, "text is 3; it should be text."),
        ({"action": "generate", "text": "x", "images": "a.png"}, "images is 'a.png'; it should be a list of paths."),
        ({"action": "generate", "text": "x", "seed": 1.5}, "seed is 1.5; it should be a whole number."),
        ({"action": "generate", "text": "x", "seed": -1}, "Invalid value for '--seed'"),
        ({"action": "generate", "text": "x", "images": ["/no.png"]}, "Invalid value for '--image'"),
        ({"action": "generate", "text": "x", "model": "/no/model"}, "/no/model does not exist;"),
    ],
)
def test_a_mistake_is_told_in_the_json(request_, said):
    answer = shortcut(request_)
    assert answer["text"] is None
    assert answer["error"].startswith(said)


def test_words_of_the_command_line(tmp_path):
    request = {
        "action": "generate",
        "text": "t",
        "instruction": "-x",
        "images": ["a"],
        "files": ["b.txt", "c.PNG"],
        "seed": 7,
    }
    asked = read_request(json.dumps(request).encode())
    words = "generate --json --seed 7 --image a --file b.txt --image c.PNG --file".split()
    assert asked.arguments(tmp_path / "f") == [*words, f"{tmp_path}/f", "--", "-x"]
    assert Asked("edit", "t", "-i").arguments(tmp_path / "f") == ["edit", "--json", "--", "-i", f"{tmp_path}/f"]


@pytest.mark.parametrize(
    ("action", "text", "reason"), [("edit", "cut", "length"), ("edit", " \n", "stop"), ("generate", "x", "interrupted")]
)
def test_an_answer_that_is_not_whole_is_none(action, text, reason):
    with pytest.raises(DgemmaError):
        read_answer(action, json.dumps({"text": text, "finish_reason": reason}))
    assert read_answer("generate", json.dumps({"text": "cut", "finish_reason": "length"})) == "cut"


def test_the_command_of_the_workflows_fails_with_one_sentence(monkeypatch):
    done = CliRunner().invoke(main, ["quick-actions", "run", "--verb", "edit", "--instruction", "x"], input=b"")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "Error: There is no text to edit; select some, or give it as text.\n"
    asked = []
    monkeypatch.setattr(desktop, "_ask", lambda one: asked.append(one) or "new")
    given = ["--verb", "generate", "--instruction", "Why?", "--model", "/m", "--", "-a.png"]
    done = CliRunner().invoke(main, ["quick-actions", "run", *given], input=b"not read")
    assert (done.exit_code, done.stdout) == (0, "new")
    assert asked == [Asked("generate", "", "Why?", ("-a.png",), (("--model", "/m"),))]


def test_the_applescript_library_closes_what_it_opens_and_quotes_the_command():
    text = applescript.library(["/a b/python", "-m", 'x"y\\z'], "/my model")
    assert "property program : \"MLX_DGEMMA_MODEL='/my model' '/a b/python' -m 'x\\\"y\\\\z'\"" in text
    opened = re.findall(r"^on (\w+)", text, re.MULTILINE)
    assert opened == ["generate", "edit", "editSelection", "clipboardText", "answered"]
    assert opened == re.findall(r"^end (\w+)", text, re.MULTILINE)
    assert len(re.findall(r"^\ttry$", text, re.MULTILINE)) == len(re.findall(r"^\tend try$", text, re.MULTILINE)) == 2
    assert text.count("quoted form of") == 2
    assert text.isascii()
    done = CliRunner().invoke(main, ["quick-actions", "applescript"], env={"MLX_DGEMMA_MODEL": None})
    assert "on editSelection(instruction)" in done.stdout
