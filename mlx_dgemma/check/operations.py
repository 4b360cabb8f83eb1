"""Every operation that the demo asks of MLX, run once more by itself and compared with a second opinion.

On a GPU that is the CPU, with 16-bit floats widened to float32. A machine without a GPU has no second device; there,
floats are compared with the same operation in float64, and integers with NumPy.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..engine import Engine, load
from ..model import device
from .answers import cases
from .lines import FAILED, PASSED, SKIPPED, Line, described
from .products import compiles_slowly
from .recording import Call, Recorder, arrays_of, dtype_name, map_arrays
from .shapes import quantize

BOUNDS = {mx.float32: 1e-4, mx.bfloat16: 4e-2, mx.float16: 1e-2}  # error beside the largest number of a result
FEW = ("default: a story", "exact: JSON", "fast: JSON", "edit")  # what each other dtype runs
SAME = ("default: sorting", "exact: sorting", "fast: sorting", "thinking")  # these take the paths of others
ORDERS = ("argsort", "argpartition", "argmax", "argmin")  # ties may fall either way, so their numbers are compared

OPERATORS = frozenset("add sub mul floordiv eq ne lt le gt ge and or invert neg getitem".split())
NUMPY = frozenset(
    "cumsum any all sum where concatenate reshape swapaxes maximum minimum take_along_axis argsort".split()
)


class Verdict(NamedTuple):
    """What became of one operation."""

    call: Call
    status: str
    says: str


def lines(engine: Engine) -> Iterator[Line]:
    """The lines of this section: one that counts, and one for each operation that failed.

    Args:
        engine: the demo as this device loads it.
    """
    recorder = Recorder()
    silent = record(recorder, engine)
    yield from report([judge(call) for call in recorder.calls.values()])
    if silent:
        yield Line("paths that did not run to their end", FAILED, "; ".join(silent))


def report(verdicts: Iterable[Verdict]) -> Iterator[Line]:
    """One line with the numbers, and one for each operation that failed."""
    verdicts = list(verdicts)
    count = {status: sum(one.status == status for one in verdicts) for status in (PASSED, FAILED, SKIPPED)}
    second = "float64 or NumPy, for there is no second device" if device.on_cpu() else "the CPU"
    says = f"{len(verdicts)} with their dtypes: {count[PASSED]} agree with {second}"
    says += f", {count[SKIPPED]} ran without a second opinion" if count[SKIPPED] else ""
    says += f", {count[FAILED]} failed" if count[FAILED] else ""
    yield Line("operations", FAILED if count[FAILED] else PASSED, says, dict(count))
    for one in verdicts:
        if one.status == FAILED:
            place = f" (asked for in {one.call.place})" if one.call.place else ""
            yield Line(str(one.call), FAILED, one.says + place)


def record(recorder: Recorder, engine: Engine) -> list[str]:
    """Record the demo's paths on this device, before that on the CPU, whose inputs exist whatever a GPU fails at.

    Returns:
        What failed on this device while it ran.
    """
    failed: list[str] = []
    here = mx.default_device()
    for on, dtype, recipe in _runs():
        with mx.stream(on):
            own = on == here and recipe is None and dtype == dtype_name(engine.model.dtype)
            other = engine if own else load(engine.checkpoint.path, dtype)
            quantize(other.model, recipe)
            for case in cases(story_steps=3):
                if case.name in SAME or not (own or case.name in FEW):
                    continue
                try:
                    with recorder.recording():
                        case.ask(other)
                except Exception as error:
                    if on == here:
                        failed.append(f"{case.name} in {recipe or ''} {dtype}: {described(error)}")
    return failed


def _runs() -> list[tuple[mx.Device, str, str | None]]:
    """(device, dtype, recipe) of the demos whose paths are recorded; fewer where each dtype costs minutes."""
    cpu, gpu = mx.Device(mx.cpu), mx.Device(mx.gpu)
    if device.on_cpu():
        return [(cpu, dtype, None) for dtype in ("float32", "bfloat16", "float16")]
    on_cpu: list[tuple[mx.Device, str, str | None]] = [(cpu, dtype, None) for dtype in ("float32", "bfloat16")]
    if compiles_slowly():
        return [*on_cpu, (gpu, "bfloat16", None)]
    return [
        *on_cpu,
        *((gpu, dtype, None) for dtype in ("bfloat16", "float32", "float16")),
        *((gpu, dtype, "4bit") for dtype in ("bfloat16", "float16")),
    ]


def judge(call: Call) -> Verdict:
    """Run an operation on the default device, and compare it with a second opinion."""
    try:
        mx.eval(arrays_of(call.arguments))
    except Exception as error:
        return Verdict(call, SKIPPED, f"its inputs could not be computed: {described(error)}")
    try:
        got = replay(call)
    except Exception as error:
        return Verdict(call, FAILED, described(error))
    wanted = second_opinion(call)
    if wanted is None:
        return Verdict(call, SKIPPED, "no second opinion")
    difference = compare(call, got, wanted)
    return Verdict(call, FAILED if difference else PASSED, difference)


def replay(call: Call, on: Any = None, widen: Callable[[mx.array], mx.array] | None = None) -> list[mx.array]:
    """The results of a call, computed.

    Args:
        call: what to run.
        on: a device; None: the default one.
        widen: changes every array that the call is given.
    """
    with nullcontext() if on is None else mx.stream(on):
        args, kwargs = map_arrays(widen or mx.array, call.arguments)
        result = call.function(*args, **kwargs)
        found = arrays_of(args[0] if call.name == "setitem" else result)
        mx.eval(found)
    return found


def second_opinion(call: Call) -> list[mx.array] | None:
    """The results on the CPU in a wider dtype, in the same where MLX has none wider; None: nothing to compare with."""
    floats = any(mx.issubdtype(a.dtype, mx.floating) for a in arrays_of(call.arguments))
    wider = [mx.float64, mx.float32] if device.on_cpu() else [mx.float32]
    for dtype in wider if floats else ():
        narrow = (mx.bfloat16, mx.float16, *([mx.float32] if dtype == mx.float64 else []))
        if dtype == mx.float32 and not any(a.dtype in narrow for a in arrays_of(call.arguments)):
            continue
        try:
            return replay(
                call,
                mx.cpu,
                lambda a, d=dtype, n=narrow: a.astype(d) if a.dtype in n else mx.array(a),  # type: ignore[misc]
            )
        except Exception:
            continue
    try:
        return with_numpy(call) if device.on_cpu() else replay(call, mx.cpu)
    except Exception:
        return None


def with_numpy(call: Call) -> list[mx.array] | None:
    """The result of NumPy's operation of the same name; None where it has none that does the same."""
    args, kwargs = map_arrays(np.asarray, call.arguments)
    if call.name in OPERATORS:
        found = getattr(operator, f"__{call.name}__")(*args)
    elif call.name in NUMPY and not any(one in kwargs for one in ("dtype", "stream")):
        found = getattr(np, call.name)(*args, **kwargs)
    else:
        return None
    return [mx.array(np.asarray(found)).astype(replay(call)[0].dtype)]


def compare(call: Call, got: list[mx.array], wanted: list[mx.array]) -> str:
    """How results differ, or nothing."""
    if [a.shape for a in got] != [a.shape for a in wanted]:
        return f"shapes are {[a.shape for a in got]} and should be {[a.shape for a in wanted]}"
    if call.name in ORDERS:
        got, wanted = ([_ordered(call, a) for a in some] for some in (got, wanted))
    bound = max((BOUNDS.get(a.dtype, 0.0) for a in [*arrays_of(call.arguments), *got]), default=0.0)
    differences = (_difference(a, b.astype(a.dtype), bound) for a, b in zip(got, wanted))  # both overflow alike
    return next((one for one in differences if one), "")


def _difference(a: mx.array, b: mx.array, bound: float) -> str:
    """How `a` differs from `b`, of the same shape and dtype; floats by more than `bound` of the largest number."""
    if not mx.issubdtype(a.dtype, mx.floating):
        wrong = int((np.asarray(a) != np.asarray(b)).sum())
        return f"{wrong} of {a.size} numbers of {dtype_name(a.dtype)} differ" if wrong else ""
    x, y = (np.asarray(one.astype(mx.float32), np.float64) for one in (a, b))
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    finite = np.isfinite(x) & np.isfinite(y)
    if not (same | finite).all():
        return f"{int((~(same | finite)).sum())} of {a.size} numbers are not finite where they should be"
    x, y = x[finite], y[finite]
    error = np.abs(x - y).max(initial=0.0) / max(np.abs(y).max(initial=0.0), 1e-6)
    return f"differs by {error:.1e} of the largest number, more than {bound:.0e}" if error > bound else ""


def _ordered(call: Call, index: mx.array) -> mx.array:
    """The numbers at positions that an operation found, in an order that ties and partitions do not change."""
    args, kwargs = call.arguments
    a, axis = args[0], kwargs.get("axis", args[-1] if len(args) > 1 and isinstance(args[-1], int) else None)
    flat = axis is None and call.name in ("argmax", "argmin")
    x = np.asarray(a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
    position = np.asarray(index)
    if flat:
        return mx.array(x.reshape(-1)[position.reshape(-1)].astype(np.float32))
    axis = -1 if axis is None else axis
    if position.ndim < x.ndim:
        position = np.expand_dims(position, axis)
    found = np.take_along_axis(x, position.astype(np.int64), axis)
    if call.name == "argpartition":
        kth = kwargs.get("kth", args[1] if len(args) > 1 else 0) % x.shape[axis]
        parts = np.split(found, [kth, kth + 1], axis)
        found = np.concatenate([np.sort(part, axis) for part in parts], axis)
    return mx.array(found.astype(np.float32))
