"""The tokens that may come next in a text of a language, for text that comes token by token."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from .checks import Scanner
from .language import Language
from .search import FRESH, THINKING
from .tokens import MAX_TOKEN_BYTES

RESERVE = 8  # tokens of a text's room for what a scanner asks for at its end
KEPT_STATES = 32  # whose moves are kept; those of free text take 2 MB each at 262,144 tokens


class NextTokens:
    """Which tokens may follow, so that a text stays in a language and ends within its room.

    States are the language's, or `FRESH` or `THINKING` where a thought may stand before the text.

    Args:
        language: of the text.
        ends: tokens one of which ends the text.
        marks: the tokens that open and close a thought; empty if there is none.
        state: at the beginning.

    Attributes:
        scanner: what checks the text beside its automaton, at the beginning; None: there is nothing to check.
        reserve: tokens of the room that are left free while that can be, for what the scanner asks for at the end.
    """

    def __init__(self, language: Language, ends: Sequence[int], marks: Sequence[int] = (), state: int = 0):
        self._language, self._ends, self._marks, self.state = language, list(ends), list(marks), state
        self.scanner = language.scanner()
        self.reserve = 0 if self.scanner is None else RESERVE
        self._kept: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        thought = language.token_bytes.length > 0
        thought[[*self._ends, *self._marks]] = False
        self._thought = thought  # [V] bool, tokens of which a thought is made

    def allowed(self, state: int, left: int) -> np.ndarray:
        """[V] bool, the tokens that may follow.

        Args:
            state: before them.
            left: tokens that the text has room for, the end token included. A text that has room for the language's
                `distance` from its state and for the end token at first always has a token that may follow.
        """
        language = self._language
        if state == THINKING:
            goes_on = left > language.distance[0] + 2  # and what closes it
            found = self._thought.copy() if goes_on else np.zeros_like(self._thought)
            found[self._marks[1]] = True
            return found
        found = np.zeros_like(self._thought)
        if state == FRESH and left > language.distance[0] + 2:
            found[self._marks[0]] = True
        state = max(state, 0)
        tokens, distance = self._moves(state)
        found[tokens[distance + 1 < left - self.reserve]] = True
        found[self._ends] = language.accepting[state]
        if not found.any():
            found[tokens[distance + 1 < left]] = True
        return found

    def after(self, state: int, token: int) -> int:
        """The state behind a token that was allowed in `state`."""
        if self._marks and state in (FRESH, THINKING):
            if token == self._marks[1] and state == THINKING:
                return 0
            if state == THINKING or token == self._marks[0]:
                return THINKING
        return self._language.state_after([token], max(state, 0))

    def scan(self, scanner: Scanner, state: int, token: int) -> Scanner | None:
        """The scanner behind a token that was allowed in `state`; None: with it the text goes too far."""
        spelt = self._language.token_bytes.to_bytes([token])
        if token in self._ends or token in self._marks or state == THINKING or not spelt:
            return scanner
        behind = copy.deepcopy(scanner)
        return None if behind.feed(spelt) is not None or behind.repeats() else behind

    def _moves(self, state: int) -> tuple[np.ndarray, np.ndarray]:
        """All tokens that lead on from a state, and the distances from behind them to the end."""
        if state in self._kept:
            self._kept.move_to_end(state)
            return self._kept[state]
        language, spelt = self._language, self._language.token_bytes
        dead = len(language.table) - 1
        first = np.flatnonzero(language.table[state] != dead)
        tokens = np.concatenate([np.zeros(0, np.int64), *(spelt.starting_with(int(byte)) for byte in first)])
        at = language.table[state, spelt.bytes[tokens, 0]]
        found, behind = [], []
        for i in range(1, MAX_TOKEN_BYTES + 1):  # i bytes of each token are read
            over = spelt.length[tokens] == i
            found.append(tokens[over])
            behind.append(at[over])
            tokens, at = tokens[~over], at[~over]
            if not len(tokens):
                break
            at = language.table[at, spelt.bytes[tokens, i]]
            tokens, at = tokens[at != dead], at[at != dead]
        all_tokens, distance = np.concatenate(found), language.distance[np.concatenate(behind)]
        good = np.isfinite(distance)
        self._kept[state] = all_tokens[good].astype(np.int32), distance[good].astype(np.float32)
        if len(self._kept) > KEPT_STATES:
            self._kept.popitem(last=False)
        return self._kept[state]
