"""The automaton of an expression as a table of bytes, bounded in size and in the work that it takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .expressions import Expression
from .nfa import Rows, determinize
from .plain import parse_plain


class Dfa(NamedTuple):
    """A byte automaton. State 0 is the start, the last state is dead."""

    table: np.ndarray  # [states + 1, 256] int32, the next state for each byte
    accepting: np.ndarray  # [states + 1] bool
    marks: np.ndarray | None  # [states + 1, 256] int32, the mark of each byte; None: no byte has one


def build_dfa(pattern: str | Expression) -> Dfa:
    """The byte automaton of an expression, or of a pattern in the plain syntax.

    Raises:
        OptionError: the automaton is too large, or takes too much work to make.
    """
    return _table(determinize(parse_plain(pattern) if isinstance(pattern, str) else pattern))


def _table(rows: Rows) -> Dfa:
    dead = len(rows.edges)
    edges = [(state, *edge) for state, leaving in enumerate(rows.edges) for edge in leaving]
    state, low, high, target, mark = np.array(edges, np.int64).reshape(-1, 5).T
    width = high - low + 1
    # The bytes of all edges one behind the other.
    place = np.repeat(state * 256 + low - np.cumsum(width) + width, width) + np.arange(width.sum())
    table = np.full((dead + 1, 256), dead, np.int32)
    table.reshape(-1)[place] = np.repeat(target, width)
    marks = None
    if mark.any():
        marks = np.zeros((dead + 1, 256), np.int32)
        marks.reshape(-1)[place] = np.repeat(mark, width)
    return Dfa(table, np.array([*rows.accepting, False]), marks)
