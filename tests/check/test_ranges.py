"""The audit of ranges, and what becomes of a checkpoint whose numbers float16 cannot hold."""

import shutil

import mlx.core as mx
import pytest
from support import refusal

import mlx_dgemma
from mlx_dgemma.check.ranges import MapRange, audit
from mlx_dgemma.checkpoint.float16 import DECODER, KINDS
from mlx_dgemma.errors import OptionError, RangeError

DOWN = "model.decoder.layers.1.mlp.down_proj"
PROMPTS = ("Sort these numbers: 42, 7, 19", "Translate to Spanish: the red house")
ENDED = (
    "Numbers of this model left the range of float16, so there is no answer; load it without --compute-dtype float16 "
    '(compute_dtype="float16").'
)


@pytest.fixture(scope="module")
def large(tmp_path_factory, demo):
    """The demo with one matrix times 8,192; the norm behind it undoes that, so its answers are the demo's."""
    folder = tmp_path_factory.mktemp("large") / "demo"
    shutil.copytree(demo, folder)
    tensors = mx.load(str(demo / "model.safetensors"))
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"] * 2**13
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    return folder


@pytest.fixture(scope="module")
def engine(large):
    return mlx_dgemma.load(large, "bfloat16")


@pytest.fixture(scope="module")
def overflowing(large):
    return mlx_dgemma.load(large, "bfloat16", compute_dtype="float16")


def test_the_audit_allows_the_demo(demo):
    engine = mlx_dgemma.load(demo, "bfloat16")
    kinds = [type(one) for one in engine.model.modules()]
    before = engine.generate(PROMPTS[0], seed=3).tokens
    found = audit(engine, PROMPTS)
    assert found.allowed and found.prompts == 2 and found.steps >= 2
    modules = engine.model.model.decoder.named_modules()
    assert {one.name for one in found.maps} == {DECODER + path for path, one in modules if type(one) in KINDS}
    assert all(0 < one.output < 1000 and 0 < one.input < 1000 for one in found.maps)
    assert found.lines()[0] == f"demo: {len(found.maps)} linear maps, 2 prompts, {found.steps} denoising steps"
    assert found.lines()[-1].endswith("; use --compute-dtype float16")
    assert found.as_dict()["allowed"] is True
    assert [type(one) for one in engine.model.modules()] == kinds  # nothing is left behind
    assert engine.generate(PROMPTS[0], seed=3).tokens == before


def test_the_audit_refuses_numbers_beyond_float16_by_name(engine):
    found = audit(engine, PROMPTS)
    assert not found.allowed
    (fault,) = found.faults
    assert fault.startswith(f"{DOWN} gives ") and fault.endswith("more than a quarter of float16's 65504")
    assert found.lines()[-1] == f"float16 does not suit: {fault}"
    assert found.as_dict()["faults"] == [fault]


@pytest.mark.parametrize("mode", [{}, {"exact": True}, {"fast": True}, {"regex": "[a-z0-9, ]{1,20}"}])
def test_overflow_ends_a_request_with_an_error(engine, overflowing, demo, mode):
    few = {"max_tokens": 16, **mode}
    answer = engine.generate(PROMPTS[0], seed=0, **few)
    assert answer.tokens == mlx_dgemma.load(demo, "bfloat16").generate(PROMPTS[0], seed=0, **few).tokens
    assert refusal(RangeError, overflowing.generate, PROMPTS[0], seed=0, **mode) == ENDED


def test_overflow_ends_every_verb_with_an_error(overflowing):
    for call in (
        lambda: overflowing.choose("Which is larger, 51 or 23?", ["51", "23"]),
        lambda: overflowing.infill("The red ", " is open."),
        lambda: overflowing.edit("the red house", "Make it blue.", seed=0),
        lambda: overflowing.fill("{a} is red", {"a": 8}, seed=0),
        lambda: overflowing.generate_batch(list(PROMPTS), seeds=[0, 1]),
    ):
        assert refusal(RangeError, call) == ENDED


def test_an_engine_in_float16_is_not_audited(overflowing, demo):
    message = "The model is loaded in float16, which hides larger numbers; load it without, to audit it."
    assert refusal(OptionError, audit, overflowing, PROMPTS) == message
    assert refusal(OptionError, audit, mlx_dgemma.load(demo, "float16"), PROMPTS) == message


def test_weights_that_do_not_fit_are_faults(demo):
    engine = mlx_dgemma.load(demo, "bfloat16")
    module = engine.model.model.decoder.layers[0].mlp.up_proj
    module.weight = module.weight * 2**20
    found = audit(engine, PROMPTS[:1])
    assert len(found.misfits) == 1 and found.misfits[0].startswith("model.decoder.layers.0.mlp.up_proj.weight reaches ")
    assert any(fault.startswith("model.decoder.layers.0.mlp.up_proj gives ") for fault in found.faults)


@pytest.mark.parametrize(
    ("into", "out", "fault"),
    [
        (16000, 16000, None),
        (17000, 1, "q takes 1.7e+04, more than a quarter of float16's 65504"),
        (1, 17000, "q gives 1.7e+04, more than a quarter of float16's 65504"),
        (1, float("inf"), "q gives inf, more than a quarter of float16's 65504"),
        (1e-5, 1, "q takes at most 1e-05, where float16 is coarser than bfloat16"),
        (0, 0, None),  # never used
    ],
)
def test_faults(into, out, fault):
    assert MapRange("q", into, out).fault() == fault
