"""Byte automata of expressions: Thompson's construction, then sets of states, with every step of work counted.

An automaton that would be too large, or that takes too much work, is refused before it is made. The work is the same
on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import singledispatchmethod
from itertools import pairwise

from ..errors import OptionError
from .checks import joined
from .expressions import Both, Characters, Choice, Expression, Graph, Marked, Repeat, Sequence_, Text, byte_ranges

MAX_STATES = 20_000  # of an automaton; its table then stays below 20 MB
MAX_NODES = 60_000  # of an expression; many of them may become one state
MAX_WORK = 2_000_000  # edges and states visited; some two seconds in Python

Edge = tuple[int, int, int, int]  # first and last byte, the state behind it, the mark


@dataclass
class Rows:
    """A deterministic automaton: the edges of each state, which are apart and ascend; state 0 is the start."""

    edges: list[list[Edge]] = field(default_factory=list)
    accepting: list[bool] = field(default_factory=list)


class Work:
    """Counts steps and refuses what takes too many."""

    def __init__(self) -> None:
        self.done = 0

    def add(self, steps: int) -> None:
        """Count steps.

        Raises:
            OptionError: they are more than MAX_WORK.
        """
        self.done += steps
        if self.done > MAX_WORK:
            raise OptionError(
                f"The constraint takes an automaton of far more than {MAX_STATES:,} states, or too long to make: "
                "ask for less that may be read in several ways, such as .* before a counted part."
            )


def too_large(states: int) -> OptionError:
    """The error that says so."""
    return OptionError(
        f"The constraint takes an automaton of about {states:,} states, and {MAX_STATES:,} are the most: ask for "
        "smaller bounds (maxLength, maxItems, {m,n})."
    )


def determinize(expression: Expression, work: Work | None = None) -> Rows:
    """The automaton of an expression, of those states alone that lie on a way from its start to an end.

    Raises:
        OptionError: it has more than MAX_STATES states, or takes more than MAX_WORK.
    """
    work = work or Work()
    if expression.size > MAX_NODES:
        raise too_large(expression.size + 1)
    network = _Network(work)
    start = network.state()
    return _trimmed(_Subsets(network, network.put(expression, start, 0), work).rows(start), work)


class _Network:
    """A nondeterministic automaton: for each state its edges, and the states that it leads to without a byte."""

    def __init__(self, work: Work):
        self.work = work
        self.edges: list[list[Edge]] = []
        self.silent: list[list[int]] = []

    def state(self) -> int:
        self.work.add(1)
        self.edges.append([])
        self.silent.append([])
        return len(self.edges) - 1

    def loop(self, before: int) -> int:
        """A new state behind another: edges may lead back to it."""
        state = self.state()
        self.silent[before].append(state)
        return state

    @singledispatchmethod
    def put(self, expression: Expression, start: int, mark: int) -> int:
        """Put an expression behind the state `start`; returns the state behind it."""
        raise TypeError(expression)

    @put.register
    def _text(self, expression: Text, start: int, mark: int) -> int:
        for byte in expression.spelt:
            end = self.state()
            self.edges[start].append((byte, byte, end, mark))
            start = end
        return start

    @put.register
    def _characters(self, expression: Characters, start: int, mark: int) -> int:
        states = {0: start, 1: self.state()}
        for source, low, high, target in byte_ranges(expression.intervals):
            for node in (source, target):
                if node not in states:
                    states[node] = self.state()
            self.edges[states[source]].append((low, high, states[target], mark))
        return states[1]

    @put.register
    def _sequence(self, expression: Sequence_, start: int, mark: int) -> int:
        for part in expression.parts:
            start = self.put(part, start, mark)
        return start

    @put.register
    def _choice(self, expression: Choice, start: int, mark: int) -> int:
        end = self.state()
        for part in expression.parts:
            self.silent[self.put(part, start, mark)].append(end)
        return end

    @put.register
    def _repeat(self, expression: Repeat, start: int, mark: int) -> int:
        part, low, high = expression.part, expression.low, expression.high
        for _ in range(low if high is not None else low - 1):
            self.work.add(1)
            start = self.put(part, start, mark)
        if high is None:
            again = self.loop(start)
            end = self.put(part, again, mark)
            self.silent[end].append(again)
            return end if low else self.loop(again)
        end = self.state()
        for _ in range(high - low):
            self.silent[start].append(end)
            start = self.put(part, start, mark)
        self.silent[start].append(end)
        return end

    @put.register
    def _marked(self, expression: Marked, start: int, mark: int) -> int:
        return self.put(expression.part, start, expression.mark)

    @put.register
    def _graph(self, expression: Graph, start: int, mark: int) -> int:
        states = [self.loop(start)] + [self.state() for _ in range(expression.nodes - 1)]
        for source, part, target in expression.edges:
            # A state of its own, or what loops in the part would loop in the node.
            self.silent[self.put(part, self.loop(states[source]), mark)].append(states[target])
        return states[-1]

    @put.register
    def _both(self, expression: Both, start: int, mark: int) -> int:
        first, second = determinize(expression.part, self.work), determinize(expression.other, self.work)
        rows = _trimmed(_product(first, second, expression.negative, self.work), self.work)
        states, end = [start] + [self.state() for _ in rows.edges[1:]], self.state()
        states[0] = self.loop(start)
        for state, edges, accepting in zip(states, rows.edges, rows.accepting):
            self.edges[state] += [(low, high, states[target], mark or own) for low, high, target, own in edges]
            if accepting:
                self.silent[state].append(end)
        return end


class _Subsets:
    """The sets of states of a network that the same bytes lead to."""

    def __init__(self, network: _Network, final: int, work: Work):
        self.network, self.final, self.work = network, final, work
        self.kernels: list[tuple[int, ...]] = []  # of each set its states with edges
        self._by_targets: dict[frozenset[int] | int, int] = {}
        self._by_kernel: dict[tuple[tuple[int, ...], bool], int] = {}
        self._accepting: list[bool] = []

    def rows(self, start: int) -> Rows:
        edges: list[list[Edge]] = []
        self._number(start)
        while len(edges) < len(self.kernels):
            kernel = self.kernels[len(edges)]
            leaving = self.network.edges[kernel[0]] if len(kernel) == 1 else []
            if len(leaving) == 1:
                low, high, target, mark = leaving[0]
                self.work.add(1)
                edges.append([(low, high, self._number(target), mark)])
            else:
                edges.append(self._split([edge for state in kernel for edge in self.network.edges[state]]))
            if len(self.kernels) > MAX_STATES:
                raise too_large(len(self.kernels))
        return Rows(edges, self._accepting)

    def _split(self, leaving: list[Edge]) -> list[Edge]:
        """Edges that are apart, each to the set that its bytes lead to. It is marked if all that it joins are."""
        borders = sorted({border for low, high, *_ in leaving for border in (low, high + 1)})
        found: list[Edge] = []
        leaving = sorted(leaving)
        active: list[Edge] = []
        at = 0
        self.work.add(len(borders) + len(leaving))
        for low, beyond in pairwise(borders):
            active = [edge for edge in active if edge[1] >= low]
            while at < len(leaving) and leaving[at][0] <= low:
                active.append(leaving[at])
                at += 1
            if not active:
                continue
            self.work.add(len(active))
            if len(active) == 1:
                target, mark = self._number(active[0][2]), active[0][3]
            else:
                target = self._number(frozenset(edge[2] for edge in active))
                mark = joined([edge[3] for edge in active])
            if found and found[-1][1:] == (low - 1, target, mark):
                found[-1] = (found[-1][0], beyond - 1, target, mark)
            else:
                found.append((low, beyond - 1, target, mark))
        return found

    def _number(self, targets: frozenset[int] | int) -> int:
        """The number of the set that some states belong to."""
        number = self._by_targets.get(targets)
        if number is None:
            kernel, accepting = self._closure([targets] if isinstance(targets, int) else targets)
            number = self._by_kernel.setdefault((kernel, accepting), len(self.kernels))
            if number == len(self.kernels):
                self.kernels.append(kernel)
                self._accepting.append(accepting)
            self._by_targets[targets] = number
        return number

    def _closure(self, states: Iterable[int]) -> tuple[tuple[int, ...], bool]:
        """The states with edges that are reached without a byte, and whether the end is."""
        silent, edges = self.network.silent, self.network.edges
        seen = set(states)
        todo = list(seen)
        while todo:
            for state in silent[todo.pop()]:
                if state not in seen:
                    seen.add(state)
                    todo.append(state)
        self.work.add(len(seen))
        return tuple(sorted(state for state in seen if edges[state])), self.final in seen


def _product(first: Rows, second: Rows, negative: bool, work: Work) -> Rows:
    """The texts of both automata; negative: those of the first that the second lacks. Its dead state is -1."""
    numbers, pairs, rows = {(0, 0): 0}, [(0, 0)], Rows()
    for one, other in pairs:
        rows.accepting.append(first.accepting[one] and (other >= 0 and second.accepting[other]) != negative)
        edges: list[Edge] = []
        others = second.edges[other] if other >= 0 else []
        work.add(len(first.edges[one]) + len(others) + 1)
        for low, high, target, mark in first.edges[one]:
            for start, stop, behind in _cut(low, high, others):
                if behind < 0 and not negative:
                    continue
                number = numbers.setdefault((target, behind), len(pairs))
                if number == len(pairs):
                    pairs.append((target, behind))
                    if number > MAX_STATES:
                        raise too_large(number)
                edges.append((start, stop, number, mark))
        rows.edges.append(edges)
    return rows


def _cut(low: int, high: int, edges: list[Edge]) -> Iterable[tuple[int, int, int]]:
    """A range of bytes as ranges within the edges, each with the edge's target, and outside of them, with -1."""
    for first, last, target, _ in edges:
        if last < low:
            continue
        if first > high:
            break
        if low < first:
            yield low, first - 1, -1
        yield max(low, first), min(high, last), target
        low = last + 1
    if low <= high:
        yield low, high, -1


def _trimmed(rows: Rows, work: Work) -> Rows:
    """Without states from which no end is reached; the start stays."""
    before: list[list[int]] = [[] for _ in rows.edges]
    for state, edges in enumerate(rows.edges):
        work.add(len(edges))
        for edge in edges:
            before[edge[2]].append(state)
    todo = [state for state, accepting in enumerate(rows.accepting) if accepting]
    useful = set(todo)
    while todo:
        for state in before[todo.pop()]:
            if state not in useful:
                useful.add(state)
                todo.append(state)
    useful.add(0)
    if len(useful) == len(rows.edges):
        return rows
    number = {state: i for i, state in enumerate(sorted(useful))}
    return Rows(
        [
            [(low, high, number[target], mark) for low, high, target, mark in rows.edges[state] if target in useful]
            for state in sorted(useful)
        ],
        [rows.accepting[state] for state in sorted(useful)],
    )
