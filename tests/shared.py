"""Engines that tests share are left as they were loaded: a test that changes one makes others fail far away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.engine import Engine


class Part(NamedTuple):
    """A value that an engine or one of its modules holds."""

    value: Any
    inside: Any  # what can change without another value in its place
    kept: Any = None  # the numbers of an array, so that none are computed in their place


class Shared:
    """A few engines by path, each loaded once.

    Args:
        load: makes an engine.
        most: engines that are kept.
    """

    def __init__(self, load: Callable[[Path], Engine], most: int = 3):
        self._load, self._most = load, most
        self._held: dict[Path, tuple[Engine, dict[str, Part]]] = {}
        self._used: set[Path] = set()  # since the last look for changes

    def __call__(self, path: Path) -> Engine:
        """The engine of a path."""
        if path not in self._held:
            engine = self._load(path)
            if len(self._held) == self._most:
                del self._held[next(iter(self._held))]
            self._held[path] = engine, parts_of(engine)
        self._used.add(path)
        return self._held[path][0]

    def complaint(self, file: str) -> str:
        """What is wrong with a file whose tests have run; empty where they left all engines as they were."""
        names = self.changes()
        shown = f"{', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
        return f"{file} has changed an engine that tests share: {shown}; load one of its own." if names else ""

    def changes(self) -> list[str]:
        """What was changed since the last call, by name; an engine that was changed is loaded again."""
        found = []
        for path in sorted(self._used & self._held.keys()):
            engine, before = self._held[path]
            now = parts_of(engine)
            names = [name for name in {**before, **now} if not _is_same(before.get(name), now.get(name))]
            found += names
            if names:
                del self._held[path]
        self._used.clear()
        return found


def parts_of(engine: Engine) -> dict[str, Part]:
    """What an engine computes with, by name: weights, layers, settings and options."""
    owners = {"engine": _given(engine), "engine.builder": _given(engine.builder)}
    for path, module in engine.model.named_modules():
        owners[f"engine.model.{path}".rstrip(".")] = {**vars(module), **module, "class": type(module)}
    return {f"{owner}.{name}": _part(value) for owner, things in owners.items() for name, value in things.items()}


def _given(one: Any) -> dict[str, Any]:
    """Attributes, without those that are computed once when they are asked for."""
    return {name: value for name, value in vars(one).items() if not hasattr(getattr(type(one), name, None), "func")}


def _part(value: Any) -> Part:
    if isinstance(value, mx.array):
        return Part(value, np.asarray(value).__array_interface__["data"][0], mx.array(value))
    return Part(value, frozenset(value) if isinstance(value, set) else None)


def _is_same(before: Part | None, now: Part | None) -> bool:
    return None not in (before, now) and before.value is now.value and before.inside == now.inside
