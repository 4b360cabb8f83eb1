"""States of a prefix: rewinding, dropping rows, undoing writes, forks, saving and trimming; window 5, canvas 4."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from support import gap, random_tokens, small_model

from mlx_dgemma.model.kv_cache import BUFFER_STEP


@pytest.fixture(scope="module")
def model():
    return small_model(1)


def after_encoding(model, tokens, canvas):
    """Hidden states of a canvas after a fresh prefix of these tokens."""
    prefix = model.new_prefix()
    model.encode(tokens, prefix)
    return model.denoise(canvas, prefix)


@pytest.mark.parametrize(("length", "back"), [(4, 2), (4, 4), (3, 1), (4, 0)])
def test_rewinding_within_the_ring_needs_no_rewind_point(model, length, back):
    tokens, other, canvas = random_tokens(0, 1, length), random_tokens(1, 1, 7), random_tokens(2, 1, 4)
    prefix = model.new_prefix()
    model.encode(tokens, prefix)
    model.denoise(canvas, prefix)
    assert prefix.rewind(back) == back == prefix.offset
    model.encode(other, prefix)
    expected = after_encoding(model, mx.concatenate([tokens[:, :back], other], axis=1), canvas)
    assert gap(model.denoise(canvas, prefix), expected) < 1e-5


@pytest.mark.parametrize("marked", [3, 4, 8])
def test_rewinding_to_a_rewind_point_restores_the_rings(model, marked):
    tokens, block, other, canvas = (random_tokens(i, 1, n) for i, n in enumerate((marked, 9, 6, 4)))
    prefix = model.new_prefix()
    model.encode(tokens, prefix)
    prefix.set_rewind_point()
    for _ in range(2):  # the rewind point can be used again
        model.denoise(canvas, prefix)
        model.encode(block, prefix)
        model.denoise(canvas, prefix)
        assert prefix.rewind(marked + 2) == marked == prefix.offset
        model.encode(other, prefix)
        expected = after_encoding(model, mx.concatenate([tokens, other], axis=1), canvas)
        assert gap(model.denoise(canvas, prefix), expected) < 1e-5
        assert prefix.rewind(marked) == marked


def test_rings_that_a_rewind_point_fills_exactly_hold_every_position(model):
    tokens, block, canvas = random_tokens(0, 1, 4), random_tokens(1, 1, 9), random_tokens(2, 1, 4)
    prefix = model.new_prefix()
    model.encode(tokens, prefix)
    prefix.set_rewind_point()
    model.encode(block, prefix)
    assert prefix.rewind(2) == 2 == prefix.offset
    assert gap(model.denoise(canvas, prefix), after_encoding(model, tokens[:, :2], canvas)) < 1e-5


@pytest.mark.parametrize("length", [5, 9])  # the ring holds 4
def test_rewinding_before_the_rewind_point_or_without_one_leaves_nothing(model, length):
    tokens, canvas = random_tokens(0, 1, length), random_tokens(2, 1, 4)
    for mark in (False, True):
        prefix = model.new_prefix()
        model.encode(tokens, prefix)
        if mark:
            prefix.set_rewind_point()
        assert prefix.rewind(length - 1) == 0 == prefix.offset
        model.encode(tokens, prefix)
        assert gap(model.denoise(canvas, prefix), after_encoding(model, tokens, canvas)) < 1e-5


def test_rewinding_to_before_the_rewind_point_drops_it(model):
    """After a rewind to before the rewind point, its rings hold dropped positions and must not be restored."""
    tokens, other, canvas = random_tokens(0, 1, 3), random_tokens(1, 1, 9), random_tokens(2, 1, 4)
    prefix = model.new_prefix()
    model.encode(tokens, prefix)
    prefix.set_rewind_point()
    assert prefix.rewind(1) == 1
    model.encode(other, prefix)
    assert prefix.rewind(5) == 0
    model.encode(other, prefix)
    assert gap(model.denoise(canvas, prefix), after_encoding(model, other, canvas)) < 1e-5


def test_rewinding_to_the_end_changes_nothing(model):
    prefix = model.new_prefix()
    model.encode(random_tokens(0, 1, 9), prefix)
    assert prefix.rewind(9) == 9
    assert prefix.rewind(100) == 9 == prefix.offset


def test_select_rows_drops_the_other_rows(model):
    tokens, canvas, more = random_tokens(0, 3, 8), random_tokens(1, 3, 4), random_tokens(2, 3, 5)
    mask = np.arange(8)[None] >= np.array([[2], [0], [5]])
    prefix = model.new_prefix(3)
    model.encode(tokens, prefix, mask=mask)
    expected = model.denoise(canvas, prefix)
    prefix.select_rows([2, 0])
    kept = mx.array([2, 0])
    assert prefix.batch_size == 2
    assert prefix.padding.tolist() == [5, 2]
    assert gap(model.denoise(canvas[kept], prefix), expected[kept]) < 1e-5
    model.encode(more[kept], prefix)
    alone = after_encoding(model, mx.concatenate([tokens[2:, 5:], more[2:]], axis=1), canvas[2:])
    assert gap(model.denoise(canvas[kept], prefix)[:1], alone) < 1e-5


def test_select_rows_drops_the_rewind_point(model):
    prefix = model.new_prefix(2)
    model.encode(random_tokens(0, 2, 8), prefix)
    prefix.set_rewind_point()
    prefix.select_rows([1])
    model.encode(random_tokens(1, 1, 3), prefix)
    assert prefix.rewind(9) == 0


def test_buffers_grow_in_steps_unless_capacity_is_given(model):
    def slots(prefix):
        return [layer.keys.shape[2] for layer in prefix.layers]

    prefix, roomy = model.new_prefix(), model.new_prefix(capacity=BUFFER_STEP + 1)
    for one in (prefix, roomy):
        model.encode(random_tokens(0, 1, 10), one)
    assert slots(prefix) == [BUFFER_STEP, BUFFER_STEP, BUFFER_STEP]
    assert slots(roomy) == [BUFFER_STEP, BUFFER_STEP, 2 * BUFFER_STEP]
    assert prefix.nbytes == 4 * 2 * BUFFER_STEP * (2 * 8 + 1 * 16 + 2 * 8)
    model.encode(random_tokens(1, 1, BUFFER_STEP), prefix)
    assert slots(prefix) == [BUFFER_STEP, BUFFER_STEP, 2 * BUFFER_STEP]
    before = after_encoding(
        model,
        mx.concatenate([random_tokens(0, 1, 10), random_tokens(1, 1, BUFFER_STEP)], axis=1),
        random_tokens(2, 1, 4),
    )
    assert gap(model.denoise(random_tokens(2, 1, 4), prefix), before) < 1e-5


def test_an_empty_prefix_holds_no_memory(model):
    prefix = model.new_prefix()
    assert prefix.nbytes == 0
    assert prefix.state == []


@pytest.mark.parametrize("length", [3, 9])
def test_restore_undoes_what_was_written_since_handles(model, length):
    """In rings that have wrapped and that have not, all arrays are the same bit for bit as before the canvas."""
    prefix = model.new_prefix()
    model.encode(random_tokens(0, 1, length), prefix)
    mx.eval(model.denoise(random_tokens(1, 1, 4), prefix))
    before = [np.array(array) for array in prefix.state]
    handles = prefix.handles()
    hidden = model.denoise(random_tokens(2, 1, 4), prefix)
    mx.eval(hidden, prefix.state)
    assert any((np.array(now) != old).any() for now, old in zip(prefix.state, before))
    prefix.restore(handles)
    assert all((np.array(now) == old).all() for now, old in zip(prefix.state, before))
    assert gap(model.denoise(random_tokens(2, 1, 4), prefix), hidden) == 0


def test_what_was_undone_is_never_computed(model):
    """A lazy canvas that would take 64 MiB is undone: neither the next canvas nor a commit computes it."""
    peaks = []
    for forget in (True, False):
        prefix = model.new_prefix()
        model.encode(random_tokens(0, 1, 7), prefix)
        mx.eval(prefix.state)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        handles = prefix.handles()
        model.denoise(random_tokens(1, 1, 4) + (mx.arange(2**24, dtype=mx.int32).sum() * 0).astype(mx.int32), prefix)
        if forget:
            prefix.restore(handles)
        mx.eval(model.encode(random_tokens(2, 1, 4), prefix), model.denoise(random_tokens(3, 1, 4), prefix))
        mx.eval(prefix.state)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < 2**24 < 2**25 < peaks[1]


def test_restoring_an_empty_prefix_empties_it(model):
    prefix = model.new_prefix()
    handles = prefix.handles()
    model.denoise(random_tokens(1, 1, 4), prefix)
    assert prefix.nbytes > 0
    prefix.restore(handles)
    assert prefix.state == []
    assert prefix.nbytes == 0


@pytest.mark.parametrize("kept", [True, False])
def test_a_write_copies_the_buffers_while_handles_are_kept_and_not_after(model, kept):
    """Either way the canvas is the same as without handles."""
    prefix, fresh = (model.new_prefix(capacity=40_000) for _ in range(2))
    for one in (prefix, fresh):
        model.encode(random_tokens(0, 1, 7), one)
        mx.eval(model.denoise(random_tokens(1, 1, 4), one), one.state)
    full = prefix.layers[2].keys.nbytes
    handles = prefix.handles()
    if not kept:
        del handles
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    hidden = model.denoise(random_tokens(2, 1, 4), prefix)
    mx.eval(hidden, prefix.state)
    copied = mx.get_peak_memory() - before
    assert copied > 2 * full if kept else copied < full / 2
    assert gap(hidden, model.denoise(random_tokens(2, 1, 4), fresh)) == 0


def test_stages_are_the_layers_keys_as_they_are_now(model):
    prefix = model.new_prefix()
    assert prefix.stages == [None, None, None]
    model.encode(random_tokens(0, 1, 7), prefix)
    stages = prefix.stages
    held_now = [np.array(prefix.layers[i].keys) for i in range(3)]
    mx.eval(model.denoise(random_tokens(1, 1, 4), prefix))  # writes; the arrays that were returned stay
    assert [np.array(one).tolist() for one in stages] == [one.tolist() for one in held_now]


# Rewinding, forking, saving and trimming.


def prefix_of(model, tokens, mark=None):
    """An encoded prefix with a rewind point at `mark`."""
    prefix = model.new_prefix()
    for start, end in pairwise(sorted({0, mark or 0, tokens.shape[1]})):
        model.encode(tokens[:, start:end], prefix)
        if end == mark:
            prefix.set_rewind_point()
    return prefix


def seen(model, prefix):
    """Hidden states of a canvas and of a commit after a prefix, which is not changed."""
    prefix = prefix.fork()
    canvas = model.denoise(random_tokens(1, 1, 4), prefix)
    return mx.concatenate(
        [canvas, model.encode(random_tokens(2, 1, 3), prefix), model.denoise(random_tokens(3, 1, 4), prefix)], 1
    )


@pytest.mark.parametrize("length", [3, 5, 8])  # the ring holds 4
def test_rewindable_length_is_what_rewind_keeps(model, length):
    tokens = random_tokens(0, 1, length)
    fresh = {n: seen(model, prefix_of(model, tokens[:, :n])) for n in range(1, length + 1)}
    kept = set()
    for mark in [None, *range(1, length + 1)]:
        prefix = prefix_of(model, tokens, mark)
        for offset in range(length + 2):
            other = prefix.fork()
            reached = prefix.rewindable_length(offset)
            assert (other.rewind(offset), other.offset) == (reached, reached), (mark, offset)
            assert reached <= offset
            if reached:
                assert gap(seen(model, other), fresh[reached]) < 1e-5, (mark, offset)
            kept.add(reached)
        assert prefix.offset == length  # the call changes nothing
    assert kept == set(range(length + 1))


@pytest.mark.parametrize("length", [3, 9])
def test_forks_are_independent(model, length):
    prefix = prefix_of(model, random_tokens(0, 1, length), 2)
    before = seen(model, prefix)
    other = prefix.fork()
    for one, beside in ((prefix, other), (other, prefix)):
        mx.eval(model.denoise(random_tokens(5, 1, 4), one), model.encode(random_tokens(6, 1, 9), one))
        one.set_rewind_point()
        if one is prefix:
            assert gap(seen(model, beside), before) == 0
            assert (beside.offset, beside.rewindable_length(2), beside.rewindable_length(length)) == (length, 2, length)
    assert gap(seen(model, prefix), seen(model, other)) == 0
    assert other.rewind(length) == 0
    assert (prefix.offset, prefix.rewindable_length(length + 9)) == (length + 9, length + 9)


@pytest.mark.parametrize(("length", "mark"), [(3, None), (3, 2), (3, 3), (9, None), (9, 3), (9, 6), (9, 9)])
def test_arrays_that_were_saved_can_be_loaded(model, length, mark):
    prefix, other = prefix_of(model, random_tokens(0, 1, length), mark), model.new_prefix()
    arrays, offset, marked = prefix.to_arrays()
    assert (offset, marked) == (length, mark or 0)
    other.load_arrays(arrays, offset, marked)
    assert gap(seen(model, other), seen(model, prefix)) == 0
    assert [other.rewindable_length(n) for n in range(11)] == [prefix.rewindable_length(n) for n in range(11)]
    back = marked or length
    assert other.rewind(back) == prefix.rewind(back) == back
    assert gap(seen(model, other), seen(model, prefix)) == 0


def test_loading_names_the_missing_array(model):
    arrays, offset, mark = prefix_of(model, random_tokens(0, 1, 9), 5).to_arrays()
    for name in ("0.keys", "1.values", "mark.1.keys"):
        with pytest.raises(KeyError, match=f"^'{name}'$"):
            model.new_prefix().load_arrays({key: array for key, array in arrays.items() if key != name}, offset, mark)


@pytest.mark.parametrize(("length", "mark"), [(3, None), (3, 3), (9, None), (9, 3), (9, 9)])
def test_trimming_frees_unused_slots_and_changes_nothing(model, length, mark):
    prefix = prefix_of(model, random_tokens(0, 1, length), mark)
    mx.eval(model.denoise(random_tokens(4, 1, 4), prefix))
    before, reached = seen(model, prefix), [prefix.rewindable_length(n) for n in range(11)]
    prefix.trim()
    slots = 2 * 4 * (2 * 2 * 8 * min(length, 4) + 16 * length)  # bytes of keys and values
    marked = 2 * 4 * 2 * 2 * 8 * 256 * (mark is not None and mark < length)
    assert prefix.nbytes == slots + marked
    assert gap(seen(model, prefix), before) == 0
    assert [prefix.rewindable_length(n) for n in range(11)] == reached
    mx.eval(model.denoise(random_tokens(4, 1, 4), prefix))  # it grows again
    assert gap(seen(model, prefix), before) == 0


@pytest.mark.parametrize("bits", [None, 8])
def test_trimmed_buffers_grow_to_what_attention_is_promised(bits):
    """A number of keys that is a multiple of the alignment, where the prefix ends within it of the buffer's end."""
    model = small_model(1, global_head_dim=64).eval()
    model.kv_bits = bits
    prefix = prefix_of(model, random_tokens(0, 1, 13))
    prefix.trim()
    layer, new = prefix.layers[2], mx.zeros((1, 1, 3, 64))
    assert layer.extend(new, new, 9, 8)[0].shape[2] == 16
    assert layer.with_canvas(new, new, 9, 8)[0].shape[2] == 16
