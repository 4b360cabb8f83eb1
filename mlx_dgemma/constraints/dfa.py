"""Regular languages over the canvas: the most probable text of a language, given every position's distribution.

A denoiser's positions are independent given the canvas, so the best string of a language is found by dynamic
programming over positions and automaton states (DINGO, arXiv 2505.23061). The automaton reads bytes; tokens walk
through it. Only tokens that matter are looked at: the likely ones of each position, and for every state the tokens
that a narrow way through the language is spelt with, so that there is always a way to its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import OptionError
from .dfa_size import dfa_size_exceeds
from .patterns import re_parser

MAX_STATES = 20_000  # of an automaton, so that its table stays below 20 MB
BEGIN, END = "\U0010fffe", "\U0010ffff"  # noncharacters, which no pattern matches


def build_dfa(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """The byte automaton of a pattern in the plain subset that `regular.python_regex_to_plain` writes.

    Returns:
        table [states + 1, 256] int32, where state 0 is the start and the last one is dead; accepting [states + 1] bool.

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
        if (size := estimated_states(tree := parse_plain(pattern))) > MAX_STATES:
            raise _too_large(size)
        if dfa_size_exceeds(tree, 2 * MAX_STATES):  # of fewer, the exact number is told below
            raise OptionError(
                f"The constraint takes an automaton of far more than {MAX_STATES:,} states, or too long to make: "
                "ask for less that may be read in several ways, such as .* before a counted part."
            )
        # The library builds the automaton of a search for the leftmost alternative's match. Between marks that no text
        # has, it finds whole texts alone, and begins no second search in the middle of one.
        index = Index(f"{BEGIN}(?:{pattern}){END}", Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
    except (ValueError, re.error) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"The pattern cannot be made into an automaton ({error}); simplify it.") from None
    ways = index.get_transitions()

    def walked(state: int | None, mark: str) -> int | None:
        for byte in mark.encode():
            state = ways.get(state, {}).get(byte)
        return state

    start, final = walked(index.get_initial_state(), BEGIN), set(index.get_final_states())
    accepted = [state for state in ways if walked(state, END) in final]
    useful = _reached([start], {state: set(row.values()) for state, row in ways.items()}) & _leading_to(accepted, ways)
    number = {state: i for i, state in enumerate([start, *sorted(useful - {start})])}
    if len(number) > MAX_STATES:
        raise _too_large(len(number))
    table = np.full((len(number) + 1, 256), len(number), np.int32)
    for state, at in number.items():
        for byte, to in ways.get(state, {}).items():
            if byte < 256 and to in number:
                table[at, byte] = number[to]
    accepting = np.zeros(len(table), bool)
    accepting[[number[state] for state in accepted if state in number]] = True
    return table, accepting


def _leading_to(accepted: list[int], ways: dict[int, dict[int, int]]) -> set[int]:
    """States from which one of these can be reached."""
    sources: dict[int, set[int]] = {}
    for state, row in ways.items():
        for to in row.values():
            sources.setdefault(to, set()).add(state)
    return _reached(accepted, sources)


def _reached(starts: Iterable[Any], neighbours: dict[Any, set[int]]) -> set[Any]:
    found, todo = set(starts), list(starts)
    while todo:
        new = neighbours.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def parse_plain(pattern: str) -> Any:
    """A plain pattern as `re` parses it."""
    return re_parser.parse(re.sub(r"\\x\{([0-9a-f]+)\}", lambda found: rf"\U{int(found[1], 16):08x}", pattern))


def estimated_states(tree: Any) -> int:
    """About how many states the automaton of a parsed plain pattern has: its characters, times their repeats."""

    def of(tree: Any) -> int:
        total = 0
        for op, value in tree:
            name = str(op)
            if name == "MAX_REPEAT":
                low, high, body = value
                total += of(body) * (int(high) if high != re_parser.MAXREPEAT else max(int(low), 1))
            elif name == "SUBPATTERN":
                total += of(value[-1])
            elif name == "BRANCH":
                total += sum(of(one) for one in value[1])
            else:
                total += 1 + (len(value) // 4 if name == "IN" else 0)
        return total

    return of(tree)


def _too_large(states: int) -> OptionError:
    return OptionError(
        f"The constraint takes an automaton of about {states:,} states, and {MAX_STATES:,} are the most: ask for "
        "smaller bounds (maxLength, maxItems, {m,n})."
    )
