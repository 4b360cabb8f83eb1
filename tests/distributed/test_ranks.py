"""Several ranks compute what one computes: tokens, likely tokens, probabilities; with few messages and their share."""

import mlx.core as mx
import pytest
from answers import answers, few_answers
from mlx.utils import tree_flatten
from ranks import on_threads
from support import engine_of

import mlx_dgemma
from mlx_dgemma.checkpoint import memory
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.convert.conversion import convert
from mlx_dgemma.decoding import costs
from mlx_dgemma.distributed.dealing import Span, deal, group_of_width, kv_heads_of
from mlx_dgemma.engine import Engine
from mlx_dgemma.errors import CheckpointError


def nbytes(engine: Engine) -> int:
    return sum(a.nbytes for _, a in tree_flatten(engine.model.parameters()))


@pytest.mark.parametrize(("ranks", "ask"), [(2, answers), (4, few_answers)])
def test_ranks_answer_as_one_does(ranks, ask):
    """Six heads are dealt to four ranks as 2, 2, 1, 1: the second one needs both KV heads."""

    def work(group):
        engine = mlx_dgemma.load(DEMO, dtype="float32", group=group)
        held = nbytes(engine)
        return ask(engine), held, memory.rank_weights(engine.checkpoint, ranks, "float32")[group.rank].total

    expected = ask(engine_of(DEMO))
    for found, held, told in on_threads(ranks, work):
        assert found == expected
        assert held == told


def test_a_layer_sends_twice_and_a_rank_holds_its_share():
    def work(group):
        engine = mlx_dgemma.load(DEMO, dtype="float32", group=group)
        model = engine.model
        canvas, prefix = mx.zeros((1, 16), mx.int32), model.new_prefix()
        group.messages.clear()
        made = model.head.predict(model.denoise(canvas, prefix), 1.0, mx.random.key(0)[None], expected_embedding=True)
        mx.eval(made.condition(model.head, 0))
        return group.messages, memory.rank_weights(engine.checkpoint, 2, "float32")[group.rank]

    hidden, layers = 192, 6
    for messages, weights in on_threads(2, work):
        widths = [shape[-1] for kind, shape, _ in messages if kind == "sum"]
        assert widths == [hidden, *([hidden, 2 * hidden] * layers), hidden]  # tokens, layers, conditioning
        assert [kind for kind, _, _ in messages].count("gather") == 1
        shared = 4 * hidden * 64  # the full layer's one KV head, which both hold
        assert 2 * weights.slices + sum(weights.replicated.values()) - shared == nbytes(engine_of(DEMO))


def test_costs_are_measured_with_a_ranks_own_heads():
    def work(group):
        model = mlx_dgemma.load(DEMO, dtype="float32", group=group).model
        return model.encode_ahead(mx.zeros((1, 1), mx.int32), [costs.random_prefix(model, 40)]).shape

    assert on_threads(2, work) == [(1, 1, 192)] * 2


def test_quantized_ranks_hold_the_same_numbers(tmp_path):
    """Three heads of 32 are one and a half groups of 64: the groups are halved, which changes no number."""
    convert(DEMO, tmp_path / "q", recipe="4bit")
    tokens = mx.array([[2, 40, 50, 60]], mx.int32)

    def states(engine):
        return engine.model.logits(engine.model.encode(tokens, engine.model.new_prefix()))

    def work(group):
        engine = mlx_dgemma.load(tmp_path / "q", dtype="float32", dequantize=False, group=group)
        layer = engine.model.model.decoder.layers[0]
        logits = states(engine)
        mx.eval(logits)
        told = memory.rank_weights(engine.checkpoint, 2, "float32", False)[group.rank].total
        return logits, layer.self_attn.o_proj.group_size, layer.mlp.down_proj.group_size, nbytes(engine) - told

    expected = states(mlx_dgemma.load(tmp_path / "q", dtype="float32", dequantize=False))
    for logits, o_group, down_group, error in on_threads(2, work):
        assert mx.abs(logits - expected).max() < 1e-3
        assert (o_group, down_group) == (32, 64)
        assert error == 0


def test_sizes_are_dealt_evenly():
    assert deal(7, 3) == [Span(0, 3), Span(3, 5), Span(5, 7)]
    assert [one.size for one in deal(7, 3, turn=2)] == [2, 2, 3]
    assert [one.size for one in deal(100, 2, unit=64)] == [64, 36]
    assert sum(one.size for one in deal(704, 4, unit=32)) == 704
    # The release: 704 is eleven groups of 64; halves are dealt evenly to two, but no better to four.
    assert group_of_width(704, 2, 64, 32) == 32 and group_of_width(704, 4, 64, 32) == 64
    assert group_of_width(704, 2, 64, 64) == 64  # a mode whose groups cannot be halved


def test_kv_heads_follow_their_queries():
    assert kv_heads_of(Span(0, 8), 2) == [0, 1, 2, 3]
    assert kv_heads_of(Span(4, 8), 8) == [0]  # two full KV heads on four ranks
    assert kv_heads_of(Span(2, 4), 3) == [0, 1]
    assert kv_heads_of(Span(0, 5), 2) == [0, 0, 1, 1, 2]


def test_too_many_ranks_are_refused():
    with pytest.raises(CheckpointError, match=r"6 attention heads cannot be dealt to 7 ranks; start fewer\."):
        memory.rank_weights(engine_of(DEMO).checkpoint, 7)
