"""Encoding and denoising with a prefix against the naive model: chunks, rings, padding; window 5, canvas 4."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from naive import Naive
from support import FULL, gap, random_tokens, small_model

from mlx_dgemma.errors import OptionError

BOUND = 2e-4


@pytest.fixture(scope="module")
def model():
    return small_model(1)


@pytest.fixture(scope="module")
def naive(model):
    return Naive(model)


def chunks_of(length, random):
    """A random way to cut `length` positions."""
    cuts = sorted({0, length, *random.integers(1, length, 3).tolist()})
    return list(pairwise(cuts))


def far(a, b):
    return np.abs(np.array(a, np.float64) - b).max()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 6, 9, 17, 30])
def test_any_chunking_equals_one_naive_pass(model, naive, length):
    tokens, canvas = random_tokens(length, 1, length), random_tokens(99, 1, 4)
    hidden, kept = naive.encode(tokens[0].tolist())
    denoised = naive.denoise(canvas[0].tolist(), kept)
    random = np.random.default_rng(length)
    ways = [
        [(0, length)],
        [(i, i + 1) for i in range(length)],
        *(chunks_of(length, random) for _ in range(4 * (length > 1))),
    ]
    for way in ways:
        prefix = model.new_prefix()
        got = mx.concatenate([model.encode(tokens[:, a:b], prefix) for a, b in way], axis=1)
        assert far(got[0], hidden) < BOUND, way
        assert far(model.denoise(canvas, prefix)[0], denoised) < BOUND, way


@pytest.mark.parametrize("layers", [(FULL,), (FULL, FULL)])
def test_stacks_of_one_kind_of_layer(layers):
    model = small_model(2, layers=layers)
    tokens, canvas = random_tokens(0, 1, 11), random_tokens(1, 1, 4)
    hidden, kept = Naive(model).encode(tokens[0].tolist())
    prefix = model.new_prefix()
    got = [model.encode(tokens[:, :7], prefix), model.encode(tokens[:, 7:], prefix)]
    assert far(mx.concatenate(got, axis=1)[0], hidden) < BOUND
    assert far(model.denoise(canvas, prefix)[0], Naive(model).denoise(canvas[0].tolist(), kept)) < BOUND


def test_a_conditioned_canvas_equals_the_naive_pass(model, naive):
    tokens, canvas = random_tokens(0, 1, 9), random_tokens(1, 1, 4)
    prefix = model.new_prefix()
    model.encode(tokens, prefix)
    conditioning = mx.random.normal((1, 4, 16), key=mx.random.key(0))
    _, kept = naive.encode(tokens[0].tolist())
    expected = naive.denoise(canvas[0].tolist(), kept, np.array(conditioning[0], np.float64))
    hidden = model.denoise(canvas, prefix, conditioning)
    assert far(hidden[0], expected) < BOUND
    assert far(model.logits(hidden)[0], naive.logits(expected)) < 10 * BOUND


def test_a_canvas_may_be_longer_than_the_ring(model, naive):
    tokens, canvas = random_tokens(0, 1, 9), random_tokens(1, 1, 13)
    prefix = model.new_prefix()
    model.encode(tokens, prefix)
    _, kept = naive.encode(tokens[0].tolist())
    assert far(model.denoise(canvas, prefix)[0], naive.denoise(canvas[0].tolist(), kept)) < BOUND


def test_a_canvas_may_come_before_any_prefix(model):
    canvas = random_tokens(1, 1, 4)
    naive = Naive(model)
    empty = [
        (np.zeros((0, *naive.config.kv_shape(k))), np.zeros((0, *naive.config.kv_shape(k))))
        for k in naive.config.layer_types
    ]
    assert far(model.denoise(canvas, model.new_prefix())[0], naive.denoise(canvas[0].tolist(), empty)) < BOUND


@pytest.mark.parametrize("cut", [2, 4, 9])
def test_image_spans_see_themselves_in_both_directions(model, naive, cut):
    """The span starts at `cut`, so that it begins a chunk and the ring is filled differently."""
    tokens = random_tokens(3, 1, 17)
    spans = np.zeros(17, np.int32)
    spans[cut : cut + 6], spans[cut + 7 : cut + 8] = 1, 2
    hidden, _ = naive.encode(tokens[0].tolist(), spans)
    plain, _ = naive.encode(tokens[0].tolist())
    assert np.abs(hidden - plain).max() > 0.01  # the spans matter
    prefix = model.new_prefix()
    before = model.encode(tokens[:, :cut], prefix)
    masks = prefix.encode_masks(17 - cut, spans[None, cut:])
    after = model._run(model._embed(tokens[:, cut:]), [prefix], [masks], encoder=True, canvas=False)
    assert far(mx.concatenate([before, after], axis=1)[0], hidden) < BOUND


def test_denoising_leaves_the_prefix_as_it_was(model):
    """Denoise canvases of several lengths; everything that is computed afterwards is the same bit for bit."""
    tokens, canvas, more = random_tokens(0, 1, 14), random_tokens(1, 1, 4), random_tokens(2, 1, 7)

    def run(disturb):
        prefix = model.new_prefix()
        out = []
        for start, end in ((0, 3), (3, 9), (9, 14)):
            out.append(model.encode(tokens[:, start:end], prefix))
            for length in (1, 4, 9) if disturb else ():
                mx.eval(model.denoise(random_tokens(50 + length, 1, length), prefix))
            out.append(model.denoise(canvas, prefix))
        return [*out, model.encode(more, prefix), model.denoise(canvas, prefix)], prefix.offset

    (quiet, reached), (disturbed, after) = run(False), run(True)
    assert reached == after == 21
    assert [gap(a, b) for a, b in zip(quiet, disturbed)] == [0.0] * 8


@pytest.mark.parametrize("chunk", [2, 6, 40])
def test_a_padded_row_equals_the_row_alone(model, naive, chunk):
    lengths, width, more = [3, 12, 7, 11], 12, random_tokens(5, 4, 6)
    rows = [random_tokens(10 + n, 1, n) for n in lengths]
    tokens = mx.concatenate([mx.pad(row, ((0, 0), (width - row.shape[1], 0))) for row in rows])
    mask = np.arange(width)[None] >= width - np.array(lengths)[:, None]
    canvas = random_tokens(6, 4, 4)
    prefix = model.new_prefix(4)
    for at in range(0, width, chunk):
        model.encode(tokens[:, at : at + chunk], prefix, mask=mask[:, at : at + chunk])
    assert prefix.padding.tolist() == [9, 0, 5, 1]
    assert prefix.rope_offset().tolist() == lengths
    first = model.denoise(canvas, prefix)
    committed = model.encode(more, prefix)
    second = model.denoise(canvas, prefix)
    for row, tokens in enumerate(rows):
        alone = model.new_prefix()
        model.encode(tokens, alone)
        assert gap(first[row], model.denoise(canvas[row : row + 1], alone)[0]) < 1e-5
        assert gap(committed[row], model.encode(more[row : row + 1], alone)[0]) < 1e-5
        assert gap(second[row], model.denoise(canvas[row : row + 1], alone)[0]) < 1e-5
        whole = [*tokens[0].tolist(), *more[row].tolist()]
        expected = naive.denoise(canvas[row].tolist(), naive.encode(whole)[1])
        assert far(second[row], expected) < BOUND


def test_a_mask_without_padding_is_no_mask(model):
    prefix = model.new_prefix()
    model.encode(random_tokens(0, 1, 3), prefix, mask=np.ones((1, 3), bool))
    assert prefix.padding is None
    assert prefix.rope_offset() == 3


def test_pad_refuses_what_is_no_left_padding(model):
    behind = "^mask pads positions behind real ones; only padding on the left is possible.$"
    with pytest.raises(OptionError, match=behind):
        model.new_prefix().pad([[1, 0, 1]])
    with pytest.raises(OptionError, match=behind):
        model.new_prefix().pad([[1, 0]])
    prefix = model.new_prefix(2)
    model.encode(random_tokens(0, 2, 3), prefix, mask=np.array([[0, 0, 1], [0, 0, 0]], bool))
    with pytest.raises(OptionError, match=behind):
        prefix.pad([[0, 1], [1, 1]])  # the first row has begun already
    prefix.pad([[1, 1], [0, 1]])
    assert prefix.padding.tolist() == [2, 4]


def test_pad_refuses_another_shape(model):
    with pytest.raises(OptionError, match=r"^mask has the shape \(3,\); it should be \[batch_size = 2, L\].$"):
        model.new_prefix(2).pad([1, 1, 1])
    with pytest.raises(OptionError, match=r"^mask has the shape \(1, 3\); it should be \[batch_size = 2, L\].$"):
        model.new_prefix(2).pad([[1, 1, 1]])
