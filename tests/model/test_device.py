"""The memory of the device, and the queue that evaluates in bounded memory."""

import os

import mlx.core as mx

from mlx_dgemma.model import device


def test_the_device_has_memory():
    assert device.available() > 2**28
    if mx.default_device() == mx.cpu:
        assert device.available() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# The queue of evaluations.


def stages_of(count, mib):
    """Lazy stages of `mib` MiB each; each one is computed from the one before."""
    made = [mx.arange(mib * 2**18, dtype=mx.float32)]
    for _ in range(count):
        made.append(made[-1] + 1)
    return made[1:]


def test_a_queue_computes_all_stages_in_order(monkeypatch):
    started, waited = [], []
    start, wait = mx.async_eval, mx.eval
    monkeypatch.setattr(mx, "async_eval", lambda stage: started.append(stage) or start(stage))
    monkeypatch.setattr(mx, "eval", lambda stage: waited.append(stage) or wait(stage))
    stages, more = stages_of(5, 1), [mx.array(3) + 1, [mx.array(4) + 1, None]]
    queue = device.Queue()
    queue.add(*stages, None, more)
    queue.add()
    assert waited == []  # little is in flight
    queue.finish()
    assert [id(one) for one in started] == [id(one) for one in waited] == [id(one) for one in (*stages, None, more)]
    assert [stage[0].item() for stage in stages] == [1, 2, 3, 4, 5]
    assert (more[0].item(), more[1][0].item()) == (4, 5)
    waited.clear()
    queue.finish()
    assert waited == []


def test_above_the_soft_limit_a_queue_waits_for_the_oldest_stage(monkeypatch):
    """Stages of 4 MiB and a soft limit of 5 MiB: the queue waits for the oldest of two, never for the newest."""
    waited = []
    wait = mx.eval
    monkeypatch.setattr(mx, "eval", lambda stage: waited.append(stage[0].item()) or wait(stage))
    for ahead, expected in ((2**40, []), (5 * 2**20, [1, 2, 3, 4, 5, 6])):
        monkeypatch.setattr(device, "SOFT_LIMIT", ahead)
        mx.synchronize()
        waited.clear()
        queue, stages = device.Queue(), stages_of(8, 4)
        queue.add(*stages)
        assert waited == expected
        queue.finish()
        assert waited == list(range(1, 9))
        del stages


def test_above_the_hard_limit_a_queue_waits_for_everything(monkeypatch):
    """Stages of 4 MiB that stay in memory: above the hard limit of 17 MiB the queue waits at every stage."""
    waited = []
    monkeypatch.setattr(mx, "synchronize", lambda: waited.append(mx.get_active_memory()))
    monkeypatch.setattr(device, "HARD", 0.5)
    for limit, expected in ((2**40, 0), (34 * 2**20, 3)):
        waited.clear()
        queue, stages = device.Queue(limit), stages_of(8, 4)
        queue.add(*stages)
        queue.finish()
        assert len(waited) == expected
        del stages
