"""What the model cannot see of a file comes back: marks, line endings, blanks."""

import random

import pytest
from prompts import ONCE

from mlx_dgemma.tasks.lines import FileText

FILES = {
    "a mark and Windows' endings": "\ufeffone cat\r\ntwo cats\r\n\r\nthree\r\n",
    "endings of every kind": "one cat\r\ntwo cats\nthree cats\rfour\n\r\nfive",
    "blanks at the ends": "one cat  \n\ttwo cats\t\n   \nthree \n",
    "no last newline": "one cat\ntwo cats",
    "several last newlines": "one cat\r\ntwo cats \r\n\r\n \r\n",
    "a tokenizer's blank": "one▁cat\ntwo▁dogs\n",
    "one line": "one cat",
    "form feeds": "one cat\x0c\ntwo\u2028cats\n",
}


def as_seen(text):
    """What a model gives back of a text that it changes nothing in."""
    lines = FileText(text).plain.replace("▁", " ").rstrip().split("\n")
    return "\n".join(line.rstrip() for line in lines)


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_a_text_in_which_nothing_was_changed_is_the_same(text):
    file = FileText(text)
    assert not {"\r", "\ufeff"} & set(file.plain)
    assert file.restored(as_seen(text)) == text
    assert file.restored(file.plain.rstrip()) == text


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_only_the_change_differs(text):
    for old, new in (("cat", "dog"), ("one", "eleven")):
        assert FileText(text).restored(as_seen(text).replace(old, new)).replace("▁", " ") == text.replace(
            old, new
        ).replace("▁", " ")


def test_lines_that_come_and_go():
    file = FileText("a\r\nb \r\nc\nd\r\n")
    assert file.restored("a\nc\nd") == "a\r\nc\nd\r\n"
    assert file.restored("a\nb\nx\ny\nc\nd") == "a\r\nb \r\nx\r\ny\r\nc\nd\r\n"
    assert file.restored("a\nb\nc\nd\ne") == "a\r\nb \r\nc\nd\r\ne\r\n"
    assert file.restored("x\na\nb\nc\nd") == "x\r\na\r\nb \r\nc\nd\r\n"
    assert file.restored("a\nb  \nc\nd") == "a\r\nb  \r\nc\nd\r\n"  # blanks that the model wrote
    assert file.restored("a\nb\nc", whole=False) == "a\r\nb \r\nc"
    assert FileText("a\nb").restored("a\r\nb\r\nc") == "a\nb\nc"
    assert FileText("a").restored("") == ""


def test_one_changed_line_of_many_changes_no_other():
    chance = random.Random(3)
    ends, blanks = ["\n", "\r\n", "\r"], ["", "", "  ", "\t"]
    for _ in range(100):
        lines = [f"{chance.choice('abc ')}{chance.choice('xyz')}" for _ in range(chance.randint(1, 12))]
        raw = [line + chance.choice(blanks) + chance.choice(ends) for line in lines]
        raw = [line.replace("\r", "\n") if line.endswith("\r") else line for line in raw]
        at = chance.randrange(len(raw))
        changed = [*lines[:at], "changed", *lines[at + 1 :]]
        expected = [*raw[:at], "changed" + raw[at][len(lines[at]) :], *raw[at + 1 :]]
        assert FileText("".join(raw)).restored("\n".join(changed)) == "".join(expected)


def test_an_edited_file_keeps_its_form(engine):
    text = "\ufeffThe cat saw a cat in the barn.  \r\n\r\n"
    result = engine.edit(text, "Replace cat with dog", seed=0)
    assert result.text == text.replace("cat", "dog")
    cut = engine.edit(text, "Replace cat with dog", seed=0, max_tokens=3, **ONCE)
    assert cut.finish_reason == "length" and cut.text.startswith("\ufeff") and not cut.text.endswith("\n")
