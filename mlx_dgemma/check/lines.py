"""A line of the check's report. What a line raises becomes its text, so that the check goes on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

PASSED, WARNING, FAILED, SKIPPED = "passed", "warning", "failed", "skipped"
LONGEST = 300  # characters of an error's text


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        name: what was checked.
        status: "passed"; "warning": something to know; "failed"; "skipped": it cannot be checked here.
        says: the finding, one sentence or less.
        figures: JSON values behind it.
    """

    name: str
    status: str
    says: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status:8} {self.name}" + (f": {self.says}" if self.says else "")


def judged(name: str, good: bool, says: str, **figures: Any) -> Line:
    """A line that passed if it is `good`, and failed otherwise."""
    return Line(name, PASSED if good else FAILED, says, figures)


def attempt(name: str, make: Callable[[], Line]) -> Line:
    """The line that `make` returns, or one that says what it raised."""
    try:
        return make()
    except Exception as error:
        failure = described(error)
    gc.collect()  # only now do the failed frames let go of their arrays
    mx.clear_cache()
    return Line(name, FAILED, failure)


def described(error: Exception) -> str:
    """An error's kind and text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}"
