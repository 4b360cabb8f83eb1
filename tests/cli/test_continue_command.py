"""`mlx-dgemma continue`: what is added, to where, and in which mode."""

import json

import pytest
from commands import run

BEGUN, ADDED = "def add(left, right):\n    return ", "left + right"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "add.py"
    path.write_text(BEGUN)
    return path


def test_a_text_goes_on_token_by_token(file, tmp_path):
    assert run("continue", file, "--seed", 0, "--temperature", 0).stdout == ADDED
    assert run("continue", "--seed", 0, "--whole", data=BEGUN.encode()).stdout == BEGUN + ADDED
    told = json.loads(run("continue", file, "--seed", 0, "--json", "--whole").stdout)
    assert (told["text"], told["whole"], told["stats"]["mode"]) == (ADDED, BEGUN + ADDED, "causal")
    whole = tmp_path / "whole.py"
    assert run("continue", file, "--seed", 0, "--whole", "--output", whole).stdout == ""
    assert (whole.read_text(), file.read_text()) == (BEGUN + ADDED, BEGUN)


@pytest.mark.parametrize(
    "options, mode", [(["--mode", "speculative"], "speculative"), (["--patience", 2], "diffusion")]
)
def test_another_mode_is_taken_where_it_or_its_options_are_given(file, options, mode):
    told = json.loads(run("continue", file, "--seed", 0, "--json", *options).stdout)
    assert (told["text"], told["stats"]["mode"]) == (ADDED, mode)
