"""Which of MLX's primitives code asks for, with their dtypes, where the device is a Mac's.

Every function of `mlx.core` and every method of arrays is wrapped. A call that was not seen before is traced once more
by `mx.export_function`, which tells its primitives exactly. Results stay lazy and are computed by the CPU backend.
What the CPU backend takes apart but Metal does not (`mx.fast`, `mx.quantize`) is recorded under Metal's name. Functions
that `mx.compile` would fuse run unfused: Metal compiles their primitives from source, by the same rules for dtypes.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import primitives

PACKAGE = Path(__file__).parent.parent / "mlx_dgemma"
_HERE = Path(__file__)
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
NOT_OPERATIONS = frozenset(
    """load save savez savez_compressed save_gguf save_safetensors import_function export_function export_to_dot
    exporter from_dlpack eval async_eval synchronize compile enable_compile disable_compile checkpoint custom_function
    metal_kernel cuda_kernel precompiled_cuda_kernel device_info default_device set_default_device default_stream
    set_default_stream is_available device_count new_stream new_thread_local_stream new_thread_unsafe_stream stream
    clear_streams clear_cache clear_memory_cache get_active_memory get_cache_memory get_memory_limit get_peak_memory
    reset_peak_memory set_cache_limit set_memory_limit set_wired_limit get_array_buffer_size get_printoptions
    set_printoptions printoptions broadcast_shapes can_cast result_type issubdtype isdtype seed einsum_path depends
    item tolist __array__ __array_namespace__ __bool__ __bytes__ __class__ __complex__ __copy__ __deepcopy__
    __delattr__ __dir__ __dlpack__ __dlpack_device__ __float__ __format__ __getattribute__ __getstate__ __hash__
    __index__ __init__ __init_subclass__ __int__ __iter__ __len__ __new__ __reduce__ __reduce_ex__ __repr__
    __setattr__ __setstate__ __sizeof__ __str__ __subclasshook__""".split()
)
TRANSFORMS = ("grad", "value_and_grad", "vjp", "jvp", "vmap")


class Record(NamedTuple):
    """A primitive as the first call that asked for it did.

    Attributes:
        name: the primitive's.
        state: what else chooses its kernel, as `mx.export_function` tells it.
        inputs: dtype and rank of each input.
        outputs: dtype and rank of each output.
        place: file and line of the package's code, or of the innermost caller where there is none.
        call: the function of MLX that was called.
    """

    name: str
    state: tuple[Any, ...]
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, int], ...]
    place: str
    call: str

    def __str__(self) -> str:
        dtypes = ", ".join(dtype for dtype, _ in self.inputs or self.outputs)
        return f"{self.name} of {dtypes} at {self.place} (mx.{self.call})"


class Recorder:
    """The primitives of what runs while it records.

    Attributes:
        records: each primitive once for every place.
        places: of all calls, those that ask for no primitive among them.
        untraced: calls that worked, but could not be traced; what they ask for is unknown.
    """

    def __init__(self) -> None:
        self.records: dict[Any, Record] = {}
        self.places: set[str] = set()
        self.untraced: list[str] = []
        self._seen: set[Any] = set()
        self._tracing = 0  # inside of a trace or of a mapped function, where nothing is recorded

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs in this context, with the device's questions answered as Metal answers them."""
        undo: list[tuple[Any, str, Any]] = []
        mx.disable_compile()
        try:
            with primitives.answering_as_metal(), patch.object(mx.fast, "metal_kernel", self._metal_kernel):
                for owner, prefix in _OWNERS:
                    for name, function in _callables(owner):
                        undo.append((owner, name, function))
                        setattr(owner, name, self._wrapped(prefix, name, function))
                yield
        finally:
            for owner, name, old in reversed(undo):
                setattr(owner, name, old)
            mx.enable_compile()

    def _wrapped(self, prefix: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        shown = prefix + name
        if name in TRANSFORMS and not prefix:
            return self._transform(shown, function)
        as_metal, computed = _AS_METAL.get(shown), _in_float32(function) if shown in _PRODUCTS else function

        def call(*args: Any, **kwargs: Any) -> Any:
            if as_metal is not None:
                kwargs, found = as_metal(args, kwargs)
            if self._tracing or on_cpu_stream(kwargs):
                self.places.add(_place())
                return function(*args, **kwargs)
            key, failure = (shown, _place(), _signature((args, kwargs))), None
            if key not in self._seen:
                self._seen.add(key)
                self.places.add(key[1])
                if as_metal is not None and found is not None:
                    self._keep(found[0], found[1], found[2], found[3], key[1], shown)
                else:
                    failure = self._trace(function, args, kwargs, key[1], shown)
            self._tracing += 1
            try:
                result = computed(*args, **kwargs)
            finally:
                self._tracing -= 1
            if failure and result is not NotImplemented:
                self.untraced.append(failure)
            return result

        return call

    def _transform(self, shown: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """`mx.vmap`, `mx.value_and_grad` and so on: what they make of a function is recorded from their results."""

        def transform(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if shown in ("vjp", "jvp"):
                return self._outputs(original(function, *args, **kwargs), shown)
            made = original(function, *args, **kwargs)

            def call(*inner: Any, **named: Any) -> Any:
                mapped = shown == "vmap"
                self._tracing += mapped
                try:
                    result = made(*inner, **named)
                finally:
                    self._tracing -= mapped
                return self._outputs(result, shown)

            return call

        return transform

    def _outputs(self, result: Any, shown: str) -> Any:
        place = _place()
        key = shown, place, _signature((result,))
        if not self._tracing and key not in self._seen:
            self._seen.add(key)
            arrays = _arrays(result)
            self._export(lambda: arrays, [], place, shown)
        return result

    def _trace(self, function: Callable[..., Any], args: Any, kwargs: Any, place: str, shown: str) -> str | None:
        """Record the primitives of one call: the same call, of tracers. Returns why that failed."""

        def replay(*tracers: mx.array) -> list[mx.array]:
            rest = iter(tracers)
            again, named = _rebuilt((args, kwargs), rest)
            result = function(*again, **named)
            return _arrays(again[0] if shown.endswith("__setitem__") else result)

        arrays = _arrays((args, kwargs))
        try:
            self._export(replay, arrays, place, shown)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"mx.{shown} at {place}: {error}"
        return None

    def _export(self, function: Callable[..., Any], arrays: list[mx.array], place: str, shown: str) -> None:
        found: list[Any] = []
        self._tracing += 1
        try:
            mx.export_function(found.append, function, *arrays)
        except ValueError as error:
            said = str(error)
            if "Unable to get state for primitive" not in said:
                raise
            (inputs,), outputs = [one["inputs"] for one in found if one["type"] == "inputs"], []
            outputs = next((one["outputs"] for one in found if one["type"] == "outputs"), [])
            self._keep(said.rpartition(" ")[2], (), _shapes(inputs), _shapes(outputs), place, shown)
        finally:
            self._tracing -= 1
        for one in found:
            if one["type"] == "primitive":
                state = tuple(one["arguments"])
                self._keep(one["name"], state, _shapes(one["inputs"]), _shapes(one["outputs"]), place, shown)

    def _keep(self, name: str, state: Any, inputs: Any, outputs: Any, place: str, shown: str) -> None:
        chosen = state if name in ATTRIBUTED else ()
        record = Record(name, tuple(map(str, chosen)), tuple(inputs), tuple(outputs), place, shown)
        self.records.setdefault(record[:5], record)

    def _metal_kernel(self, name: str, **_: Any) -> Callable[..., Any]:
        """A custom kernel that computes zeros: Metal compiles its source at run time."""

        def call(*, inputs: list, output_shapes: list, output_dtypes: list, **_: Any) -> list[mx.array]:
            given = [(str(a.dtype).rpartition(".")[2], a.ndim) for a in inputs if isinstance(a, mx.array)]
            made = [(str(t).rpartition(".")[2], len(shape)) for shape, t in zip(output_shapes, output_dtypes)]
            self._keep("CustomKernel", (), given, made, _place(), f"fast.metal_kernel {name}")
            self._tracing += 1
            try:
                return [primitives.constant(tuple(shape), dtype) for shape, dtype in zip(output_shapes, output_dtypes)]
            finally:
                self._tracing -= 1

        return call


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The CPU backend has products of gathered matrices in float32 alone, and is slow at others."""

    def call(a: mx.array, b: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if a.dtype not in (mx.bfloat16, mx.float16) or a.dtype != b.dtype:
            return function(a, b, *args, **kwargs)
        return function(a.astype(mx.float32), b.astype(mx.float32), *args, **kwargs).astype(a.dtype)

    return call


_PRODUCTS = ("gather_mm", "matmul", "array.__matmul__")
# Primitives whose state chooses a kernel; of the others it holds shapes and axes.
ATTRIBUTED = frozenset(
    """Reduce ArgReduce Scan BitwiseBinary Log Sqrt Equal Softmax Scatter ScatterAxis SliceUpdate QuantizedMatmul
    GatherQMM Quantize ScaledDotProductAttention""".split()
)


def _of(*arrays: mx.array | None) -> tuple[tuple[str, int], ...]:
    return tuple((str(a.dtype).rpartition(".")[2], a.ndim) for a in arrays if isinstance(a, mx.array))


def _norm(args: Any, kwargs: dict) -> Any:
    return kwargs, ("RMSNorm", (), _of(*args), _of(args[0]))


def _layer_norm(args: Any, kwargs: dict) -> Any:
    return kwargs, ("LayerNorm", (), _of(*args), _of(args[0]))


def _rope(args: Any, kwargs: dict) -> Any:
    return kwargs, ("RoPE", (), _of(args[0]), _of(args[0]))


def _attention(args: Any, kwargs: dict) -> Any:
    """Metal's kernel if it takes one, else what the CPU backend takes attention apart into."""
    q, k, v = (*args, *(kwargs[name] for name in ("q", "k", "v")[len(args) :]))[:3]
    force, mask = kwargs.get("force_fused", False), kwargs.get("mask")
    kwargs = {name: value for name, value in kwargs.items() if name != "force_fused"}
    if primitives.is_fused(q, k, mask, force):
        return kwargs, ("ScaledDotProductAttention", (q.shape[-1], q.shape[2] <= 8), _of(q, k, v), _of(q))
    if force:
        raise ValueError(
            f"[scaled_dot_product_attention] force_fused=True but no fused kernel is available on Metal for head "
            f"dimension {q.shape[-1]} at {_place()}"
        )
    return kwargs, None


def _quantization(args: Any, kwargs: dict, at: int) -> tuple[int, int, str]:
    mode = kwargs.get("mode", "affine")
    usual = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    given = [*args[at : at + 2], None, None][:2]
    sizes = kwargs.get("group_size") or given[0], kwargs.get("bits") or given[1]
    return sizes[0] or usual[0], sizes[1] or usual[1], mode


def _quantize(args: Any, kwargs: dict) -> Any:
    group, bits, mode = _quantization(args, kwargs, 1)
    return kwargs, ("Quantize", (group, bits, MODES.index(mode)), _of(args[0]), (("uint32", args[0].ndim),))


def _dequantize(args: Any, kwargs: dict) -> Any:
    group, bits, mode = _quantization(args, kwargs, 3)
    scales = kwargs.get("scales", args[1] if len(args) > 1 else None)
    dtype = kwargs.get("dtype") or (scales.dtype if mode == "affine" else mx.bfloat16)
    made = ((str(dtype).rpartition(".")[2], args[0].ndim),)
    return kwargs, ("Quantize", (group, bits, MODES.index(mode)), made, made)


_AS_METAL: dict[str, Callable[..., Any]] = {
    "fast.rms_norm": _norm,
    "fast.layer_norm": _layer_norm,
    "fast.rope": _rope,
    "fast.scaled_dot_product_attention": _attention,
    "quantize": _quantize,
    "dequantize": _dequantize,
}
_OWNERS = (
    (mx, ""), (mx.fast, "fast."), (mx.random, "random."), (mx.linalg, "linalg."), (mx.fft, "fft."),
    (mx.array, "array."), (type(mx.array([0]).at), "array.at."),
)  # fmt: skip


def _callables(owner: Any) -> list[tuple[str, Callable[..., Any]]]:
    """The functions of a module, or the methods of a class, that MLX implements."""
    kinds = ("nb_func", "nb_method")
    return [
        (name, getattr(owner, name))
        for name in dir(owner)
        if name not in NOT_OPERATIONS and type(getattr(owner, name)).__name__ in kinds
    ]


def on_cpu_stream(kwargs: dict) -> bool:
    """Whether a call says that it is to be computed on the CPU, which a Mac has too."""
    stream = kwargs.get("stream")
    return stream is not None and getattr(stream, "device", stream) == mx.cpu


def _arrays(tree: Any) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [a for child in children for a in _arrays(child)]


def _rebuilt(tree: Any, arrays: Iterator[mx.array]) -> Any:
    if isinstance(tree, mx.array):
        return next(arrays)
    if isinstance(tree, dict):
        return {key: _rebuilt(value, arrays) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)([_rebuilt(one, arrays) for one in tree])
    return tree


def _shapes(arrays: list) -> tuple[tuple[str, int], ...]:
    return tuple((str(dtype).rpartition(".")[2], len(shape)) for _, shape, dtype in arrays)


def _signature(values: Iterable[Any]) -> tuple[Any, ...]:
    """What can choose a primitive: dtypes and ranks of arrays, kinds of numbers and slices, and every other value."""
    found: list[Any] = []
    for one in values:  # most of the recorder's time goes by here
        kind = type(one)
        if kind is mx.array:
            found.append((one.dtype, ndim := one.ndim, one.shape[-1] if ndim == 4 else None))
        elif kind in _BY_VALUE:
            found.append(one)
        elif kind is list or isinstance(one, tuple):
            found.append(_signature(one))
        elif kind is dict:
            found.append((*one, _signature(one.values())))
        else:
            found.append(kind)
    return tuple(found)


_BY_VALUE = frozenset((type(None), bool, str, mx.Dtype))


@cache
def _named(file: str) -> tuple[bool, str]:
    """Whether a file is the package's, and its name in a place; no name for this file."""
    path = Path(file)
    ours = PACKAGE in path.parents
    return ours, str(path.relative_to(PACKAGE)) if ours else "" if path == _HERE else path.name


def _place() -> str:
    """File and line of the innermost caller in the package, else of the innermost one outside of this file."""
    frame, first = sys._getframe(1), ""
    while frame is not None:
        ours, name = _named(frame.f_code.co_filename)
        if ours:
            return f"{name}:{frame.f_lineno}"
        first = first or (name and f"{name}:{frame.f_lineno}")
        frame = frame.f_back
    return first
