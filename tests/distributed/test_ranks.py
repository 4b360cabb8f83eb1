"""Several ranks compute what one computes: tokens, likely tokens, probabilities; with few messages and their share."""

from dataclasses import replace

import mlx.core as mx
import pytest
from answers import answers, few_answers
from mlx.utils import tree_flatten
from ranks import on_threads
from support import FULL, SLIDING, engine_of, gap, small_config, small_model, write_checkpoint

import mlx_dgemma
from mlx_dgemma.check.shapes import quantize, raw_config
from mlx_dgemma.checkpoint import memory
from mlx_dgemma.checkpoint.build import build, empty_model, slices_of
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.headers import TensorInfo
from mlx_dgemma.convert.recipes import RECIPES
from mlx_dgemma.decoding import costs
from mlx_dgemma.distributed.dealing import Span, deal, kv_heads_of
from mlx_dgemma.engine import Engine
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model.config import GenerationConfig, ModelConfig, ProcessorConfig


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


def test_quantized_ranks_hold_whole_groups_in_turns(tmp_path):
    """Three groups of 64 in the heads and in the experts, five in the dense branch: none is split or held twice."""
    sizes = {"hidden_size": 64, "intermediate_size": 320, "moe_intermediate_size": 192, "vocab_size": 256}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "num_global_key_value_heads": 6}
    widths = {"head_dim": 32, "global_head_dim": 32}
    layers = (SLIDING, FULL)
    model = small_model(layers=layers, scale=0.1, **sizes, **heads, **widths)
    quantize(model, "4bit")
    model.set_dtype(mx.bfloat16)
    raw = {**small_config(layers, **sizes, **heads, **widths), "quantization": {}}
    for path, one in slices_of(model, 0, 1).quantized.items():
        raw["quantization"][path] = vars(one)
    write_checkpoint(tmp_path / "q", dict(tree_flatten(model.parameters())), raw)
    checkpoint, tokens = Checkpoint.open(tmp_path / "q"), mx.array([[2, 40, 50, 60]], mx.int32)
    assert memory.rank_weights(checkpoint, 1)[0].total == checkpoint.nbytes  # scales in the dtype that is stored

    def work(group):
        model = build(checkpoint, "float32", group=group)
        logits = model.logits(model.encode(tokens, model.new_prefix()))
        mx.eval(logits)
        held = dict(tree_flatten(model.parameters()))
        told = memory.rank_weights(checkpoint, group.size, "float32")[group.rank].total
        assert sum(a.nbytes for a in held.values()) == told
        return logits, {name: a for name, a in held.items() if ".layers." in name and "proj." in name}

    (expected, whole), *_ = on_threads(1, work)
    (logits, first), (others, second) = on_threads(2, work)
    assert mx.array_equal(logits, others) and gap(logits, expected) < 1e-5
    for name, array in whole.items():
        if "router" not in name:
            assert first[name].nbytes + second[name].nbytes == array.nbytes, name
    groups = [
        [
            [held[f"model.decoder.layers.{i}.{of}.down_proj.scales"].shape[-1] for held in (first, second)]
            for i in (0, 1)
        ]
        for of in ("experts", "mlp")
    ]
    assert groups == [[[2, 1], [1, 2]], [[3, 2], [2, 3]]]
    with pytest.raises(CheckpointError, match=r"o_proj can be cut .* into 3 parts, too few for 4 ranks; start fewer\."):
        memory.rank_weights(checkpoint, 4)


@pytest.mark.parametrize("recipe", ["4bit", "mxfp4"])
def test_ranks_of_the_release_hold_even_parts(recipe):
    """Eleven groups of 64 in every expert: the rank that holds one more is another in every layer."""
    raw = raw_config("26b")
    plain = Checkpoint(DEMO, ModelConfig.from_dict(raw), GenerationConfig(), ProcessorConfig(), raw, {})
    paths = {name.removesuffix(".weight"): shape[-1] for name, shape in plain.shapes.items() if len(shape) > 1}
    how = {path: found for path, width in paths.items() if (found := RECIPES[recipe].quantization(path, width))}
    scales = {f"{path}.scales": TensorInfo(DEMO, "BF16", (), 0, 0) for path in how}
    packed = replace(plain, raw_config={**raw, "quantization": how}, tensors=scales)
    whole = memory.rank_weights(packed, 1)[0]
    for ranks in (2, 4, 8):
        for one in memory.rank_weights(packed, ranks):
            assert one.slices == pytest.approx(whole.slices / ranks, rel=0.05)
    model = empty_model(packed)
    borders = [slices_of(model, rank, 2).cut("model.decoder.layers.0.experts.down_proj.weight") for rank in (0, 1)]
    assert [one.spans for one in borders] == [(Span(0, 384),), (Span(384, 704),)]  # MLX is slow beside multiples of 64


def test_sizes_are_dealt_evenly():
    assert deal(7, 3) == [Span(0, 3), Span(3, 5), Span(5, 7)]
    assert [one.size for one in deal(7, 3, turn=2)] == [2, 2, 3]
    assert [one.size for one in deal(100, 2, unit=64)] == [64, 36]
    assert sum(one.size for one in deal(704, 4, unit=32)) == 704


def test_kv_heads_follow_their_queries():
    assert kv_heads_of(Span(0, 8), 2) == [0, 1, 2, 3]
    assert kv_heads_of(Span(4, 8), 8) == [0]  # two full KV heads on four ranks
    assert kv_heads_of(Span(2, 4), 3) == [0, 1]
    assert kv_heads_of(Span(0, 5), 2) == [0, 0, 1, 1, 2]


def test_too_many_ranks_are_refused():
    with pytest.raises(CheckpointError, match=r"6 attention heads cannot be dealt to 7 ranks; start fewer\."):
        memory.rank_weights(engine_of(DEMO).checkpoint, 7)
