"""The memory of the device, and the queue that evaluates in bounded memory."""

import os
import threading
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_dgemma.model import device


def test_the_device_has_memory():
    assert device.available() > 2**28
    if mx.default_device() == mx.cpu:
        assert device.available() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# What Metal would answer.

GIB = 2**30


@pytest.fixture
def metal(monkeypatch):
    """An Apple GPU: its limits, how often each was set, and what it tells about itself."""
    told = {"architecture": "applegpu_g13s", "memory_size": 32 * GIB, "max_recommended_working_set_size": 21 * GIB}
    limits, calls = {"wired": 1, "cache": 2}, []

    def setter(name):
        def set_limit(value):
            calls.append(name)
            limits[name], earlier = value, limits[name]
            return earlier

        return set_limit

    monkeypatch.setattr(mx, "metal", SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: told)
    for name in limits:
        monkeypatch.setattr(mx, f"set_{name}_limit", setter(name))
    return SimpleNamespace(told=told, limits=limits, calls=calls)


@pytest.mark.parametrize(
    ("architecture", "lacks"),
    [("applegpu_g13g", True), ("applegpu_g14d", True), ("applegpu_g15s", False), ("applegpu_g17p", False), ("", False)],
)
def test_chips_without_bfloat16(metal, monkeypatch, architecture, lacks):
    metal.told["architecture"] = architecture
    assert device.lacks_bfloat16() is lacks
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    assert device.lacks_bfloat16() is False
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert device.lacks_bfloat16() is False


def test_limits_are_set_for_the_first_holder_and_restored_after_the_last(metal):
    def stream():
        with device.wired_limit():
            yield 1
            yield 2

    first, second, abandoned = stream(), stream(), stream()
    for one in (first, second, abandoned):
        next(one)
        assert metal.limits == {"wired": 21 * GIB, "cache": 2 * GIB}
    assert list(first) == [2]
    abandoned.close()
    with pytest.raises(ZeroDivisionError), device.wired_limit():
        raise ZeroDivisionError
    assert metal.limits == {"wired": 21 * GIB, "cache": 2 * GIB}  # the second one computes still
    assert list(second) == [2]
    assert metal.limits == {"wired": 1, "cache": 2}
    assert metal.calls == ["wired", "cache"] * 2
    with device.wired_limit():
        assert metal.limits["wired"] == 21 * GIB
    assert metal.limits == {"wired": 1, "cache": 2}


def test_a_large_mac_keeps_its_cache(metal):
    metal.told["memory_size"] = 48 * GIB
    with device.wired_limit():
        assert metal.limits == {"wired": 21 * GIB, "cache": 2}
    assert metal.calls == ["wired", "wired"]


def test_limits_are_held_from_several_threads(metal):
    inside, leave = threading.Barrier(9), threading.Barrier(9)

    def hold():
        with device.wired_limit():
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert metal.calls == ["wired", "cache"]
    leave.wait()
    for thread in threads:
        thread.join()
    assert metal.limits == {"wired": 1, "cache": 2} and metal.calls == ["wired", "cache", "wired", "cache"]


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
