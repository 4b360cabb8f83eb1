"""The training objective against Transformers, and against its parts computed plainly."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import DATA, gap, random_tokens, small_model

import mlx_dgemma
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.model import rng
from mlx_dgemma.tune import objective
from mlx_dgemma.tune.objective import VARIANTS, Batch, Noise, checkpointed_layer, cross_entropy, draw_noise, loss

WEIGHTS = (
    "model.decoder.layers.1.self_attn.k_proj.weight",
    "model.decoder.layers.2.experts.down_proj.weight",
    "model.decoder.self_conditioning.gate_proj.weight",
)
CASES = {
    "text": ("google", [True, False, True]),
    "text_plain": ("google", [False, False, False]),
    "text_shifted": ("megatron-reweighted-loo", [False, True, True]),
    "text_by_token": ("nemo", [True, False, False]),
    "image": ("google", [True]),
    "image_plain": ("google", [False]),
}


@pytest.fixture(scope="module")
def model():
    """One of its own, since gradients put other arrays in the place of its weights."""
    return mlx_dgemma.load(DEMO).model


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_transformers(model, name):
    """Padded texts and an image, with and without self-conditioning; gradients within 1e-3 of the largest."""
    expected = {
        k: np.array(v) for k, v in mx.load(str(DATA / "objective.safetensors")).items() if k.startswith(f"{name}.")
    }
    expected = {key.removeprefix(f"{name}."): one for key, one in expected.items()}
    variant, conditioned = CASES[name]
    features = []
    if name.startswith("image"):
        image = {key: np.array(one) for key, one in mx.load(str(DATA / "image.safetensors")).items()}
        tokens = image["input_ids"].astype(np.int32)
        pixels = mx.array(image["pixel_values"].astype(np.float32) / 255)
        features = [model.encode_images((pixels, mx.array(image["image_position_ids"])))]
    else:
        tokens = expected["tokens"]
    real = np.ones(tokens.shape, bool)
    for row, pad in zip(real[1:], (3, 101)):
        row[:pad] = False
    length = model.config.canvas_length
    supervised = np.arange(length) < np.array([[length], [20], [3]])[: len(tokens)]
    batch = Batch(tokens, real, expected["canvas"], supervised, features)
    noise = Noise(mx.array(expected["t"]), mx.array(expected["noisy"]), np.array(conditioned))
    model.freeze()
    for path in WEIGHTS:
        module = model
        for part in path.split(".")[:-1]:
            module = module[int(part)] if isinstance(module, list) else module[part]
        module.unfreeze(keys="weight", recurse=False)
    asked = nn.value_and_grad(model, lambda: tuple(loss(model, batch, noise, VARIANTS[variant])))
    losses, gradients = asked()
    assert [one.item() for one in losses] == pytest.approx(expected["losses"].tolist(), abs=1e-4, rel=0)
    flat = dict(tree_flatten(gradients))
    for i, path in enumerate(WEIGHTS):
        mine, theirs = np.array(flat[path]), expected[str(i)]
        mine = mine.reshape(-1, mine.shape[-1])[::8]
        assert np.abs(mine - theirs).max() <= 1e-3 * max(np.abs(theirs).max(), 1e-3), path


def test_noise_replaces_tokens_with_probability_t():
    """New tokens are uniform, and the noise of a row only depends on its key."""
    keys = mx.random.split(mx.random.key(0), 3)
    tokens = mx.zeros((3, 4000), mx.int32)
    found = np.array(rng.corrupt(tokens, mx.array([0.0, 0.3, 1.0]), 50, keys))
    assert (found[0] == 0).all()
    changed = (found != 0).mean(axis=1)
    assert changed[1:] == pytest.approx([0.3 * 0.98, 0.98], abs=0.03)
    assert np.bincount(found[2], minlength=50).std() < 15
    alone = np.array(rng.corrupt(tokens[1:2], mx.array([0.3]), 50, keys[1:2]))
    assert (alone[0] == found[1]).all()


def test_noise_only_depends_on_the_key():
    tokens = np.zeros((4, 3), np.int32)
    batch = Batch(tokens, tokens == 0, np.ones((4, 6), np.int32), np.ones((4, 6), bool))
    nemo = VARIANTS["nemo"]
    one, same, other = (draw_noise(batch, nemo, 40, mx.random.key(key)) for key in (5, 5, 6))
    assert gap(one.t, same.t) == 0
    assert (np.array(one.canvas) == np.array(same.canvas)).all()
    assert gap(one.t, other.t) > 0
    many = Batch(*(np.repeat(a, 500, axis=0) for a in (batch.tokens, batch.mask, batch.canvas, batch.supervised)))
    noise = draw_noise(many, nemo, 40, mx.random.key(1))
    t = np.array(noise.t)
    assert t.min() >= nemo.noise_min and t.max() <= nemo.noise_max
    assert t.mean() == pytest.approx(0.5, abs=0.03)
    assert noise.conditioned.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("positions", [1, 3, 64])
def test_cross_entropy_in_chunks_equals_the_plain_one(monkeypatch, positions):
    model = small_model(0)
    monkeypatch.setattr(objective, "MAX_LOGITS_BYTES", 4 * 40 * positions)
    hidden, targets = mx.random.normal((10, 16), key=mx.random.key(0)), np.array(random_tokens(1, 10))
    seen, by = random_tokens(2, 10), mx.abs(mx.random.normal((10,), key=mx.random.key(1))) + 0.1
    seen = mx.where(mx.arange(10) < 3, mx.array(targets), seen)

    def plain(hidden, shifted):
        logits = model.logits(hidden[None])[0]
        if shifted:
            logits = logits + (mx.arange(40) == seen[:, None]) * by[:, None]
        return nn.losses.cross_entropy(logits, mx.array(targets))

    for shifted in (False, True):
        more = (by, seen) if shifted else ()
        assert gap(cross_entropy(model, hidden, targets, *more), plain(hidden, shifted)) < 1e-5
        mine = mx.grad(lambda h, more=more: cross_entropy(model, h, targets, *more).sum())(hidden)
        theirs = mx.grad(lambda h, shifted=shifted: plain(h, shifted).sum())(hidden)
        assert gap(mine, theirs) < 1e-5


def test_gradient_checkpointing_does_not_change_gradients():
    model = small_model(1)
    tokens, canvas = np.array(random_tokens(0, 2, 9)), np.array(random_tokens(1, 2, 4))
    real = np.arange(9) >= np.array([[0], [6]])
    batch = Batch(tokens, real, canvas, np.ones((2, 4), bool))
    noise = draw_noise(batch, VARIANTS["google"], 40, mx.random.key(0))._replace(conditioned=np.array([True, False]))

    def gradients():
        return nn.value_and_grad(model, lambda: tuple(loss(model, batch, noise, VARIANTS["google"])))()

    (before, _, _), kept = gradients()
    model._apply = checkpointed_layer
    (after, _, _), again = gradients()
    assert before.item() == pytest.approx(after.item(), abs=1e-6)
    for (path, a), (_, b) in zip(tree_flatten(kept), tree_flatten(again)):
        assert gap(a, b) <= 1e-5 * max(mx.abs(a).max().item(), 1), path
    assert len(tree_flatten(kept)) == len(tree_flatten(again)) == len(tree_flatten(model.parameters()))
