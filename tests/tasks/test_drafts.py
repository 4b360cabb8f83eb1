"""Drafts on canvases, and the sizes of short canvases."""

import mlx.core as mx
import pytest

from mlx_dgemma.decoding.control import fitting_size
from mlx_dgemma.tasks.edit import Drafted


def test_sizes_are_quarters_of_the_canvas():
    assert [fitting_size(count, 64) for count in (1, 16, 17, 32, 33, 48, 49, 64, 65, 1000)] == [
        16, 16, 32, 32, 48, 48, 64, 64, 64, 64
    ]  # fmt: skip
    assert [fitting_size(count, 256) for count in (64, 65)] == [64, 128]
    assert [fitting_size(count, 2) for count in (1, 2, 3)] == [1, 2, 2]
    assert [fitting_size(count, 6) for count in (1, 5, 6, 7)] == [1, 5, 6, 6]


def test_a_draft_begins_with_its_tokens():
    layout = Drafted([5, 6, 7], 9, 0, 16, 0).layout()
    assert layout.tokens.tolist() == [[5, 6, 7, 9, *[0] * 4]]
    assert layout.initial.all().item()
    assert not layout.fixed.any().item()
    noise = Drafted([5, 6, 7], 9, 1, 16, 0).layout()
    assert not noise.initial.any().item()
    assert Drafted([], 9, 0, 16, 0).layout() is None
    assert Drafted(range(40), 9, 0, 16, 0).layout().tokens.tolist() == [list(range(16))]
    assert Drafted(range(15), 9, 0, 16, 0).layout().tokens.tolist() == [[*range(15), 9]]
    assert Drafted(range(6), 9, 0, 16, 0).layout().tokens.shape == (1, 8)
    assert Drafted(range(7), 9, 0, 16, 0).layout().tokens.shape == (1, 12)  # eight, and a quarter more


def test_half_a_draft_is_noised_as_its_seed_says():
    layouts = [Drafted(range(200), 9, 0.25, 256, seed).layout().initial for seed in (0, 0, 1)]
    assert layouts[0].tolist() == layouts[1].tolist() != layouts[2].tolist()
    assert 0.65 < layouts[0].astype(mx.float32).mean().item() < 0.85


@pytest.mark.parametrize(
    ("draft", "canvas", "rest"),
    [
        (range(10, 20), range(10, 14), range(14, 20)),  # taken as it is
        (range(10, 20), [10, 11, 99, 13], range(14, 20)),  # a token replaced
        (range(10, 20), [10, 98, 99, 11], range(12, 20)),  # two put in
        (range(10, 20), [10, 12, 13, 14], range(15, 20)),  # one left out
        (range(10, 20), [10, 11, 98, 99], range(14, 20)),  # the end rewritten, which stands for as much
        (range(10, 20), [96, 97, 98, 99], range(14, 20)),  # nothing in common
        (range(10, 13), [10, 11, 12, 9], []),
        (range(10, 13), [96, 97, 98, 99], []),
        ([5, 5, 5, 6, 6, 6], [5, 5, 6, 6], [6]),
    ],
)
def test_a_draft_goes_on_behind_what_a_canvas_answers(draft, canvas, rest):
    control = Drafted(draft, 9, 0, 4, 0)
    control.commit(canvas)
    rest = list(rest)
    layout = control.layout()
    assert (layout is None) == (not rest)
    if rest:
        size = layout.tokens.shape[1]
        assert layout.tokens.tolist() == [([*rest, 9] + [0] * size)[:size]]
