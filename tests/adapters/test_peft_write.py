"""Adapters written in PEFT's layout: they are read back as they were."""

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest
from peft_files import (
    DOWN,
    EXPERTS_DOWN,
    GATE,
    GATE_UP,
    SIGHT,
    THEIRS,
    A,
    B,
    Q,
    delta,
    same,
)
from support import DATA, refusal

from mlx_dgemma.adapters import peft
from mlx_dgemma.adapters.deltas import Adapter, Delta
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.errors import CheckpointError

SAVED = ["peft_patterns", "peft_dora", "peft_experts"]


@pytest.fixture(scope="module")
def shapes():
    return Checkpoint.open(DEMO).shapes


def adapters(shapes) -> dict[str, Adapter]:
    def some(*paths: str, seed: int = 0, **kind) -> dict[str, Delta]:
        return {path: delta(shapes, path, seed=seed, **kind) for path in paths}

    shared = some(Q, DOWN)
    ranks = {Q: delta(shapes, Q, 1, 0.7), DOWN: delta(shapes, DOWN, 3, 5 / 3), GATE: delta(shapes, GATE, 7, 2**-0.5)}
    return {
        "shared": Adapter(shared, shared),
        "one mode": Adapter({}, some(Q)),
        "a delta for each mode": Adapter(some(Q, DOWN), some(Q, GATE, seed=1)),
        "ranks and factors": Adapter(some(Q, DOWN, rank=3, scale=1 / 3), ranks),
        "DoRA": Adapter(some(Q, dora=True), some(Q, GATE, seed=1, dora=True)),
        "experts": Adapter(some(GATE_UP, EXPERTS_DOWN), some(Q, GATE_UP, EXPERTS_DOWN, rank=3, seed=1)),
        "one parameter of experts": Adapter(some(GATE_UP), some(EXPERTS_DOWN)),
        "vision": Adapter(some(SIGHT, "model.encoder.embed_vision.embedding_projection"), some(Q)),
    }


def test_a_written_adapter_is_read_back_unchanged(tmp_path, shapes):
    for name, adapter in adapters(shapes).items():
        peft.write(adapter, tmp_path / "new" / name, "a/b")
        found = peft.read(tmp_path / "new" / name, shapes)
        assert same(found.encode, adapter.encode), name
        assert same(found.denoise, adapter.denoise), name


@pytest.mark.parametrize("name", SAVED)
def test_an_adapter_of_peft_is_written_again_without_loss(name, tmp_path, shapes):
    adapter = peft.read(DATA / name, shapes)
    peft.write(adapter, tmp_path, "a/b")
    found = peft.read(tmp_path, shapes)
    assert same(found.encode, adapter.encode)
    assert same(found.denoise, adapter.denoise)


def test_scales_survive():
    """alpha / rank survives exactly, alpha / sqrt(rank) up to the last bit; whole numbers stay whole."""
    for rank in range(1, 70):
        for alpha in (*range(1, 70), 128, 256):
            assert peft._alpha(alpha / rank, rank) == alpha
            scale = alpha / math.sqrt(rank)
            assert peft._alpha(scale, rank) / rank == pytest.approx(scale, rel=3e-16, abs=0)


def test_the_configuration_only_names_changed_modules(tmp_path, shapes):
    examples = adapters(shapes)
    encode = {**examples["ranks and factors"].encode, SIGHT: delta(shapes, SIGHT, 3, 1 / 3)}
    peft.write(Adapter(encode, {GATE_UP: delta(shapes, GATE_UP, 3, 0.5)}), tmp_path, "google/diffusiongemma-26B-A4B-it")
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "google/diffusiongemma-26B-A4B-it",
        "inference_mode": True,
        "bias": "none",
        "use_dora": False,
        "r": 3,
        "lora_alpha": 1,
        "rank_pattern": {},
        "alpha_pattern": {r"model\.decoder\.layers\.2\.experts\.gate_up_proj": 1.5},
        "target_modules": [
            "model.encoder.language_model.layers.0.self_attn.q_proj",
            "model.encoder.language_model.layers.1.mlp.down_proj",
            SIGHT,
        ],
        "target_parameters": [GATE_UP],
    }
    keys = mx.load(str(tmp_path / "adapter_model.safetensors")).keys()
    assert f"{THEIRS}.decoder.layers.2.experts.{A}" in keys
    assert len(keys) == 8
    peft.write(examples["experts"], tmp_path, "a/b")
    loaded = mx.load(str(tmp_path / "adapter_model.safetensors"))
    experts = f"{THEIRS}.encoder.language_model.layers.2.experts"
    assert loaded[f"{experts}.base_layer.{A}"].shape == (8 * 2, 192)
    assert loaded[f"{experts}.{B}"].shape == (192, 8 * 2)


def test_an_adapter_is_replaced_completely_or_not_at_all(tmp_path, shapes, monkeypatch):
    examples = adapters(shapes)
    peft.write(examples["DoRA"], tmp_path, "a/b")
    peft.write(examples["one mode"], tmp_path, "a/b")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(file, *_):
        Path(file).write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(RuntimeError):
        peft.write(examples["shared"], tmp_path, "a/b")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_adapters_that_do_not_fit_pefts_layout_are_refused(tmp_path, shapes):
    def refused(encode: dict[str, Delta], denoise: dict[str, Delta]) -> str:
        message = refusal(CheckpointError, peft.write, Adapter(encode, denoise), tmp_path / "new", "a/b")
        assert not (tmp_path / "new").exists()
        return message

    plain, dora = delta(shapes, Q), delta(shapes, Q, dora=True)
    assert refused({}, {}) == "The adapter changes nothing, so there is nothing to write."
    assert refused({Q: plain}, {Q: dora}) == (
        f"{Q} has a magnitude and model.encoder.language_model.layers.0.self_attn.q_proj has none; "
        "PEFT applies DoRA to all linear layers of an adapter and never to experts."
    )
    assert refused({Q: dora}, {GATE_UP: delta(shapes, GATE_UP, dora=True)}) == (
        f"{GATE_UP} has a magnitude and belongs to experts; "
        "PEFT applies DoRA to all linear layers of an adapter and never to experts."
    )
    for path, mode in ((GATE, "encode"), (SIGHT, "denoise"), ("model.decoder.embed_tokens", "denoise")):
        deltas = {path: delta(shapes, path)}
        message = refused(*((deltas, {}) if mode == "encode" else ({}, deltas)))
        assert message == f"PEFT's layout cannot store a change of {path} in the mode {mode}."
