"""The sampler's pure functions on hand-made arrays, against float64 and loops."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.decoding import sampler


def keys_of(*seeds):
    return mx.stack([mx.random.key(seed) for seed in seeds])


def naive_accept(uncertainty, bound):
    """Go through the positions from the most certain one; keep them while those before sum to `bound` at most."""
    accepted = np.zeros(uncertainty.shape, bool)
    for row, values in enumerate(uncertainty):
        before = 0.0
        for position in sorted(range(len(values)), key=lambda i, v=values: v[i]):
            accepted[row, position] = before <= bound
            before += values[position]
    return accepted


@pytest.mark.parametrize("bound", [0.0, 0.1, 0.75, 3.0, 1e9])
def test_acceptance_equals_a_loop(bound):
    # Multiples of 1/64 sum without rounding, so that float32 and float64 cannot differ at the bound.
    uncertainty = np.random.default_rng(0).integers(1, 64, (8, 33)) / 64
    accepted = np.array(sampler.accept(mx.array(uncertainty.astype(np.float32)), bound))
    expected = naive_accept(uncertainty, bound)
    assert accepted.sum(axis=1).tolist() == expected.sum(axis=1).tolist()
    for row in range(8):  # equal entropies may swap places, so the accepted values are compared
        assert sorted(uncertainty[row][accepted[row]]) == sorted(uncertainty[row][expected[row]])


def test_acceptance_of_distinct_entropies_is_exact_by_position():
    uncertainty = np.stack([np.random.default_rng(i).permutation(40) for i in range(6)]) / 256
    accepted = sampler.accept(mx.array(uncertainty.astype(np.float32)), 0.5)
    assert np.array(accepted).tolist() == naive_accept(uncertainty, 0.5).tolist()


def test_acceptance_includes_the_bound_itself():
    # Before the third position the sum is 0.75: on the bound it is kept, beyond it it is not.
    uncertainty = mx.array([[0.5, 0.25, 1.0, 2.0]])
    assert sampler.accept(uncertainty, 0.75).tolist() == [[True, True, True, False]]
    assert sampler.accept(uncertainty, 0.74).tolist() == [[True, True, False, False]]


def test_the_most_certain_position_is_always_accepted():
    assert sampler.accept(mx.array([[3.0, 2.0, 5.0]]), 0.0).tolist() == [[False, True, False]]


def test_bound_zero_accepts_every_certain_position_and_one_more():
    assert sampler.accept(mx.array([[0.0, 0.7, 0.0, 0.9]]), 0.0).tolist() == [[True, True, True, False]]


def test_ties_are_accepted_in_number():
    accepted = sampler.accept(mx.full((1, 8), 0.25), 0.5)
    assert accepted.sum().item() == 3


def test_a_huge_bound_accepts_all():
    assert sampler.accept(mx.array([[3.0, 2.0, 5.0]]), 1e6).all().item()


def test_settled_with_stability_0_needs_confidence_alone():
    best = mx.array([[1, 2], [3, 4]])
    uncertainty = mx.array([[0.1, 0.2], [0.4, 0.2]])
    assert sampler.settled(best, [], uncertainty, 0, 0.2).tolist() == [True, False]


def test_settled_confidence_is_exclusive_and_of_the_mean():
    best, uncertainty = mx.array([[1, 2]]), mx.array([[0.0, 0.5]])
    assert not sampler.settled(best, [], uncertainty, 0, 0.25).item()
    assert sampler.settled(best, [], uncertainty, 0, 0.2501).item()
    assert not sampler.settled(best, [], mx.zeros((1, 2)), 0, 0.0).item()


def test_settled_with_stability_1_compares_with_the_last_argmax():
    best, sure = mx.array([[1, 2]]), mx.zeros((1, 2))
    other = mx.array([[1, 3]])
    assert not sampler.settled(best, [], sure, 1, 0.1).item()
    assert sampler.settled(best, [best], sure, 1, 0.1).item()
    assert not sampler.settled(best, [other], sure, 1, 0.1).item()
    assert sampler.settled(best, [other, best], sure, 1, 0.1).item()
    assert not sampler.settled(best, [best, other], sure, 1, 0.1).item()


def test_settled_with_stability_2_needs_two_equal_predecessors():
    best, other, sure = mx.array([[1, 2]]), mx.array([[1, 3]]), mx.zeros((1, 2))
    assert not sampler.settled(best, [best], sure, 2, 0.1).item()
    assert sampler.settled(best, [best, best], sure, 2, 0.1).item()
    assert not sampler.settled(best, [other, best], sure, 2, 0.1).item()
    assert sampler.settled(best, [other, best, best], sure, 2, 0.1).item()


def test_settled_is_decided_by_row():
    best, before = mx.array([[1, 2], [1, 2]]), mx.array([[1, 2], [1, 9]])
    assert sampler.settled(best, [before], mx.zeros((2, 2)), 1, 0.1).tolist() == [True, False]


def test_settled_is_of_the_positions_that_count_and_of_the_whole_canvas_mean():
    best, before = mx.array([[1, 2, 3, 4]]), mx.array([[1, 2, 8, 9]])
    where, uncertainty = mx.array([[True, True, False, False]]), mx.array([[0.25, 0.75, 5.0, 5.0]])
    # 1 nat over four positions, not over two.
    assert sampler.settled(best, [before], uncertainty, 1, 0.2501, where).item()
    assert not sampler.settled(best, [before], uncertainty, 1, 0.25, where).item()
    assert not sampler.settled(best, [before], mx.zeros((1, 4)), 1, 0.25).item()  # all count: the argmax has changed
    assert not sampler.settled(best, [before], mx.zeros((1, 4)), 1, 0.25, where | (best == 3)).item()
    everywhere = mx.ones((1, 4), mx.bool_)
    assert not sampler.settled(best, [best], uncertainty, 1, 2.75, everywhere).item()
    assert sampler.settled(best, [best], uncertainty, 1, 2.7501, everywhere).item()


def test_unchanged_compares_the_last_steps_where_it_counts():
    best = mx.array([[1, 2, 3], [4, 5, 6]])
    other = mx.array([[1, 2, 9], [9, 5, 6]])
    assert sampler.unchanged(best, [], 0).tolist() == [True, True]
    assert sampler.unchanged(best, [], 1).tolist() == [False, False]
    assert sampler.unchanged(best, [best], 2).tolist() == [False, False]
    assert sampler.unchanged(best, [best, other], 1).tolist() == [False, False]
    assert sampler.unchanged(best, [other, best], 1).tolist() == [True, True]
    assert sampler.unchanged(best, [other, best], 2).tolist() == [False, False]
    assert sampler.unchanged(best, [best, other, other], 1, mx.array([[True, True, False]] * 2)).tolist() == [
        True,
        False,
    ]
    assert sampler.unchanged(best, [other, best], 2, mx.array([[False, True, True]] * 2)).tolist() == [False, True]
    nothing = mx.zeros((2, 3), mx.bool_)
    assert sampler.unchanged(best, [other], 1, nothing).tolist() == [True, True]
    assert sampler.unchanged(best, [], 1, nothing).tolist() == [False, False]


def naive_text(best, ends, room):
    """Go through a row's tokens until its room is used up or an end token was taken."""
    taken = np.zeros(best.shape, bool)
    for row, tokens in enumerate(best):
        for position, token in enumerate(tokens):
            if position == room[row]:
                break
            taken[row, position] = True
            if token in ends:
                break
    return taken


def test_a_text_ends_with_its_first_end_token_and_where_its_room_does():
    best, ends = mx.array([[5, 1, 6, 1, 7], [1, 5, 5, 5, 5], [5, 6, 7, 8, 2], [5, 6, 7, 8, 9]]), mx.array([1, 2])
    room = mx.array([9, 9, 9, 3])
    assert sampler.text(best, ends, room).astype(mx.int32).tolist() == [
        [1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
    ]
    assert not sampler.text(best, ends, mx.array([0, 0, 0, 0])).any().item()


@pytest.mark.parametrize("ends", [[], [3], [0, 5], [9]])
def test_a_text_equals_a_loop(ends):
    random = np.random.default_rng(len(ends))
    best, room = random.integers(0, 9, (40, 12)), random.integers(0, 15, 40)
    got = sampler.text(mx.array(best), mx.array(ends, mx.int32), mx.array(room))
    assert np.array(got).tolist() == naive_text(best, ends, room).tolist()


def test_certain_is_below_the_threshold_at_every_position_that_counts():
    uncertainty = mx.array([[0.1, 0.25, 9.0], [0.1, 0.2, 9.0]])
    where = mx.array([[True, True, False]] * 2)
    assert sampler.certain(uncertainty, 0.25, where).tolist() == [False, True]
    assert sampler.certain(uncertainty, 0.26, where).tolist() == [True, True]
    assert sampler.certain(uncertainty, 0.26, mx.ones((2, 3), mx.bool_)).tolist() == [False, False]
    assert not sampler.certain(mx.zeros((1, 2)), 0.0, mx.ones((1, 2), mx.bool_)).item()  # 0: never


def test_confident_positions_are_kept_and_the_threshold_is_one_of_them():
    def kept(threshold, likely, unlikely=0.0):
        confidence, none = mx.array([[0.5, 0.75, 0.25, 0.8]]), mx.zeros((1, 4), mx.bool_)
        return sampler.accept_confident(confidence, none, threshold, likely, unlikely).tolist()[0]

    assert kept(0.5, 0.2) == [True, True, True, True]
    assert kept(0.75, 0.5) == [True, True, False, True]  # one more, the best of the others
    assert kept(0.76, 0.7) == [False, True, False, True]
    assert kept(0.76, 0.751) == [False, False, False, True]  # not likely
    assert kept(0.76, 0.7, 0.25) == [False, True, True, True]  # wide open, too
    assert kept(0.76, 0.751, 0.5) == [True, False, False, True]  # the best of what is wide open
    assert kept(0.9, 0.85) == [False, False, False, True]  # none is confident: the best of them
    assert kept(0.9, 0.85, 0.25) == [False, False, False, True]  # and no open question beside it
    assert kept(0.0, 0.0) == [True, True, True, True]


def test_what_was_kept_stays_and_each_step_keeps_more():
    kept = mx.array([[False, True, False, True]])
    confidence = mx.array([[0.3, 0.0, 0.2, 0.99]])  # a kept position's own does not count
    assert sampler.accept_confident(confidence, kept, 0.9, 0.3, 0.0).tolist() == [[True, True, False, True]]
    assert sampler.accept_confident(confidence, kept, 0.1, 0.1, 0.0).all().item()
    everything = mx.ones((1, 4), mx.bool_)
    assert sampler.accept_confident(confidence, everything, 0.9, 0.9, 0.3).all().item()


def test_what_was_not_computed_is_not_kept():
    confidence, kept = mx.array([[0.95, -1.0, -1.0]]), mx.array([[False, False, True]])
    assert sampler.accept_confident(confidence, kept, 0.9, 0.7, 0.3).tolist() == [[True, False, True]]
    assert sampler.accept_confident(-mx.ones((1, 3)), kept, 0.9, 0.7, 0.3).tolist() == kept.tolist()


@pytest.mark.parametrize("unlikely", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
def test_confident_acceptance_equals_a_loop_and_takes_all_in_the_end(threshold, unlikely):
    random = np.random.default_rng(0)
    kept = np.zeros((5, 12), bool)
    for _ in range(12):
        confidence = random.integers(1, 64, kept.shape) / 64
        given = mx.array(confidence.astype(np.float32)), mx.array(kept), threshold, 0.7, unlikely
        got = np.array(sampler.accept_confident(*given))
        for row in range(5):
            left = confidence[row][~kept[row]]
            sure = left >= threshold
            likely = left[~sure & ((left >= 0.7) | (not sure.any()))].max(initial=0)
            wide = left[~sure & (left <= unlikely)].max(initial=0) if sure.any() else 0
            taken = sure | (~sure & ((left == likely) | (left == wide)))
            assert got[row][~kept[row]].tolist() == taken.tolist()
            assert got[row][kept[row]].all()
            assert taken.any() or kept[row].all()
        kept = got
    assert kept.all()


def test_temperature_falls_from_t_max_and_stops_a_step_above_t_min():
    assert sampler.temperature(48, 48, 0.4, 0.8) == pytest.approx(0.8)
    assert sampler.temperature(24, 48, 0.4, 0.8) == pytest.approx(0.6)
    assert sampler.temperature(1, 48, 0.4, 0.8) == pytest.approx(0.4 + 0.4 / 48)
