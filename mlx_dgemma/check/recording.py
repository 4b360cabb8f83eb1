"""Which MLX operations a piece of code asks for: functions of `mlx.core` and methods of arrays are wrapped for a while.

Inside of `mx.vmap` arrays have no values, so a mapped function counts as one operation. Compiled functions run
uncompiled while they are recorded. Custom kernels are not seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx

# They return arrays, but compute nothing or read files.
_NOT_OPERATIONS = frozenset(
    """load import_function from_dlpack export_function compile vmap grad value_and_grad vjp jvp checkpoint
    custom_function metal_kernel cuda_kernel precompiled_cuda_kernel eval async_eval depends
    __copy__ __deepcopy__ __iter__ __getattribute__ __new__ __init__ __init_subclass__ __subclasshook__ __reduce__
    __reduce_ex__ __getstate__ __setstate__ __array_namespace__ __delattr__ __setattr__ __dir__""".split()
)
_POSITIONS = ("offset",)  # keyword arguments whose numbers choose no kernel
_PACKAGE = str(Path(__file__).parent.parent)
_HERE = str(Path(__file__))


class Call(NamedTuple):
    """One recorded call, with handles of the arrays that it was given.

    Attributes:
        name: of the operation, such as argsort or vmap(random.gumbel).
        attributes: what else chooses the kernel: keyword arguments.
        function: what was called, unwrapped.
        arguments: positional and keyword arguments.
        place: file and line of the package's code that asked for it, or nothing.
    """

    name: str
    attributes: str
    function: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    place: str

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of the arrays among the positional arguments, in order."""
        return [dtype_name(a.dtype) for a in arrays_of(self.arguments[0])]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.dtypes)}{self.attributes})"


class Recorder:
    """The calls that were made while `recording` it, distinct by operation, dtypes, ranks and attributes."""

    def __init__(self) -> None:
        self.calls: dict[Any, Call] = {}
        self._inside: list[str] | None = None  # names of operations inside of a mapped function

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs in this context."""
        undo: list[tuple[Any, str, Any]] = []

        def put(owner: Any, name: str, new: Any) -> None:
            undo.append((owner, name, getattr(owner, name)))
            setattr(owner, name, new)

        mx.disable_compile()
        try:
            for owner, prefix in ((mx, ""), (mx.fast, "fast."), (mx.random, "random."), (mx.array, "")):
                for name, function in _callables(owner):
                    put(owner, name, self._wrapped(prefix + name.strip("_"), name, function))
            put(mx, "vmap", self._mapping(mx.vmap))
            yield
        finally:
            for owner, name, old in reversed(undo):
                setattr(owner, name, old)
            mx.enable_compile()

    def _wrapped(self, shown: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, recorded. What it is given is kept before it runs, since it may change its first argument."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside is not None:
                self._inside.append(shown)
                return function(*args, **kwargs)
            given = _handles((args, kwargs))
            try:
                result = function(*args, **kwargs)
            except Exception:
                self._keep(shown, function, given)  # what cannot even be asked for is listed too
                raise
            if name == "__setitem__" or (result is not NotImplemented and arrays_of(result)):
                self._keep(shown, function, given)
            return result

        return call

    def _mapping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`mx.vmap`, whose functions are recorded as one operation each."""

        def vmap(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
            mapped = original(function, *args, **kwargs)

            def call(*arrays: Any) -> Any:
                given, outer = _handles((arrays, {})), self._inside
                self._inside = []
                try:
                    return mapped(*arrays)
                finally:
                    inner, self._inside = self._inside, outer
                    if outer is None:
                        self._keep(f"vmap({', '.join(dict.fromkeys(inner))})", mapped, given)

            return call

        return vmap

    def _keep(self, name: str, function: Callable[..., Any], given: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        args, kwargs = given
        attributes = "".join(f", {one}={_described(kwargs[one], one not in _POSITIONS)}" for one in sorted(kwargs))
        key = (name, _described(args), attributes)
        if key not in self.calls:
            self.calls[key] = Call(name, attributes, function, given, _place())


def arrays_of(tree: Any) -> list[mx.array]:
    """The arrays in nested tuples, lists and dicts, in order."""
    if isinstance(tree, mx.array):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [a for child in children for a in arrays_of(child)]


def map_arrays(function: Callable[[mx.array], Any], tree: Any) -> Any:
    """The same nested tuples, lists and dicts with `function` of every array."""
    if isinstance(tree, mx.array):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_arrays(function, value) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(map_arrays(function, one) for one in tree)
    return tree


_new_array = mx.array  # the type itself is never replaced, only its methods are


def _handles(tree: Any) -> Any:
    """New handles of all arrays: an assignment to a slice changes the old ones only."""
    return map_arrays(_new_array, tree)


def _callables(owner: Any) -> list[tuple[str, Callable[..., Any]]]:
    """The functions of a module, or the methods of `mx.array`, that MLX implements."""
    kind = "nb_func" if isinstance(owner, ModuleType) else "nb_method"
    names = vars(owner) if isinstance(owner, ModuleType) else dir(owner)
    return [
        (name, getattr(owner, name))
        for name in list(names)
        if name not in _NOT_OPERATIONS and type(getattr(owner, name)).__name__ == kind
    ]


def dtype_name(dtype: mx.Dtype) -> str:
    """float32 and so on."""
    return str(dtype).rpartition(".")[2]


def _described(value: Any, exact: bool = False) -> str:
    """A value as far as it chooses a kernel: of arrays dtype and rank, of positional numbers the kind alone."""
    if isinstance(value, mx.array):
        return f"{dtype_name(value.dtype)}[{value.ndim}]"
    if isinstance(value, mx.Dtype):
        return dtype_name(value)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_described(one) for one in value)})"
    if value is None or isinstance(value, (bool, str)) or (exact and isinstance(value, (int, float))):
        return repr(value)
    return type(value).__name__


def _place() -> str:
    """File and line of the innermost caller in the package but not in this file, or nothing."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE) and name != _HERE:
            return f"{Path(name).relative_to(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
