"""Operations are recorded with what chooses their kernel, run once more, and compared with a second opinion."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.check import operations
from mlx_dgemma.check.lines import FAILED, PASSED, SKIPPED
from mlx_dgemma.check.recording import Recorder
from mlx_dgemma.model import functions


def recorded(function):
    recorder = Recorder()
    with recorder.recording():
        result = function()
    return list(recorder.calls.values()), result


def names(calls):
    return [str(call) for call in calls]


def test_functions_methods_and_operators_are_recorded_once_for_each_kind():
    x, flags = mx.array([3.0, 1.0]), mx.array([True, False])

    def work():
        for size in (1, 2):
            (x[:size] + x[:size]).sum(axis=-1)
        return mx.argsort(flags), mx.fast.rms_norm(x[None], None, 1e-6)

    calls, _ = recorded(work)
    assert names(calls) == [
        "getitem(float32)",
        "add(float32, float32)",
        "sum(float32, axis=-1)",
        "argsort(bool)",
        "getitem(float32)",
        "fast.rms_norm(float32)",
    ]
    assert calls[3].place == ""


def test_dtypes_ranks_and_attributes_tell_operations_apart():
    x = mx.zeros((2, 2))

    def work():
        return [x.sum(axis=0), x.sum(axis=1), x[0].sum(axis=0), x.astype(mx.int32).sum(axis=0), x.sum(axis=0)]

    calls, _ = recorded(work)
    assert names(calls).count("sum(float32, axis=0)") == 2  # of rank 2 and of rank 1
    assert [one for one in names(calls) if one.startswith("sum")] == [
        "sum(float32, axis=0)",
        "sum(float32, axis=1)",
        "sum(float32, axis=0)",
        "sum(int32, axis=0)",
    ]


def test_recording_ends_with_its_context_also_after_an_error():
    before = mx.argsort, mx.array.__add__, mx.vmap
    recorder = Recorder()
    with pytest.raises(ValueError), recorder.recording():
        mx.zeros((2,)) + mx.zeros((3,))
    assert (mx.argsort, mx.array.__add__, mx.vmap) == before
    assert "add(float32, float32)" in names(recorder.calls.values())


def test_assignments_keep_what_was_there_before():
    def work():
        x = mx.zeros((4,))
        x[mx.array([1])] = mx.ones((1,))
        x[mx.array([1])] = mx.array([5.0])
        return x

    calls, result = recorded(work)
    (call,) = [call for call in calls if call.name == "setitem"]
    assert result.tolist() == [0, 5, 0, 0]
    assert operations.replay(call)[0].tolist() == [0, 1, 0, 0]
    assert operations.replay(call)[0].tolist() == [0, 1, 0, 0]
    assert operations.judge(call).status == PASSED


def test_mapped_functions_are_one_operation():
    calls, result = recorded(
        lambda: mx.vmap(lambda key: mx.random.uniform(shape=(3,), key=key))(mx.random.split(mx.random.key(1), 2))
    )
    call = calls[-1]
    assert str(call) == "vmap(random.uniform)(uint32)"
    assert np.array_equal(operations.replay(call)[0], result)


def test_a_planted_failing_operation_is_listed():
    """An operation that raises when it is computed, and one with a wrong result, among some that work."""
    x = mx.array([True, False, True])
    calls, _ = recorded(lambda: [mx.argsort(x), x + 1.0, mx.exp(mx.array([1.0]))])

    def unable(*_, **__):
        raise RuntimeError("[metal::Device] Unable to load kernel carg_block_sort_bool")

    def wrong(*args, **kwargs):
        found = mx.exp(*args, **kwargs)
        return found * 1.01 if found.dtype == mx.float32 else found

    planted = {"argsort": unable, "exp": wrong}
    calls = [call._replace(function=planted.get(call.name, call.function)) for call in calls]
    first, *rest = operations.report([operations.judge(call) for call in calls])
    assert first.status == FAILED and first.says.endswith("2 failed")
    assert [line.name for line in rest] == ["argsort(bool)", "exp(float32)"]
    assert rest[0].says == "RuntimeError: [metal::Device] Unable to load kernel carg_block_sort_bool"
    assert rest[1].says == "differs by 1.0e-02 of the largest number, more than 1e-04"


def test_an_operation_whose_inputs_fail_is_not_blamed():
    (call,), _ = recorded(lambda: mx.exp(mx.array([1.0])))
    singular = mx.linalg.inv(mx.zeros((2, 2)), stream=mx.cpu)
    found = operations.judge(call._replace(arguments=((singular,), {})))
    assert found.status == SKIPPED and found.says.startswith("its inputs could not be computed: ")


def test_the_places_of_our_own_code_are_told():
    calls, _ = recorded(lambda: functions.entropy(mx.zeros((1, 1, 4))))
    assert {call.place.partition(":")[0] for call in calls} == {"", "model/functions.py"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: mx.argsort(mx.array([1, 0, 1, 0, 1])),
        lambda: mx.argpartition(mx.array([[5.0, 1.0, 4.0, 2.0, 3.0]]), kth=-2, axis=-1),
        lambda: mx.argmax(mx.array([[1.0, 7.0, 7.0]]), axis=-1),
        lambda: mx.array([1.0, 7.0]).argmin(),
    ],
)
def test_ties_and_partitions_may_fall_either_way(make):
    (call,), _ = recorded(make)
    found = operations.judge(call)
    assert found.status == PASSED, found


def test_a_wrong_order_is_seen():
    (call,), _ = recorded(lambda: mx.argsort(mx.array([3.0, 1.0, 2.0])))
    assert operations.compare(call, [mx.array([1, 2, 0], mx.uint32)], [mx.array([1, 2, 0], mx.uint32)]) == ""
    assert "differs" in operations.compare(call, [mx.array([2, 1, 0], mx.uint32)], [mx.array([1, 2, 0], mx.uint32)])


def test_numbers_that_are_not_finite_and_other_shapes_are_seen():
    (call,), _ = recorded(lambda: mx.exp(mx.array([1.0, 2.0])))
    wanted = [mx.array([1.0, 2.0])]
    assert operations.compare(call, [mx.array([1.0, mx.nan])], wanted).startswith("1 of 2 numbers are not finite")
    assert operations.compare(call, [mx.array([mx.inf, 2.0])], [mx.array([mx.inf, 2.0])]) == ""
    assert operations.compare(call, [mx.array([1.0])], wanted).startswith("shapes are")
