"""mlx-vlm loads what we write, we load what it writes, and both compute the same logits.

Runs where mlx-vlm is installed. On a CPU every case below was equal bit for bit (mlx-vlm 0.7.10, mlx 0.32.4); the
bounds leave room for a GPU's other kernels.
"""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.rounding import run

vlm = pytest.importorskip("mlx_vlm.utils")

PROMPT = [2, 105, 7, 300, 412, 31, 1999, 64, 5, 17, 220, 871]
CANVAS = np.random.default_rng(0).integers(0, 2048, (1, 64))
BOUND = {"float32": 1e-4, "bfloat16": 0.2}  # logits reach 17, where bfloat16 steps by 0.125


def ours(path, dtype: str) -> mx.array:
    model = build(Checkpoint.open(path), dtype)
    prefix = model.new_prefix()
    model.encode(mx.array([PROMPT], mx.int32), prefix)
    return model.logits(model.denoise(mx.array(CANVAS, mx.int32), prefix))


def theirs(path, dtype: str) -> mx.array:
    model = vlm.load_model(path)
    if dtype == "float32":  # experts in another dtype have no kernel on the CPU
        model.update(tree_map(lambda a: a.astype(mx.float32) if a.dtype == mx.bfloat16 else a, model.parameters()))
    return model(mx.array([PROMPT], mx.int32), canvas_ids=mx.array(CANVAS, mx.int32)).logits.astype(mx.float32)


def assert_equal(path, dtype: str) -> None:
    a, b = ours(path, dtype), theirs(path, dtype)
    assert mx.abs(a).max().item() > 10
    assert mx.abs(a - b).max().item() < BOUND[dtype]


@pytest.mark.parametrize(
    "dtype, options",
    [
        ("float32", {}),
        ("float32", {"dtype": "float32"}),
        ("float32", {"dtype": "float32", "recipe": "4bit"}),
        ("float32", {"dtype": "float32", "recipe": "mxfp4"}),
        ("float32", {"dtype": "float32", "recipe": "nvfp4"}),
        ("bfloat16", {"recipe": "4bit"}),
        ("bfloat16", {"recipe": "mxfp4"}),
        ("bfloat16", {"recipe": "mxfp8"}),
    ],
)
def test_it_loads_what_we_write(hf_checkpoint, tmp_path, dtype, options):
    convert(hf_checkpoint, tmp_path / "out", **options)
    assert_equal(tmp_path / "out", dtype)


def test_it_loads_what_we_round(hf_checkpoint, tmp_path, monkeypatch):
    """Scales and biases are as exact as they are stored: float32 computes what they say."""
    monkeypatch.setattr(run, "STATES", 1)
    (tmp_path / "prompts.txt").write_text("Spell the word frog.\n")
    convert(hf_checkpoint, tmp_path / "out", "3bit", "float32", rounding="gptq", prompts=tmp_path / "prompts.txt")
    assert_equal(tmp_path / "out", "float32")


@pytest.mark.parametrize("share", [0.25, 0.33])  # 16 and 21 of 64 dimensions, of which 20 turn
def test_it_loads_what_we_write_from_what_transformers_saves(hf_checkpoint, tmp_path, share):
    shutil.copytree(hf_checkpoint, tmp_path / "source")
    raw = json.loads((tmp_path / "source" / "config.json").read_text())
    del raw["text_config"]["global_head_dim"], raw["text_config"]["num_global_key_value_heads"]
    raw["text_config"]["per_layer_config"] = {"5": {"head_dim": 64, "num_key_value_heads": 1}}
    raw["text_config"]["rope_parameters"]["full_attention"]["partial_rotary_factor"] = share
    (tmp_path / "source" / "config.json").write_text(json.dumps(raw))
    convert(tmp_path / "source", tmp_path / "out")
    assert_equal(tmp_path / "out", "float32")


@pytest.mark.parametrize(
    "dtype, options",
    [
        ("float32", {}),
        ("float32", {"dtype": "float32", "quantize": True}),
        ("float32", {"dtype": "float32", "quantize": True, "q_mode": "mxfp4", "q_group_size": 32}),
        ("bfloat16", {"quantize": True}),
        ("bfloat16", {"quantize": True, "q_mode": "nvfp4", "q_group_size": 16}),
    ],
)
def test_we_load_what_it_writes(hf_checkpoint, tmp_path, dtype, options):
    from mlx_vlm.convert import convert as vlm_convert

    vlm_convert(str(hf_checkpoint), str(tmp_path / "out"), **options)
    assert_equal(tmp_path / "out", dtype)
    report = convert(tmp_path / "out", tmp_path / "copy")
    assert report.unchanged
    assert_equal(tmp_path / "copy", dtype)


def test_it_finds_tokenizer_and_processor(hf_checkpoint, tmp_path):
    convert(hf_checkpoint, tmp_path / "out", "4bit")
    _, processor = vlm.load(str(tmp_path / "out"))
    assert processor.tokenizer.decode(processor.tokenizer.encode("a fox", add_special_tokens=False)) == "a fox"
    assert processor.chat_template or processor.tokenizer.chat_template
