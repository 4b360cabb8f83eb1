"""Moves of tokens through an automaton, laid out for the search of the best text.

The search keeps the scores of all states in one row. Its columns are ordered so that the states that the always scored
tokens lead to come first, without gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Transitions:
    """Moves of tokens through an automaton, as parallel arrays int32."""

    index: np.ndarray  # which of the tokens that were asked about
    source: np.ndarray  # the state before it
    target: np.ndarray  # the state behind it


class LikelyMoves(NamedTuple):
    """Moves of the likely tokens of some positions, as parallel arrays; states are columns."""

    first: list[int]  # a position has the moves from its own first one to the next position's
    source: np.ndarray
    target: np.ndarray
    log_p: np.ndarray  # float64
    token: np.ndarray


class ScoredMoves:
    """Moves of the always scored tokens.

    Of the tokens that lead from one state to another the most probable one counts, and the same group of tokens leads
    between many pairs of states. So the maximum over each group is taken once a position, and an edge stands for all
    moves between two states.

    Args:
        transitions: the moves; `index` is that of the always scored token.
        states: of the automaton.

    Attributes:
        column: [states] int64 of each state.
        reached: columns that the moves lead to: the first ones.
        first: [columns + 1], the moves to a column are those from its own first one to the next column's.
        index: the token of each move.
        source: the column before it.
        edge_first: [columns + 1], as `first`, of edges.
        edge_source: the column before each edge.
        edge_group: the group of its tokens.
    """

    def __init__(self, transitions: Transitions, states: int):
        order = np.argsort(transitions.target, kind="stable")
        self.index, source, target = (
            part[order].astype(np.int64) for part in (transitions.index, transitions.source, transitions.target)
        )
        reached = np.unique(target)
        self.reached, self.column = len(reached), np.empty(states, np.int64)
        self.column[np.concatenate([reached, np.setdiff1d(np.arange(states), reached)])] = np.arange(states)
        self.source, target = self.column[source], self.column[target]
        self.first = np.searchsorted(target, np.arange(states + 1)).tolist()
        edge = target * states + self.source
        order = np.argsort(edge, kind="stable")
        edges, first = np.unique(edge[order], return_index=True)
        self.edge_source = edges % states
        self.edge_first = np.searchsorted(edges // states, np.arange(states + 1)).tolist()
        self.edge_starts = np.array(self.edge_first[: self.reached], np.int64)
        index, borders = self.index[order], [*first.tolist(), len(order)]
        self._find_groups([index[start:stop] for start, stop in pairwise(borders)])

    @property
    def nbytes(self) -> int:
        """About how much memory they take."""
        arrays = (self.column, self.index, self.source, self.edge_source, self.edge_group, *self._members)
        numbers = len(self.first) + len(self.edge_first)
        return sum(array.nbytes for array in arrays) + 40 * numbers  # an int of a list, and the place in it

    def best_of_groups(self, log_p: np.ndarray) -> np.ndarray:
        """[C, groups] float64, the highest of each group's log-probabilities; `log_p` [C, S] of the tokens."""
        by_token, start = np.ascontiguousarray(log_p.T), 0
        found = np.empty((len(self._place), len(log_p)), log_p.dtype)
        for members in self._members:
            stop = start + members.shape[1]
            by_token.take(members, axis=0).max(axis=0, out=found[start:stop])
            start = stop
        return found.T.astype(np.float64, order="C")

    def first_with(self, score: np.ndarray, group: np.ndarray, before: np.ndarray, log_p: np.ndarray) -> np.ndarray:
        """For each of N places in a text the first token of its group that leads from the score `before` to `score`.

        Args:
            score: [N] float64.
            group: [N] of the edge.
            before: [N] float64.
            log_p: [N, S] of the always scored tokens.

        Returns:
            [N] indices of always scored tokens.
        """
        found = np.zeros(len(group), np.int64)
        which, place = self._place[group].T
        for number in np.unique(which):
            at = np.flatnonzero(which == number)
            members = self._members[number].T[place[at]]
            reached = before[at, None] + log_p[at[:, None], members]
            best = (reached == score[at, None]).argmax(axis=1)
            found[at] = members[np.arange(len(at)), best]
        return found

    def _find_groups(self, tokens: list[np.ndarray]) -> None:
        """Number the different groups among the tokens of each edge.

        Groups of similar size are made equally long, by their last token again, to be one array.
        """
        groups = sorted({part.tobytes() for part in tokens}, key=len)
        number = {group: i for i, group in enumerate(groups)}
        self.edge_group = np.array([number[part.tobytes()] for part in tokens], np.int64)
        by_width: dict[int, list[np.ndarray]] = {}
        place = []  # for each group, its array and its column there
        for group in groups:
            part = np.frombuffer(group, np.int64)
            width = 1 << (len(part) - 1).bit_length()
            rows = by_width.setdefault(width, [])
            place.append((len(by_width) - 1, len(rows)))
            rows.append(part[np.minimum(np.arange(width), len(part) - 1)])
        self._place = np.array(place, np.int64).reshape(-1, 2)
        self._members = [np.stack(rows, axis=1) for rows in by_width.values()]
