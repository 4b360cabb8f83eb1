"""Regular languages over the canvas: the most probable text of a language, given every position's distribution.

A denoiser's positions are independent given the canvas, so the best string of a language is found by dynamic
programming over positions and automaton states (DINGO, arXiv 2505.23061). The automaton reads bytes; tokens walk
through it. Only tokens that matter are looked at: the likely ones of each position, and for every state the tokens
that a narrow way through the language is spelt with, so that there is always a way to its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from ..errors import OptionError
from .dfa import build_dfa
from .patterns import ALL_CODE_POINTS, SURROGATES, character_class, subtract
from .tokens import MAX_TOKEN_BYTES, TokenBytes

BROAD_STATE = 32  # bytes that may follow: a state of more is inside free text

MAX_CACHED_TOKENS = 2**18  # tokens whose ways through an automaton are remembered
MIN_PROBABILITY = 1e-5  # probability below which a position's token is not looked at


@dataclass(frozen=True)
class Transitions:
    """Walks of tokens through an automaton, as parallel arrays: token `at[i]` (an index) leads `source` to `target`."""

    at: np.ndarray
    source: np.ndarray
    target: np.ndarray


class Language:
    """A regular language as one tokenizer's tokens spell it. States are numbered; 0 is the start.

    Args:
        pattern: in the plain subset that `regular.python_regex_to_plain` writes.
        spelling: of the tokenizer.
        what: how an error names the pattern.

    Attributes:
        anchors: [S] int32, tokens whose probability is needed at every position.
        distance: [states] tokens from each state to the language's end, infinite where it is out of reach.

    Raises:
        OptionError: no text of the language can be spelt, or the automaton is too large.
    """

    def __init__(self, pattern: str, spelling: TokenBytes, what: str = "The constraint"):
        self._table, self.accepting = build_dfa(pattern)
        self._spelling, self._dead = spelling, len(self._table) - 1
        live = self._table != self._dead
        self._sources = [np.flatnonzero(live[:, byte]) for byte in range(256)]
        self._broad = live.sum(axis=1) > BROAD_STATE
        self.always_scored_tokens = self._find_anchors(live)
        ways = self.transitions_of(self.always_scored_tokens)
        self.distance = self._distances(ways)
        if np.isinf(self.distance[0]):
            raise OptionError(f"{what} has no text that this tokenizer can spell; change it.")
        ways = self._reaching(ways)
        order = np.argsort(ways.target, kind="stable")
        self._ways = Transitions(ways.at[order], ways.source[order], ways.target[order])
        self._ends, self._starts = np.unique(self._ways.target, return_index=True)
        self._slot = np.full(len(spelling.length), -1, np.int32)
        self._known = Transitions(*(np.zeros(0, np.int32) for _ in range(3)))
        self._bounds = np.zeros(1, np.int64)  # of each slot's ways in `_known`

    def transitions_of(self, tokens: np.ndarray) -> Transitions:
        """All ways of these tokens from any state to a live one; `at` indexes `tokens`."""
        spelling = self._spelling
        at = np.flatnonzero(spelling.length[tokens] > 0)
        first = spelling.bytes[tokens[at], 0]
        counts = np.array([len(self._sources[byte]) for byte in first], np.int64)
        source = np.concatenate([self._sources[byte] for byte in first]) if len(first) else np.zeros(0, np.int64)
        at = np.repeat(at, counts)
        state, length = source, spelling.length[tokens]
        state = self._table[state, spelling.bytes[tokens[at], 0]] if len(at) else state
        done: list[tuple[np.ndarray, ...]] = []
        for i in range(1, MAX_TOKEN_BYTES + 1):
            over = length[at] == i
            done.append((at[over], source[over], state[over]))
            at, source, state = at[~over], source[~over], state[~over]
            if not len(at):
                break
            state = self._table[state, spelling.bytes[tokens[at], i]]
            alive = state != self._dead
            at, source, state = at[alive], source[alive], state[alive]
        return Transitions(*(np.concatenate(parts).astype(np.int32) for parts in zip(*done)))

    def state_after(self, tokens: Sequence[int], state: int = 0) -> int:
        """The state that tokens lead to; the dead one where they leave the language."""
        for byte in self._spelling.to_bytes(tokens):
            state = int(self._table[state, byte])
        return state

    @cached_property
    def shortest_length(self) -> int:
        """Tokens of the shortest text, over all of the vocabulary: `distance` knows the anchors alone."""
        return int(self._distances(self.transitions_of(np.flatnonzero(self._spelling.length)))[0])

    def extend_scores(self, before: np.ndarray, after: np.ndarray, log_p: np.ndarray) -> None:
        """Fill the scores [states] behind a position where it takes an anchor; `log_p` [S] is of the anchors."""
        ways = self._ways
        if len(ways.at):
            after[self._ends] = np.maximum.reduceat(before[ways.source] + log_p[ways.at], self._starts)

    def backtrack(
        self, before: np.ndarray, log_p: np.ndarray, likely: tuple[np.ndarray, ...], at: int
    ) -> tuple[int, int]:
        """(token, state before it) of the best way to a state, over anchors and a position's likely ways."""
        source, target, likely_p, token = likely
        mine, theirs = self._ways.target == at, target == at
        sources = np.concatenate([self._ways.source[mine], source[theirs]])
        values = before[sources] + np.concatenate([log_p[self._ways.at[mine]], likely_p[theirs]])
        tokens = np.concatenate([self.always_scored_tokens[self._ways.at[mine]], token[theirs]])
        found = int(values.argmax())
        return int(tokens[found]), int(sources[found])

    def _find_anchors(self, live: np.ndarray) -> np.ndarray:
        """Tokens along narrow ways, and single characters everywhere."""
        spelling, found = self._spelling, []
        for byte in np.flatnonzero(live[:-1].any(axis=0)):
            tokens = spelling.starting_with(int(byte))
            single = tokens[spelling.length[tokens] == 1]
            found.append(single[:1] if byte < 128 else single[:0])
            narrow = self._sources[byte][~self._broad[self._sources[byte]]]
            longer = tokens[spelling.length[tokens] > 1]
            for state in np.unique(self._table[narrow, byte]):  # where these tokens are after their first byte
                found.append(self._narrow(longer, int(state)))
        anchors = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
        if np.isinf(self._distances(self.transitions_of(anchors))[0]):  # some character has no token of its own
            every = np.concatenate([spelling.starting_with(byte) for byte in range(256)])
            anchors = np.unique(np.concatenate([anchors, every[spelling.length[every] == 1]]))
        return anchors.astype(np.int32)

    def _narrow(self, tokens: np.ndarray, state: int) -> np.ndarray:
        """Those that, a byte of them read, go on from a state without crossing a broad one."""
        spelling, kept = self._spelling, []
        states = np.full(len(tokens), state)
        for i in range(1, MAX_TOKEN_BYTES):
            inside = ~self._broad[states]
            tokens, states = tokens[inside], states[inside]
            states = self._table[states, spelling.bytes[tokens, i]]
            over = (spelling.length[tokens] == i + 1) & (states != self._dead)
            kept.append(tokens[over])
            going = (spelling.length[tokens] > i + 1) & (states != self._dead)
            tokens, states = tokens[going], states[going]
            if not len(tokens):
                break
        return np.concatenate(kept)

    def _distances(self, ways: Transitions) -> np.ndarray:
        distance = np.where(self.accepting, 0.0, np.inf)
        while True:
            shorter = distance.copy()
            np.minimum.at(shorter, ways.source, distance[ways.target] + 1)
            if (shorter == distance).all():
                return distance
            distance = shorter

    def _reaching(self, ways: Transitions) -> Transitions:
        """Without those that lead where the end is out of reach."""
        good = np.isfinite(self.distance[ways.target])
        return Transitions(ways.at[good], ways.source[good], ways.target[good])

    def _learn(self, tokens: np.ndarray) -> None:
        """Remember the ways of tokens that were not met before."""
        if len(self._bounds) > MAX_CACHED_TOKENS:
            self._slot[:] = -1
            self._known, self._bounds = Transitions(*(np.zeros(0, np.int32) for _ in range(3))), np.zeros(1, np.int64)
        new = np.unique(tokens[self._slot[tokens] < 0])
        if not len(new):
            return
        ways = self._reaching(self.transitions_of(new))
        order = np.argsort(ways.at, kind="stable")
        self._known = Transitions(
            *(np.concatenate(pair) for pair in zip(
                (self._known.at, self._known.source, self._known.target),
                (new[ways.at[order]].astype(np.int32), ways.source[order], ways.target[order]),
            ))
        )  # fmt: skip
        self._slot[new] = len(self._bounds) - 1 + np.arange(len(new))
        ends = self._bounds[-1] + np.cumsum(np.bincount(ways.at, minlength=len(new)))
        self._bounds = np.concatenate([self._bounds, ends])

    def likely_transitions(self, tokens: np.ndarray, log_p: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """(source, target, log-probability, token) of each position's likely tokens."""
        where, which = np.nonzero(log_p > np.log(MIN_PROBABILITY))
        flat = tokens[where, which]
        self._learn(flat)
        slots = self._slot[flat]
        counts = self._bounds[slots + 1] - self._bounds[slots]
        pair = np.repeat(np.arange(len(flat)), counts)
        index = np.arange(len(pair)) - np.repeat(np.cumsum(counts) - counts, counts) + self._bounds[slots][pair]
        parts = self._known.source[index], self._known.target[index], log_p[where, which][pair], flat[pair]
        cuts = np.searchsorted(where[pair], np.arange(1, len(tokens)))
        yield from zip(*(np.split(part, cuts) for part in parts))


@cache
def _lines() -> tuple[np.ndarray, np.ndarray]:
    return build_dfa(character_class(subtract([ALL_CODE_POINTS], SURROGATES, (10, 10))) + "*")


def accepts_every_line(language: Language) -> bool:
    """Whether every text without a line break is in the language."""
    table, accepting = _lines()
    seen, todo = {(0, 0)}, [(0, 0)]
    while todo:
        line, mine = todo.pop()
        if accepting[line] and not language.accepting[mine]:
            return False
        for byte in np.flatnonzero(table[line] != len(table) - 1):
            pair = int(table[line, byte]), int(language._table[mine, byte])
            if pair not in seen:
                seen.add(pair)
                todo.append(pair)
    return True
