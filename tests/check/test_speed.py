"""Predicted steps from made-up measurements, the paper model, and the measuring code on a tiny shape: no times."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.check import paper, prediction, speed
from mlx_dgemma.check.lines import PASSED, SKIPPED, WARNING
from mlx_dgemma.check.prediction import Parts
from mlx_dgemma.check.shapes import SHAPES, raw_config, shared_model
from mlx_dgemma.decoding import costs
from mlx_dgemma.model.config import ModelConfig

PARTS = Parts(layers=12.5, depth=6, head=4.5, dense_head=7.5, sampler=1.5, wait=0.5)
RELEASE = ModelConfig.from_dict(raw_config("26b"))


@pytest.fixture
def tiny(monkeypatch):
    """A shape of 4 layers that computes in milliseconds."""
    changes = {
        "hidden_size": 64,
        "vocab_size": 512,
        "num_hidden_layers": 4,
        "num_experts": 4,
        "moe_intermediate_size": 64,
    }
    monkeypatch.setitem(SHAPES, "small", {**SHAPES["small"], **changes})
    monkeypatch.setattr(speed, "PREFIX", 32)
    monkeypatch.setattr(costs, "PREFIX", 32)
    return raw_config("small", canvas=16)


def test_a_step_is_its_layers_and_the_rest_with_one_wait():
    assert prediction.layer_ms(PARTS) == 2
    assert prediction.predicted_ms(PARTS, 30) == 60 + 4 + 1 + 0.5
    assert prediction.predicted_ms(PARTS, 30, dense=True) == 60 + 7 + 1 + 0.5
    assert prediction.predicted_ms(PARTS, 6) == 12 + 4 + 1 + 0.5
    free = PARTS._replace(sampler=0.1, wait=0.2)
    assert prediction.predicted_ms(free, 6) == pytest.approx(12.3 + 4.3 + 0 + 0.2)


@pytest.mark.parametrize(("measured", "close"), [(100, True), (84, True), (83, False), (124, True), (126, False)])
def test_a_prediction_is_close_within_a_fifth_of_the_measured_step(measured, close):
    assert prediction.is_close(100, measured) is close


def test_a_prediction_that_the_loop_contradicts_is_a_warning():
    line = speed._predicted("step", RELEASE, PARTS, 68.5)
    assert line.status == PASSED
    assert line.figures == {"predicted_ms": 65.5, "predicted_dense_ms": 68.5, "loop_ms": 68.5, "prefix": speed.PREFIX}
    assert speed._predicted("step", RELEASE, PARTS, 100.0).status == WARNING


@pytest.mark.parametrize(
    ("chip", "half", "known"),
    [
        ("Apple M1 Max", False, 652),
        ("Apple M1 Max", True, 403),
        ("Apple M4 Max", False, 244),
        ("Apple M5 Max", False, 101),
    ],
)
def test_the_paper_model_is_that_of_the_audit(chip, half, known):
    found = paper.paper_step(chip, RELEASE, 1024, half, way=paper.PLAIN)
    assert found["sum"] == pytest.approx(known, rel=0.04)
    assert found["sum"] == pytest.approx(sum(ms for part, ms in found.items() if part != "sum"))


def test_the_paper_model_of_other_devices():
    plain = paper.paper_step("Apple M4 Max", RELEASE, 1024)
    assert paper.paper_step("Apple M4 Max", RELEASE, 1024, half=True) == plain
    assert paper.paper_step("Apple M4 Max", RELEASE, 1024, dense=True)["sum"] > plain["sum"] + 25
    assert plain["sum"] < paper.paper_step("Apple M4 Max", RELEASE, 1024, way=paper.PLAIN)["sum"] - 10
    assert paper.paper_step("NVIDIA H200", RELEASE, 1024) is None
    assert paper.floor_ms("NVIDIA H200", RELEASE, 1024, 48 * 10**9) == pytest.approx(10, rel=0.1)  # its bytes
    assert paper.floor_ms("AMD EPYC", RELEASE, 1024, 1) is None
    assert paper.limits_of("Apple M1 Max") == (400, 10.4) and paper.limits_of("Apple M1") == (68, 2.6)


def test_the_paper_model_of_a_narrow_canvas():
    """Products shrink with the rows; experts hardly do, whose tiles are 183 of 16 rows for a canvas of 256."""
    whole, narrow = (paper.paper_step("Apple M4 Max", RELEASE, 1024, width=width) for width in (256, 64))
    assert whole == paper.paper_step("Apple M4 Max", RELEASE, 1024)
    assert narrow["dense MLP"] == pytest.approx(whole["dense MLP"] / 4)
    assert narrow["experts"] / whole["experts"] == pytest.approx(126 / 183, rel=0.01)
    read = paper.paper_step("Apple M5 Max", RELEASE, 1024, width=8, weights=15 * 10**9)
    assert read["sum"] == pytest.approx(15e9 / (614 * 0.78 * 1e6) + read["launches"])


def test_layers_of_a_kind_share_their_weights(tiny):
    model = shared_model(tiny, mx.float32, None)
    layers = model.model.decoder.layers
    assert [layer._layer_type for layer in layers] == ["sliding_attention"] * 3 + ["full_attention"]
    assert layers[0] is layers[1] is layers[2] is not layers[3]
    prefix = speed.random_prefix(model, speed.PREFIX)
    assert prefix.offset == 32
    hidden = model.denoise(mx.zeros((1, 16), mx.int32), prefix)
    assert hidden.shape == (1, 16, 64) and mx.isfinite(hidden).all().item()
    table = dict(tree_flatten(shared_model(tiny, mx.bfloat16, "4bit").parameters()))
    assert table["model.decoder.embed_tokens.weight"].dtype == mx.uint32


def test_every_line_of_the_section_on_a_tiny_shape(tiny):
    found = {line.name: line for line in speed.lines("small", ("float32", "4bit"))}
    assert [line for line in found.values() if line.status not in (PASSED, WARNING)] == []
    for name in ("float32", "4bit"):
        parts = found[f"parts of a step at small's shape in {name}"].figures
        assert set(parts) == set(Parts._fields) and parts["depth"] == 4 and min(parts.values()) > 0
        assert found[f"predicted step at small's shape in {name}"].figures["loop_ms"] > 0
    assert found["experts, 4 bit"].figures["tflops"] > 0


def test_too_little_memory_is_told(tiny, monkeypatch):
    monkeypatch.setattr("mlx_dgemma.model.device.available", lambda: 10**6)
    (line,) = speed._step(raw_config("26b"), "26b", "bfloat16")
    assert line.status == SKIPPED
    assert line.says == "two layers and the vocabulary need 9.0 GB of 1.0 MB."
