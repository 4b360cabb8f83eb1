"""What the sections find: products, references, answers and traps, each shown to see a fault."""

import importlib.util
from pathlib import Path

import mlx.core as mx
import pytest
from support import engine_of, small_config, small_model

from mlx_dgemma.check import answers, machine, products, references
from mlx_dgemma.check.lines import FAILED, PASSED, SKIPPED
from mlx_dgemma.check.products import Size
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.convert.recipes import Quantization
from mlx_dgemma.model.config import ModelConfig

ROOT = Path(__file__).parent.parent.parent
ARM = {
    "system": "Darwin",
    "macos": "15.5",
    "machine": "arm64",
    "rosetta": False,
    "wheel_tags": ["py3-none-macosx_14_0_arm64"],
}


@pytest.fixture
def size():
    changes = {"hidden_size": 64, "head_dim": 32, "global_head_dim": 64, "moe_intermediate_size": 64}
    return Size(ModelConfig.from_dict(small_config(**changes)).text, 40, 8, 12, 256)


def test_products_of_every_recipe_are_near_their_unpacked_ones(size):
    found = list(products.lines(size))
    assert [line for line in found if line.status != PASSED] == []
    names = [line.name for line in found]
    assert len(names) == len(set(names)) == 30
    assert "experts, 4-bit nvfp4, groups of 16, float16" in names
    assert "conditioning, 8-bit affine, groups of 64, bfloat16" in names


def test_a_wrong_product_fails(size, monkeypatch):
    real = products.matmul_slice
    monkeypatch.setattr(
        products,
        "matmul_slice",
        lambda *given: real(*given) * mx.array([1.0] * 39 + [1.5])[:, None].astype(given[1].dtype),
    )
    found = {line.name: line for line in products.lines(size)}
    line = found["head, 8-bit affine, groups of 64, bfloat16"]
    assert line.status == FAILED and 0.3 < line.figures["error"] < 0.7


@pytest.mark.parametrize("stored", [None, Quantization(4), Quantization(8)])
def test_experts_whose_rows_are_sorted_wrongly_fail(size, stored, monkeypatch):
    real = products.Experts.__call__
    monkeypatch.setattr(products.Experts, "__call__", lambda self, x, *rest: real(self, x[::-1], *rest))
    got, wanted = products._experts(size, mx.bfloat16, stored)
    assert products.worst_row(got, wanted) > 0.5


def test_the_worst_row_counts_and_nothing_that_is_not_finite_passes():
    wanted = mx.array([[3.0, 4.0], [0.0, 2.0]])
    assert products.worst_row(wanted, wanted) == 0
    assert products.worst_row(mx.array([[3.0, 4.0], [0.0, 1.0]]), wanted) == 0.5
    assert products.worst_row(mx.array([[mx.nan, 4.0], [0.0, 2.0]]), wanted) == float("inf")


def test_the_references_are_those_of_the_tests():
    spec = importlib.util.spec_from_file_location("bench_references", ROOT / "bench" / "references.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert references.FILE.read_bytes() == module.content()
    assert len(module.content()) < 100_000


def test_the_demo_agrees_with_the_references():
    assert [line.status for line in references.lines(engine_of(DEMO).model)] == [PASSED] * 6


def test_another_model_does_not_agree(monkeypatch):
    model, held = engine_of(DEMO).model, references.read()
    real = type(model).logits
    monkeypatch.setattr(type(model), "logits", lambda self, hidden: real(self, hidden * 1.01))
    short = references._logits(model, held, "short")
    assert short.status == FAILED and short.figures["errors"]["logits"] > references.BOUND
    steps = references._of(held, "trajectory")
    few = {name: a[:2] if len(a) == 14 else a for name, a in steps.items()}
    assert references._trajectory(model, few).figures["entropy_error"] > references.BOUND
    monkeypatch.setattr(type(model), "logits", lambda self, hidden: -real(self, hidden))
    few = {name: a for name, a in held.items() if name.startswith("causal.00")}
    assert references._causal(model, few).figures == {"wrong": 14, "tokens": 14}


def test_a_model_of_another_shape_is_a_failure_of_each_line():
    assert {line.status for line in references.lines(small_model())} == {FAILED}


def test_a_wrong_answer_fails():
    case = answers.Case("sorting", lambda engine: "1, 2", "1, 2".__eq__)
    assert answers.answered(case, None).status == PASSED
    wrong = answers.answered(case._replace(ask=lambda engine: "2, 1"), None)
    assert (wrong.status, wrong.says) == (FAILED, "'2, 1'")


def test_the_demo_knows_its_answers():
    few = ("default: JSON", "exact: JSON", "fast: JSON", "infill", "fill", "edit", "choose", "batch")
    engine = engine_of(DEMO)
    found = [answers.answered(case, engine) for case in answers.cases() if case.name in few]
    assert [line.status for line in found] == [PASSED] * len(few), found


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, ""),
        ({"macos": "14.7"}, "wired limit"),
        ({"machine": "x86_64", "rosetta": True}, "Rosetta"),
        ({"macos": "26.1", "wheel_tags": ["py3-none-macosx_26_0_arm64"]}, "update macOS to 26.2"),
        ({"macos": "26.1"}, ""),
        ({"macos": "26.2", "wheel_tags": ["py3-none-macosx_26_0_arm64"]}, ""),
        ({"system": "Linux", "macos": "", "machine": "x86_64"}, ""),
    ],
)
def test_traps(changes, word):
    found = machine.traps({**ARM, **changes})
    assert len(found) == bool(word) and all(word in one for one in found)


def test_the_machine_tells_itself_and_limits_stay():
    cache = mx.set_cache_limit(2**20)
    try:
        found = {line.name: line for line in machine.lines()}
        assert mx.set_cache_limit(cache) == 2**20
    finally:
        mx.set_cache_limit(cache)
    assert [line.status for line in found.values()] == [PASSED] * 6
    assert found["memory limits"].figures["cache_limit"] == 2**20
    assert found["packages"].figures["versions"]["mlx"]
    assert all(line.says for line in found.values())


def test_where_quantized_products_compile_for_a_minute_few_are_checked(size, monkeypatch):
    monkeypatch.setattr(products, "compiles_slowly", lambda: True)
    monkeypatch.setattr(products, "compared", lambda name, make: name)
    first, *names = products.lines(size)
    assert (first.name, first.status) == ("recipes but 4-bit affine, groups of 64", SKIPPED)
    assert [one for one in names if "float16" in one and "bfloat16" not in one] == [
        "experts, not quantized, float16",
        "sliding attention 4 x 32, not quantized, float16",
        "full attention 4 x 64, not quantized, float16",
    ]
    assert [one for one in names if "experts" in one and "bfloat16" in one] == [
        "experts, not quantized, bfloat16",
        "experts, 4-bit affine, groups of 64, bfloat16",
    ]
