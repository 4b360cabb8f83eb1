"""How deep the call stack is from a public verb to attention: what a reader of a traceback has to go through."""

import traceback
from pathlib import Path

import pytest
from support import engine_of

import mlx_dgemma
from mlx_dgemma.model import attention

PACKAGE = str(Path(mlx_dgemma.__file__).parent)


@pytest.mark.parametrize(
    "mode",
    [{}, {"fast": True}, {"exact": True}, {"regex": "[a-z]+"}, {"mode": "causal"}, {"mode": "speculative"}],
)
def test_ten_frames_lead_from_stream_to_attention(demo, monkeypatch, mode):
    stacks = []

    def attend(*arguments):
        stacks.append([frame.name for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)])
        raise InterruptedError

    engine = engine_of(demo)
    monkeypatch.setattr(attention, "attend", attend)
    with pytest.raises(InterruptedError):  # in the prompt
        list(engine.stream("Hi", seed=0, **mode))
    monkeypatch.undo()
    name = "encode_ahead" if mode == {"mode": "causal"} else "denoise"
    denoise = getattr(type(engine.model), name)

    def denoised(*arguments):
        monkeypatch.setattr(attention, "attend", attend)
        return denoise(*arguments)

    monkeypatch.setattr(type(engine.model), name, denoised)
    with pytest.raises(InterruptedError):  # in a canvas
        list(engine.stream("Hi", seed=0, **mode))
    prompt, canvas = stacks
    assert (prompt[0], prompt[-1]) == (canvas[0], canvas[-1]) == ("run", "__call__")
    assert "encode" in prompt and "denoised" not in prompt  # the stand-in lies in this file
    assert name in canvas
    assert max(len(prompt), len(canvas)) + 1 <= 10  # and the frame of `attend` itself
