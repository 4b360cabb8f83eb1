"""Examples become batches: canvases, padding and pictures."""

import json

import mlx.core as mx
import numpy as np
import pytest
from support import RED, square

import mlx_dgemma
from mlx_dgemma.tune.batches import Batches, example_index, split_into_canvases
from mlx_dgemma.tune.data import Example, Target, read
from mlx_dgemma.tune.objective import VARIANTS, Noise, draw_noise, loss


def test_an_answer_is_split_into_canvases():
    target = Target([1, 2], [3, 4, 5, 6, 7], [])
    assert [(one.prefix, one.tokens, one.answer_length) for one in split_into_canvases(target, 4, 9)] == [
        ([1, 2], [3, 4, 5, 6], 4),
        ([1, 2, 3, 4, 5, 6], [7, 9, 9, 9], 1),
    ]


class Sizes:
    """The part of an engine that batches use."""

    class config:
        canvas_length = 4


def test_batches_are_padded_on_the_left_and_depend_on_the_sample_number():
    examples = [Example(f"line {i}", [Target(list(range(1, 2 + i)), [20 + i] * (3 + 2 * i), [])], {}) for i in range(4)]
    batches = Batches(Sizes(), examples, 9, False, 3)
    batch = batches.batch([0, 3], [5, 6])
    longest = batch.tokens.shape[1]
    assert batch.tokens[0].tolist() == [0] * (longest - 1) + [1]
    assert batch.mask[0].tolist() == [False] * (longest - 1) + [True]
    assert batch.mask[1].all()
    assert batch.canvas[0].tolist() == [20, 20, 20, 9]
    assert batch.supervised[0].tolist() == [True, True, True, False]
    assert Batches(Sizes(), examples, 9, True, 3).batch([0], [5]).supervised.all()
    again = Batches(Sizes(), examples, 9, False, 3).batch([0, 3], [5, 6])
    assert all((a == b).all() for a, b in zip(vars(batch).values(), vars(again).values()) if isinstance(a, np.ndarray))
    cuts = {batches.batch([3], [number]).tokens.shape[1] for number in range(40)}
    assert cuts == {4, 8, 12}  # every canvas of the long answer comes up


def test_every_epoch_takes_each_example_once():
    epochs = [[example_index(7, 7 * epoch + i, 0) for i in range(7)] for epoch in range(3)]
    assert [sorted(one) for one in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_images_and_padding_belong_to_their_sample(tmp_path):
    """One sample has an image, the other has none; the batch's loss is the mean of their separate losses."""
    square(RED).save(tmp_path / "red.png")
    seen = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "What color is the shape?"}]
    lines = [
        {"messages": [{"role": "user", "content": seen}, {"role": "assistant", "content": "Scarlet."}]},
        {"prompt": "Say dog twice.", "completion": "dog dog"},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    engine = mlx_dgemma.load(dtype="float32")
    batches = Batches(engine, read(engine, tmp_path / "train.jsonl"), 0, True, 0)
    both = batches.batch([0, 1], [0, 1])
    placeholders = (both.tokens == engine.config.image_token_id).sum(axis=1)
    assert (both.features[0].shape[0], both.features[1]) == (placeholders[0], None)
    assert placeholders[0] > 0 and placeholders[1] == 0
    noise = draw_noise(both, VARIANTS["google"], 2048, mx.random.key(0))
    alone = []
    for i in range(2):
        own = Noise(noise.t[i : i + 1], noise.canvas[i : i + 1], noise.conditioned[i : i + 1])
        alone.append(loss(engine.model, batches.batch([i], [i]), own, VARIANTS["google"]))
    together = loss(engine.model, both, noise, VARIANTS["google"])
    for one, *each in zip(together, *alone):
        assert one.item() == pytest.approx(sum(part.item() for part in each) / 2, abs=1e-4)
