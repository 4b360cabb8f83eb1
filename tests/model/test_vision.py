"""The vision tower, and prompts with pictures, against Transformers' float32 outputs."""

import json
from functools import lru_cache

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import (
    DATA,
    FULL,
    RED,
    SLIDING,
    engine_of,
    gap,
    prompt_of,
    reference,
    refusal,
    small_config,
    small_model,
    square,
    strip,
)

import mlx_dgemma
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.decoding.prefill import chunks, prefill
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model.vision import VisionTower
from mlx_dgemma.prompt.images import open_image, patchify

BOUND = 1e-4
TOWER = "model.encoder.vision_tower"
LAYERS = SLIDING, FULL


@pytest.fixture(scope="module")
def engine():
    return engine_of(DEMO)


# From the PNG files to the logits.

REFERENCES = {"image": (70, ["image_0"]), "two_images": (70, ["two_images_0", "two_images_1"])}
REFERENCES["wide_image"] = (140, ["image_0"])  # 120 soft tokens, the sliding window is 96


@lru_cache(maxsize=3)
def encoded(name):
    """(paths, soft tokens) of a reference's pictures."""
    budget, files = REFERENCES[name]
    paths = [DATA / f"{file}.png" for file in files]
    joined = patchify([open_image(path) for path in paths], budget)
    return paths, engine_of(DEMO).model.encode_images((joined.patches, joined.positions))


@pytest.mark.parametrize("name", ["image", "two_images"])
def test_features_of_the_committed_pictures_equal_transformers(name):
    assert gap(encoded(name)[1], reference(name)["features"]) < BOUND


@pytest.mark.parametrize("name", REFERENCES)
def test_the_prompt_is_the_references(engine, name):
    paths, _ = encoded(name)
    expected = reference(name)["input_ids"][0].tolist()
    question, budget = "Describe the image.", REFERENCES[name][0]
    assert prompt_of(engine, question, paths, image_tokens=budget).tokens == expected
    parts = [*({"type": "image", "image": path} for path in paths), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    assert prompt_of(engine, messages, image_tokens=budget).tokens == expected


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 2048])
@pytest.mark.parametrize("name", REFERENCES)
def test_logits_behind_a_picture_equal_transformers_for_every_chunk(engine, name, chunk):
    """A chunk of 64 ends in the second picture unless it is kept whole; `wide_image` is longer than the window."""
    held, prefix = reference(name), engine.model.new_prefix()
    prefill(engine.model, prefix, np.array(held["input_ids"]), chunk, features=[encoded(name)[1]])
    got = engine.model.logits(engine.model.denoise(held["canvas"], prefix))[:, ::4]
    assert gap(got, held["logits"]) < BOUND


def test_hidden_states_of_a_wide_picture_equal_transformers(engine):
    """Only hidden states show the last layer's attention: the prefix holds no more than its keys and values."""
    held, prefix = reference("wide_image"), engine.model.new_prefix()
    hidden = engine.model.encode(held["input_ids"], prefix, features=encoded("wide_image")[1])
    assert gap(hidden[:, ::4], held["encoder_hidden"]) < BOUND


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.06), ("float16", 0.01)])
def test_half_precision_towers_are_near_the_reference(dtype, bound):
    held = reference("image")
    model = mlx_dgemma.load(DEMO, dtype=dtype).model
    features = model.encode_images((held["pixel_values"], held["image_position_ids"]))
    assert features.dtype == getattr(mx, dtype)
    assert 0 < gap(features.astype(mx.float32), held["features"]) < bound


def test_features_may_leave_float16_until_they_are_standardized(tmp_path):
    vision, weights, held = tower("plain")
    loud = f"{TOWER}.encoder.layers.1.post_feedforward_layernorm.weight"
    weights = {**weights, loud: weights[loud] * 1e4, f"{TOWER}.std_scale": weights[f"{TOWER}.std_scale"] * 1e-4}
    half, single = (build(checkpoint(tmp_path, vision, weights), dtype) for dtype in ("float16", "float32"))
    features, exact = (one.model.encoder.vision_tower(held["patches"], held["positions"]) for one in (half, single))
    assert mx.abs(exact).max() > 6.5504  # 10,000 times that exceeds the range of float16
    assert gap(features.astype(mx.float32), exact) < 0.1


# Chunks.


def test_chunks_cover_all_columns_and_cut_no_run_of_any_row():
    random = np.random.default_rng(0)
    for _ in range(400):
        rows, length, size = random.integers(1, 4), random.integers(1, 40), int(random.integers(1, 20))
        flips = random.random((rows, length)) < random.choice([0.05, 0.2, 0.5])
        held = (np.cumsum(flips, axis=1) + random.integers(0, 2, (rows, 1))) % 2 == 1
        cuts = list(chunks(held, size))
        assert [start for start, _ in cuts] == [0, *(end for _, end in cuts[:-1])]
        assert cuts[-1][1] == length and all(start < end for start, end in cuts)
        joined = [0, *(held[:, 1:] & held[:, :-1]).any(axis=0)]  # this column and the one before are one picture
        for start, end in cuts:
            assert end == length or not joined[end]
            if end - start > size:  # only where every border but the last would cut, and no further than needed
                assert all(joined[start + 1 : end])
            elif end < length:  # as long as it may be
                assert all(joined[end + 1 : start + size + 1])


@pytest.mark.parametrize(("length", "size"), [(1, 1), (10, 3), (12, 4), (5, 100)])
def test_chunks_without_pictures_are_plain(length, size):
    plain = [(start, min(start + size, length)) for start in range(0, length, size)]
    assert list(chunks(np.zeros((2, length), bool), size)) == plain


# The tower against Transformers, with settings that the demo does not have.


@lru_cache(maxsize=2)
def tower(name):
    """(vision_config, tensors of a checkpoint, inputs and outputs)."""
    arrays, metadata = mx.load(str(DATA / "towers.safetensors"), return_metadata=True)
    own = {key.removeprefix(f"{name}/"): one for key, one in arrays.items() if key.startswith(f"{name}/")}
    weights = {key: one for key, one in own.items() if key.startswith("model.")}
    held = {key: one for key, one in own.items() if key not in weights}
    held["patches"] = held["patches"].astype(mx.float32) / 255
    return json.loads(metadata[name]), weights, held


def checkpoint(folder, vision, weights):
    """A checkpoint with vision: a random text stack and the tower's tensors."""
    config = {**small_config(LAYERS), "vision_config": vision, "image_token_id": 7}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(small_model(layers=LAYERS).parameters())) | weights
    )
    return Checkpoint.open(folder)


@lru_cache(maxsize=2)
def tower_model(name, folder):
    return build(checkpoint(folder, *tower(name)[:2]))


@pytest.fixture(params=["clipped", "plain"])
def small(request, tmp_path_factory):
    """(model, inputs and outputs): three pictures of different sizes, padded to the largest."""
    held = tower(request.param)[2]
    return tower_model(request.param, tmp_path_factory.getbasetemp()), held


def test_a_tower_of_either_kind_equals_transformers(small):
    """With clipped linears, fewer key heads and no standardization, or with stored bounds that are ignored."""
    model, held = small
    encoder = model.model.encoder
    features = encoder.vision_tower(held["patches"], held["positions"])
    assert gap(features, held["features"]) < BOUND
    assert gap(encoder.embed_vision(features), held["soft_tokens"]) < BOUND


def test_bounds_are_loaded_where_linears_clip_and_ignored_elsewhere(tmp_path):
    for name, clips in (("clipped", True), ("plain", False)):
        vision, weights, _ = tower(name)
        bound = f"{TOWER}.encoder.layers.1.mlp.up_proj.output_max"
        assert bound in weights
        parameters = dict(tree_flatten(build(checkpoint(tmp_path, vision, weights)).parameters()))
        assert (bound in parameters) is clips
        assert not clips or parameters[bound].item() == weights[bound].item()
        assert (f"{TOWER}.std_bias" in parameters) is not clips


@pytest.mark.parametrize(
    ("name", "lost"),
    [("clipped", f"{TOWER}.encoder.layers.0.self_attn.q_proj.input_min"), ("plain", f"{TOWER}.std_scale")],
)
def test_a_tower_that_lacks_a_tensor_is_refused(tmp_path, name, lost):
    vision, weights, _ = tower(name)
    held = checkpoint(tmp_path, vision, {key: one for key, one in weights.items() if key != lost})
    assert refusal(CheckpointError, build, held) == f"The checkpoint lacks {lost}; download it again."


def test_a_padded_batch_equals_each_picture_alone(small):
    model, held = small
    alone = []
    for patches, positions in zip(held["patches"], held["positions"]):
        real = int((positions[:, 0] >= 0).sum().item())
        alone.append(model.encode_images((patches[None, :real], positions[None, :real])))
    together = model.encode_images((held["patches"], held["positions"]))
    assert len({len(one) for one in alone}) > 1
    assert gap(together, mx.concatenate(alone)) < 1e-5
    junk = mx.where((held["positions"] < 0)[..., :1], 0.9, held["patches"])
    assert (
        gap(model.encode_images((junk, held["positions"])), together) < 1e-5
    )  # the content of the padding does not matter


def test_groups_and_chunks_of_queries_change_nothing(small, monkeypatch):
    model, held = small
    many = tuple(mx.concatenate([held[name], held[name][:2]]) for name in ("patches", "positions"))
    whole, sizes, real = model.encode_images(many), [], VisionTower.__call__

    def spied(self, patches, positions):
        sizes.append(len(patches))
        return real(self, patches, positions)

    monkeypatch.setattr(VisionTower, "__call__", spied)
    for limit, groups in ((1, [1] * 5), (2 * many[0].shape[1], [2, 2, 1]), (10**6, [5])):
        monkeypatch.setattr("mlx_dgemma.model.diffusion_gemma.PATCHES_AT_ONCE", limit)
        for rows in (1, 7, 10**6):
            monkeypatch.setattr("mlx_dgemma.model.vision.QUERY_CHUNK", rows)
            sizes.clear()
            assert gap(model.encode_images(many), whole) < 1e-5
            assert sizes == groups


def peak(model, patches):
    """Bytes that encoding pictures takes at its peak, above what is in memory before."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.encode_images(patches))
    return mx.get_peak_memory() - before


def test_memory_does_not_grow_with_the_number_of_pictures(engine, monkeypatch):
    one = patchify([strip(RED)], 70)
    few, many = (tuple(mx.repeat(mx.array(a), n, axis=0) for a in (one.patches, one.positions)) for n in (2, 10))
    mx.eval(few, many)
    monkeypatch.setattr("mlx_dgemma.model.diffusion_gemma.PATCHES_AT_ONCE", 2 * one.patches.shape[1])
    assert peak(engine.model, many) < 1.2 * peak(engine.model, few)
    monkeypatch.setattr("mlx_dgemma.model.diffusion_gemma.PATCHES_AT_ONCE", 10**6)
    assert peak(engine.model, many) > 3 * peak(engine.model, few)  # without groups the memory does grow


def test_memory_does_not_grow_with_the_square_of_patches(engine, monkeypatch):
    held = patchify([square(RED)], 140)
    pictures = mx.array(held.patches), mx.array(held.positions)
    mx.eval(pictures)
    whole = peak(engine.model, pictures)
    monkeypatch.setattr("mlx_dgemma.model.vision.QUERY_CHUNK", 128)
    assert peak(engine.model, pictures) < 0.6 * whole
