"""Which tokens end an answer, whatever a checkpoint's files say."""

import json

import pytest

import mlx_dgemma
from mlx_dgemma.checkpoint.find import DEMO

EOS, HAND_OFF, TURN_END = 1, 9, 16
TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("generation", "ends"),
    [
        (None, (EOS, TURN_END)),
        ({}, (EOS, TURN_END)),
        ({"eos_token_id": 1}, (EOS, TURN_END)),
        ({"eos_token_id": [16, 1, 9]}, (TURN_END, EOS, HAND_OFF)),
        ({"eos_token_id": [1, 262143]}, (EOS, TURN_END)),
    ],
    ids=str,
)
def test_the_turns_end_always_ends_and_with_tools_the_hand_off(tmp_path, generation, ends):
    for file in DEMO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    engine = mlx_dgemma.load(tmp_path)
    assert engine.options.end_tokens == ends
    assert engine.prepare("x").reader.end_tokens == ends
    with_tools = engine.prepare("x", tools=TOOLS)
    assert with_tools.reader.end_tokens == with_tools.options.end_tokens
    assert set(with_tools.reader.end_tokens) == {*ends, HAND_OFF}
    assert engine.prepare("x", tools=TOOLS, end_tokens=[1]).reader.end_tokens == (1,)  # what the user says counts
    outside = "The checkpoint's eos_token_id has 262143, but the vocabulary has 2048 tokens; it is left out."
    assert (outside in engine.notes) == (generation == {"eos_token_id": [1, 262143]})
    assert any("lacks <turn|>" in note for note in engine.notes) == (bool(generation) and TURN_END not in {*ends[:1]})
