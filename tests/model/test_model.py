"""The model against Transformers' float32 outputs on the demo's weights, and what they do not cover."""

import json
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import DATA, engine_of, gap, random_tokens, reference, small_model

from mlx_dgemma.decoding import sampler
from mlx_dgemma.errors import PromptError
from mlx_dgemma.model import functions
from mlx_dgemma.model.vision import ClippedLinear

BOUND = 1e-4


@pytest.fixture(scope="module", params=["demo", "hf_checkpoint"])
def model(request):
    """The same weights in both layouts: converted, and as released on the Hub."""
    return engine_of(request.getfixturevalue(request.param)).model


def encode(model, tokens, chunk, mask=None):
    prefix = model.new_prefix(tokens.shape[0])
    hidden = [
        model.encode(tokens[:, at : at + chunk], prefix, mask=None if mask is None else mask[:, at : at + chunk])
        for at in range(0, tokens.shape[1], chunk)
    ]
    return prefix, mx.concatenate(hidden, axis=1)


def logits(model, canvas, prefix, conditioning=None):
    return model.logits(model.denoise(canvas, prefix, conditioning))


@pytest.mark.parametrize("chunk", [7, 16, 64, 2048])
@pytest.mark.parametrize("name", ["short", "long"])
def test_hidden_states_and_logits_equal_transformers(model, name, chunk):
    expected = reference(name)
    prefix, hidden = encode(model, expected["input_ids"], chunk)
    assert gap(hidden, expected["encoder_hidden"]) < BOUND
    assert gap(logits(model, expected["canvas"], prefix), expected["logits"]) < BOUND


@pytest.mark.parametrize("name", ["short", "long"])
def test_self_conditioned_logits_equal_transformers(model, name):
    expected = reference(name)
    prefix, _ = encode(model, expected["input_ids"], 2048)
    conditioning = model.condition(expected["logits"] / 0.8)
    assert gap(logits(model, expected["canvas"], prefix, conditioning)[:, ::4], expected["logits_conditioned"]) < BOUND


@pytest.mark.parametrize("chunk", [7, 16, 64, 2048])
def test_logits_behind_a_committed_block_equal_transformers(model, chunk):
    expected = reference("two_blocks")
    prefix, _ = encode(model, expected["input_ids"], chunk)
    model.encode(expected["committed"], prefix)
    assert gap(logits(model, expected["canvas"], prefix)[:, ::4], expected["logits"]) < BOUND


@pytest.mark.parametrize("chunk", [7, 16, 64, 2048])
def test_left_padded_batch_equals_transformers(model, chunk):
    expected = reference("padded_batch")
    prefix, _ = encode(model, expected["input_ids"], chunk, expected["attention_mask"])
    assert prefix.padding.tolist() == [8, 0]
    assert gap(logits(model, expected["canvas"], prefix)[:, ::4], expected["logits"]) < BOUND


@pytest.mark.parametrize("name", ["image", "two_images"])
def test_pictures_equal_transformers(model, name):
    expected = reference(name)
    pictures = expected["pixel_values"], expected["image_position_ids"]
    encoder = model.model.encoder
    assert gap(encoder.embed_vision(encoder.vision_tower(*pictures)), expected["features"]) < BOUND
    prefix = model.new_prefix()
    model.encode(expected["input_ids"], prefix, images=pictures)
    assert gap(logits(model, expected["canvas"], prefix)[:, ::4], expected["logits"]) < BOUND


def test_every_step_of_a_generation_is_reproduced(model):
    """Acceptance, argmax, entropy, canvas and stop of 14 steps; conditioning comes from our own logits."""
    expected = {name: np.array(array) for name, array in reference("trajectory").items()}
    prompt, rows = expected["input_ids"].shape[1], len(expected["cur_step"])
    prefix = model.new_prefix()
    model.encode(mx.array(expected["input_ids"]), prefix)
    conditioning, earlier = None, []
    for row in range(rows):
        if prefix.offset < expected["prefix_length"][row]:
            model.encode(mx.array(expected["sequence"][:, prefix.offset : expected["prefix_length"][row]]), prefix)
            conditioning, earlier = None, []
        assert prefix.offset == expected["prefix_length"][row]
        canvas = mx.array(expected["canvas_in"][row : row + 1])
        t = sampler.temperature(int(expected["cur_step"][row]), 48, 0.4, 0.8)
        processed = logits(model, canvas, prefix, conditioning) / t
        best, entropy = mx.argmax(processed, axis=-1), functions.entropy(processed)
        accepted = sampler.accept(entropy, 0.1)
        assert best.tolist() == expected["argmax"][row : row + 1].tolist()
        assert gap(entropy[0], mx.array(expected["entropy"][row])) < BOUND
        assert accepted.tolist() == expected["accepted"][row : row + 1].tolist()
        after = np.where(np.array(accepted)[0], expected["sample"][row], expected["random"][row])
        assert after.tolist() == expected["canvas_out"][row].tolist()
        stop = sampler.settled(best, earlier, entropy, 1, 0.005).item()
        assert stop == expected["finished"][row]
        conditioning, earlier = model.condition(processed), [best]
    blocks = expected["argmax"][expected["finished"]]
    assert blocks.flatten().tolist() == expected["sequence"][0, prompt:].tolist()


def test_the_encoder_alone_continues_as_transformers_does(demo):
    """Greedy decoding token by token: every token is the argmax behind the ones before it, seen in one causal pass."""
    model = engine_of(demo).model
    for case in json.loads((DATA / "causal.json").read_text()):
        tokens, start = mx.array([case["prompt_ids"] + case["tokens"]]), len(case["prompt_ids"]) - 1
        states = model.encode(tokens[:, :-1], model.new_prefix())
        ahead = model.logits(states[:, start:])[0]
        assert mx.argmax(ahead, axis=-1).tolist() == case["tokens"], case["task"]
        log_probs = ahead - mx.logsumexp(ahead, axis=-1, keepdims=True)
        total = mx.take_along_axis(log_probs, tokens[0, start + 1 :, None], axis=-1).sum().item()
        assert abs(total - case["log_prob"]) < 1e-3, case["task"]


def test_pictures_encoded_in_groups_and_by_chunks_of_queries_are_the_same(demo, monkeypatch):
    """One picture at a time, 100 queries at a time; every picture keeps its own positions."""
    expected, model = reference("two_images"), engine_of(demo).model
    monkeypatch.setattr("mlx_dgemma.model.diffusion_gemma.PATCHES_AT_ONCE", 1)
    monkeypatch.setattr("mlx_dgemma.model.vision.QUERY_CHUNK", 100)
    assert (
        gap(model.encode_images((expected["pixel_values"], expected["image_position_ids"])), expected["features"])
        < BOUND
    )


def test_clipped_linears_clip_what_goes_in_and_comes_out():
    linear = ClippedLinear(2, 1, clipped=True)
    linear.linear.weight = mx.array([[1.0, 10.0]])
    assert linear(mx.array([[-3.0, 5.0]])).item() == 47
    linear.input_min, linear.input_max, linear.output_max = mx.array(-1.0), mx.array(2.0), mx.array(15.0)
    assert linear(mx.array([[-3.0, 5.0]])).item() == 15
    assert linear(mx.array([[-3.0, 0.5]])).item() == 4
    linear.output_min = mx.array(4.5)
    assert linear(mx.array([[-3.0, 0.5]])).item() == 4.5
    assert dict(tree_flatten(ClippedLinear(2, 1, clipped=False).parameters())).keys() == {"linear.weight"}


def test_placeholders_and_soft_tokens_must_agree(model):
    expected = reference("image")
    pictures = expected["pixel_values"], expected["image_position_ids"]
    message = "The prompt has 0 image placeholders, but its pictures have 66 soft tokens; they must agree."
    with pytest.raises(PromptError, match=f"^{re.escape(message)}$"):
        model.encode(mx.array([[2, 15, 280]]), model.new_prefix(), images=pictures)


def test_a_text_only_model_refuses_pictures():
    message = "^This checkpoint has no vision tower, so it cannot look at pictures; send text alone.$"
    model = small_model()
    with pytest.raises(PromptError, match=message):
        model.encode(mx.array([[1]]), model.new_prefix(), images=(mx.zeros((1, 9, 768)), mx.zeros((1, 9, 2))))


def test_logits_are_float32_softcapped_and_from_the_tied_embedding():
    model = small_model()
    hidden = mx.random.normal((1, 3, 16), key=mx.random.key(0)) * 20
    table = np.array(model.model.decoder.embed_tokens.weight, np.float64)
    plain = np.array(hidden, np.float64) @ table.T
    got = model.logits(hidden)
    assert got.dtype == mx.float32
    assert np.abs(np.array(got) - 30 * np.tanh(plain / 30)).max() < 1e-4
    assert np.abs(plain).max() > 30 > np.abs(np.array(got)).max()


def test_conditioning_is_the_scaled_expected_embedding():
    model = small_model()
    processed = mx.random.normal((2, 3, 40), key=mx.random.key(1)) * 3
    p = np.exp(np.array(processed, np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = p @ np.array(model.model.decoder.embed_tokens.weight, np.float64) * 4
    assert np.abs(np.array(model.condition(processed)) - expected).max() < 1e-5


def test_conditioning_rounds_logits_to_the_models_dtype():
    model = small_model()
    model.set_dtype(mx.bfloat16)
    processed = mx.random.normal((1, 3, 40), key=mx.random.key(1)) * 8
    rounded = processed.astype(mx.bfloat16).astype(mx.float32)
    assert gap(model.condition(processed), model.condition(rounded)) == 0
    assert model.condition(processed).dtype == mx.bfloat16


def test_no_conditioning_is_conditioning_on_zeros():
    model = small_model()
    canvas = random_tokens(0, 1, 4)
    prefix = model.new_prefix()
    model.encode(random_tokens(1, 1, 6), prefix)
    zeros = mx.zeros((1, 4, 16))
    assert gap(model.denoise(canvas, prefix), model.denoise(canvas, prefix, zeros)) < 1e-6


def test_sorted_and_unsorted_experts_agree():
    """Many rows are sorted by expert, few are not; the same rows give the same result."""
    experts, router = small_model().model.decoder.layers[0].experts, small_model().model.decoder.layers[0].router
    x = mx.random.normal((50, 16), key=mx.random.key(0))
    indices, weights = router(x)
    together = experts(x, indices, weights)
    alone = mx.concatenate([experts(x[i : i + 5], indices[i : i + 5], weights[i : i + 5]) for i in range(0, 50, 5)])
    assert gap(together, alone) < 1e-5


def test_a_quantized_model_is_near_its_unquantized_model():
    plain, packed = small_model(hidden_size=64), small_model(hidden_size=64)
    nn.quantize(packed, 32, 8, class_predicate=lambda _, m: isinstance(m, nn.Embedding))
    processed = mx.random.normal((1, 4, 40), key=mx.random.key(0)) * 3
    assert packed.dtype == mx.float32
    assert 0 < gap(packed.condition(processed), plain.condition(processed)) < 0.1
    hidden = mx.random.normal((1, 4, 64), key=mx.random.key(0)) * 0.1
    assert 0 < gap(packed.logits(hidden), plain.logits(hidden)) < 0.1
