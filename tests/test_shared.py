"""A file whose tests change an engine that all share is named when it ends."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from shared import Shared
from support import engine_of

import mlx_dgemma
from mlx_dgemma.adapters.deltas import add_adapter


def in_place(engine):
    weight = engine.model.model.decoder.norm.weight
    weight[0] = 2 * weight[0]


def packed(engine):
    nn.quantize(engine.model, 64, 4, class_predicate=lambda path, _: path.endswith("layers.0.mlp.up_proj"))


CHANGES = {
    "engine.model.model.decoder.norm.weight": in_place,
    "engine.model.model.decoder.layers.0.input_layernorm.weight": lambda engine: engine.model.model.decoder.layers[
        0
    ].input_layernorm.update({"weight": mx.ones(192)}),
    "engine.model.model.decoder.layers.0.mlp.up_proj.scales": packed,
    "engine.model.model.decoder.layers.0.self_attn.q_proj.lora_a": lambda engine: add_adapter(
        engine.model, ["model.decoder.layers.0.self_attn.q_proj"], 2, 2.0, 0.0, False, mx.random.key(0)
    ),
    "engine.model.model.decoder.norm._training": lambda engine: engine.model.train(not engine.model.training),
    "engine.model.uses_kernels": lambda engine: setattr(engine.model, "uses_kernels", True),
    "engine.model.kv_bits": lambda engine: setattr(engine.model, "kv_bits", 8),
    "engine.options": lambda engine: setattr(engine, "options", engine.options.override(max_tokens=3)),
    "engine.builder.options": lambda engine: setattr(engine.builder, "options", engine.options.override(max_tokens=3)),
}


@pytest.fixture(scope="module")
def engines():
    return Shared(lambda path: mlx_dgemma.load(path, dtype="float32"))


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_is_changed_is_named_and_loaded_again(engines, demo, name):
    engine = engines(demo)
    engine.generate("Hello.", seed=0, max_tokens=2, session=engine.session())
    assert engines.complaint("a.py") == ""
    CHANGES[name](engines(demo))
    said = engines.complaint("tests/test_x.py")
    assert said.startswith("tests/test_x.py has changed an engine that tests share: engine.")
    assert name in said or "and more" in said
    assert engines(demo) is not engine
    assert engines.complaint("a.py") == ""


def test_every_file_is_looked_at(request, demo):
    assert "shared_engines_are_left_as_they_were" in request.fixturenames
    assert engine_of(demo) is engine_of(demo)
