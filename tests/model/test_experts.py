"""The mixture of experts: all ways of computing it give the same result."""

import mlx.core as mx
import numpy as np
import pytest
from support import engine_of

from mlx_dgemma.model import experts as module


@pytest.fixture
def layer(demo):
    return engine_of(demo).model.model.decoder.layers[1]


def naive(experts, x, indices, weights):
    """The experts in float64, row by row and expert by expert."""
    gate_up, down = (np.asarray(m.weight, np.float64) for m in (experts.gate_up_proj, experts.down_proj))
    out = np.zeros(x.shape)
    for row, (chosen, share) in enumerate(zip(np.asarray(indices), np.asarray(weights))):
        for expert, weight in zip(chosen, share):
            gate, up = np.split(gate_up[expert] @ np.asarray(x[row], np.float64), 2)
            gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            out[row] += weight * (down[expert] @ (gelu * up))
    return out


@pytest.mark.parametrize("rows", [1, 7, 33, 90])
@pytest.mark.parametrize("way", ["gathered", "sorted", "runs", "long runs"])
def test_experts_equal_a_plain_loop(monkeypatch, layer, rows, way):
    monkeypatch.setattr(module, "SORT_FROM", 10**9 if way == "gathered" else 1)
    monkeypatch.setattr(module, "uses_padded_runs", lambda rows=0: "runs" in way)
    monkeypatch.setattr(module, "gathers_by_products", lambda rows: way == "runs")
    x = mx.random.normal((rows, 192), key=mx.random.key(rows))
    indices, weights = layer.router(x)
    assert np.allclose(layer.experts(x, indices, weights), naive(layer.experts, x, indices, weights), atol=2e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_cpu_computes_many_rows_in_runs_with_the_same_bits(monkeypatch, layer, dtype):
    """So what a row comes to does not depend on how many are computed with it."""
    rows = module.CPU_RUNS_FROM * 8 // 2  # of two of eight experts each
    x = mx.random.normal((rows, 192), key=mx.random.key(0)).astype(dtype)
    indices, weights = layer.router(x)
    used, runs = [], module.Experts._in_padded_runs
    monkeypatch.setattr(module.Experts, "_in_padded_runs", lambda *args: used.append(args) or runs(*args))
    whole = layer.experts(x, indices, weights)
    assert len(used) == 1
    few = slice(0, rows - 1)
    assert mx.array_equal(whole[few], layer.experts(x[few], indices[few], weights[few])) and len(used) == 1


@pytest.mark.parametrize("count, experts", [(1, 8), (16, 8), (128, 8), (1000, 8), (4096, 8), (50, 128), (2048, 128)])
def test_runs_hold_one_expert_each_and_every_row_once(count, experts):
    chosen = mx.random.randint(0, experts, (count,), key=mx.random.key(count))
    length = module.run_length(count, experts, 128)
    slots, owners = (np.asarray(one) for one in module.lay_out_runs(chosen, experts, length))
    assert len(set(slots.tolist())) == count
    assert slots.max() < owners.size * length
    assert (owners[slots // length] == np.asarray(chosen)).all()
    assert owners.size * length <= count + length * min(experts, count)


def test_runs_of_a_single_expert():
    slots, owners = module.lay_out_runs(mx.full((40,), 3), 8, 16)
    assert np.asarray(slots).tolist() == list(range(40))
    assert np.asarray(owners)[:3].tolist() == [3] * 3


def laid_out(rows, top_k, experts, seed):
    """Random rows in runs: (chosen experts, weights, slots, owners, length of a run, slots' rows, slots' weights)."""
    chosen = mx.random.randint(0, experts, (rows * top_k,), key=mx.random.key(seed))
    weights = mx.random.uniform(0.1, 1, (rows * top_k,), key=mx.random.key(seed + 1))
    length = module.run_length(chosen.size, experts, 64)
    slots, owners = module.lay_out_runs(chosen, experts, length)
    source, share = module.slot_contents(slots, weights, owners.size * length, rows)
    return chosen, weights, slots, owners, length, source, share


LAYOUTS = [(1, 1, 4), (1, 2, 8), (7, 2, 4), (64, 8, 128), (300, 2, 8), (40, 3, 1)]  # rows, top_k, experts


@pytest.mark.parametrize("rows, top_k, experts", LAYOUTS)
def test_slot_contents_are_the_row_and_the_weight_of_each_slot(rows, top_k, experts):
    _, weights, slots, owners, length, source, share = laid_out(rows, top_k, experts, rows)
    weights, slots, source, share = (np.asarray(one) for one in (weights, slots, source, share))
    expected, weight = np.full(owners.size * length, rows), np.zeros(owners.size * length, np.float32)
    for i, slot in enumerate(slots):
        expected[slot], weight[slot] = i // top_k, weights[i]
    assert source.tolist() == expected.tolist()
    assert share.tolist() == weight.tolist()
    assert np.bincount(source, minlength=rows + 1)[:rows].tolist() == [top_k] * rows


@pytest.mark.parametrize("rows, top_k, experts", LAYOUTS)
def test_runs_of_an_expert_follow_each_other_and_keep_the_rows_order(rows, top_k, experts):
    chosen, _, slots, owners, length, *_ = laid_out(rows, top_k, experts, rows)
    chosen, slots, owners = (np.asarray(one) for one in (chosen, slots, owners))
    used = int(slots.max()) // length + 1
    assert (np.diff(owners.astype(int)) >= 0).all()
    for expert in set(chosen.tolist()):
        mine = slots[chosen == expert]
        assert mine.tolist() == list(range(mine[0], mine[0] + len(mine)))  # no padding between
        assert mine[0] % length == 0
        assert (owners[:used] == expert).sum() == -(-len(mine) // length)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("rows, top_k, experts", LAYOUTS)
def test_gather_matrices_gather_rows_and_mix_them_by_weight(rows, top_k, experts, dtype):
    """Gathered into slots and mixed back without experts, a row is multiplied by the sum of its weights."""
    _, weights, _, owners, length, source, share = laid_out(rows, top_k, experts, rows)
    x = mx.random.normal((rows, 8), key=mx.random.key(9)).astype(dtype)
    take, mix = module.gather_matrices(source, share, rows, x)
    assert take.dtype == mix.dtype == dtype
    assert take.shape == mix.shape == (owners.size * length, rows)
    gathered = np.asarray((take @ x).astype(mx.float32))
    real = np.asarray(source) < rows
    assert (gathered[~real] == 0).all()
    assert (gathered[real] == np.asarray(x.astype(mx.float32))[np.asarray(source)[real]]).all()
    total = np.asarray(weights).reshape(rows, top_k).sum(axis=1, keepdims=True)
    mixed = np.asarray((mix.T @ (take @ x)).astype(mx.float32))
    assert np.allclose(mixed, total * np.asarray(x.astype(mx.float32)), rtol=1e-5 if dtype == mx.float32 else 3e-2)


def test_runs_grow_with_the_rows_of_an_expert():
    assert [module.run_length(n, 128, 128) for n in (64, 2048, 8192, 16384, 10**6)] == [16, 16, 64, 128, 128]
    assert module.run_length(10**6, 128, 16) == 16


@pytest.mark.skipif(mx.default_device() == mx.cpu, reason="the CPU has no sorted kernel to misread rows")
def test_sorted_rows_are_read_right(layer):
    weight = mx.random.normal((8, 64, 32), key=mx.random.key(0))
    rows = mx.random.normal((128, 64), key=mx.random.key(1))
    chosen = mx.sort(mx.random.randint(0, 8, (128,), key=mx.random.key(2)))
    taken = rows[:, None][mx.arange(128)]  # the order of axes that `Experts` relies on
    plain = mx.gather_mm(taken, weight, rhs_indices=chosen)
    assert mx.abs(mx.gather_mm(taken, weight, rhs_indices=chosen, sorted_indices=True) - plain).max() < 1e-2
