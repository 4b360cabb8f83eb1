"""The automaton of a plain pattern: a table of bytes, made by outlines-core and bounded in size."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import OptionError
from .dfa_size import dfa_size_exceeds
from .patterns import re_parser

MAX_STATES = 20_000  # of an automaton; its table then stays below 20 MB
BEGIN, END = "\U0010fffe", "\U0010ffff"  # noncharacters that no plain pattern matches


def build_dfa(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """The byte automaton of a pattern in the plain syntax of `patterns.python_regex_to_plain`.

    Returns:
        table: [states + 1, 256] int32, the next state for each byte. State 0 is the start, the last state is dead.
        accepting: [states + 1] bool.

    Raises:
        OptionError: the library is missing, or the automaton is too large.
    """
    try:
        from outlines_core import Index, Vocabulary
    except ImportError:
        raise OptionError(
            'schema, regex, infill and fill need the package outlines-core: pip install "mlx-dgemma[constrain]".'
        ) from None
    try:
        check_size(parse_plain(pattern))
        # The library builds the automaton of a search for the leftmost alternative's match. The two marks, which no
        # text contains, turn it into one of whole texts, and keep a second search from beginning inside a text.
        index = Index(f"{BEGIN}(?:{pattern}){END}", Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
    except (ValueError, re.error) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"The pattern cannot be made into an automaton ({error}); simplify it.") from None
    return _table(index.get_transitions(), index.get_initial_state(), set(index.get_final_states()))


def check_size(tree: Any) -> None:
    """Refuse a parsed plain pattern whose automaton is certainly, or may be, far too large.

    Raises:
        OptionError: its automaton has more than MAX_STATES states, or takes too long to make.
    """
    if (size := estimated_states(tree)) > MAX_STATES:
        raise _too_large(size)
    if dfa_size_exceeds(tree, 2 * MAX_STATES):  # with fewer states, `build_dfa` tells the exact number
        raise OptionError(
            f"The constraint takes an automaton of far more than {MAX_STATES:,} states, or too long to make: "
            "ask for less that may be read in several ways, such as .* before a counted part."
        )


def _table(transitions: dict[Any, dict[int, int]], initial: int, final: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """The automaton between the marks, of those states alone that lie on a way from its start to its end."""

    def after_mark(state: int | None, mark: str) -> int | None:
        for byte in mark.encode():
            state = transitions.get(state, {}).get(byte)
        return state

    start = after_mark(initial, BEGIN)
    accepted = [state for state in transitions if after_mark(state, END) in final]
    successors = {state: set(row.values()) for state, row in transitions.items()}
    useful = _reachable([start], successors) & _reachable(accepted, _reversed(successors))
    number = {state: i for i, state in enumerate([start, *sorted(useful - {start})])}
    if len(number) > MAX_STATES:
        raise _too_large(len(number))
    dead = len(number)
    table = np.full((dead + 1, 256), dead, np.int32)
    for state, row in number.items():
        for byte, target in transitions.get(state, {}).items():
            if byte < 256 and target in number:
                table[row, byte] = number[target]
    accepting = np.zeros(dead + 1, bool)
    accepting[[number[state] for state in accepted if state in number]] = True
    return table, accepting


def _reversed(successors: dict[int, set[int]]) -> dict[int, set[int]]:
    sources: dict[int, set[int]] = {}
    for state, targets in successors.items():
        for target in targets:
            sources.setdefault(target, set()).add(state)
    return sources


def _reachable(starts: Iterable[Any], successors: dict[Any, set[int]]) -> set[Any]:
    found, todo = set(starts), list(starts)
    while todo:
        new = successors.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def parse_plain(pattern: str) -> Any:
    r"""A plain pattern as `re` parses it, which writes \U0000000a for \x{a}."""
    return re_parser.parse(re.sub(r"\\x\{([0-9a-f]+)\}", lambda found: rf"\U{int(found[1], 16):08x}", pattern))


def estimated_states(tree: Any) -> int:
    """About how many states the automaton of a parsed plain pattern has: its characters, times their repeats."""
    total = 0
    for op, value in tree:
        name = str(op)
        if name == "MAX_REPEAT":
            low, high, body = value
            total += estimated_states(body) * (int(high) if high != re_parser.MAXREPEAT else max(int(low), 1))
        elif name == "SUBPATTERN":
            total += estimated_states(value[-1])
        elif name == "BRANCH":
            total += sum(map(estimated_states, value[1]))
        else:
            total += 1 + (len(value) // 4 if name == "IN" else 0)  # a class of many ranges takes some states more
    return total


def _too_large(states: int) -> OptionError:
    return OptionError(
        f"The constraint takes an automaton of about {states:,} states, and {MAX_STATES:,} are the most: ask for "
        "smaller bounds (maxLength, maxItems, {m,n})."
    )
