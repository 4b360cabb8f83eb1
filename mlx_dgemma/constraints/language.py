"""A regular language as one tokenizer's tokens spell it.

The automaton reads bytes, and a token moves it by all of its bytes. Of a large vocabulary only two kinds of tokens are
looked at: the likely ones of each position, and the `always_scored_tokens`. The latter alone can spell a text from
every state to the end, so that there is always a way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np

from ..errors import OptionError
from .checks import REQUIRED, Scanner
from .dfa import Dfa, build_dfa
from .expressions import Expression, characters, repeat
from .moves import LikelyMoves, ScoredMoves, Transitions
from .patterns import ALL_CODE_POINTS, SURROGATES, subtract
from .tokens import MAX_TOKEN_BYTES, TokenBytes
from .walks import Walks

BROAD_STATE = 32  # a state from which more bytes than this may follow lies inside free text
MAX_SCORED_MOVES = 1_000_000  # of always scored tokens; each takes some 100 bytes while they are found
MIN_PROBABILITY = 1e-5  # a position's tokens below it are not looked at


class Language:
    """A regular language over a tokenizer's tokens. States are numbered; 0 is the start, the last one is dead.

    Args:
        pattern: an expression, or a pattern in the plain syntax of `patterns.python_regex_to_plain`.
        token_bytes: of the tokenizer.
        what: how an error names the pattern.

    Attributes:
        token_bytes: of the tokenizer.
        table: [states, 256] int32, the next state for each byte.
        accepting: [states] bool.
        always_scored_tokens: [S] int32, tokens whose probability is needed at every position: all that fit into fixed
            text, and each that is a single character.
        scored_moves: theirs.
        distance: [states] tokens from each state to the end, of the always scored ones; infinite if there is no way.
        returns: how many levels of a schema that refers to itself are in it; 0 of any other.

    Raises:
        OptionError: the tokenizer can spell no text of the language, or the automaton is too large.
    """

    def __init__(self, pattern: str | Expression, token_bytes: TokenBytes, what: str = "The constraint"):
        self.table, self.accepting, self._marks = build_dfa(pattern)
        self.token_bytes, self._dead = token_bytes, len(self.table) - 1
        self.returns = 0
        live = self.table != self._dead
        self._states_taking = [np.flatnonzero(live[:, byte]) for byte in range(256)]
        self.always_scored_tokens = self._find_always_scored(live)
        transitions = self.transitions_of(self.always_scored_tokens)
        self.distance = self._distances(transitions)
        if np.isinf(self.distance[0]):
            raise OptionError(f"{what} has no text that this tokenizer can spell; change it.")
        transitions = self._not_stuck(transitions)
        self.scored_moves = ScoredMoves(transitions, len(self.distance))
        self._walks = Walks(self.table, token_bytes, np.isfinite(self.distance), self.scored_moves.column)

    @property
    def nbytes(self) -> int:
        """About how much memory it takes; it grows with the tokens that were looked at."""
        arrays = (self.table, self.accepting, self.distance, *self._states_taking)
        marks = 0 if self._marks is None else self._marks.nbytes
        return sum(array.nbytes for array in arrays) + marks + self.scored_moves.nbytes + self._walks.nbytes

    def transitions_of(self, tokens: np.ndarray) -> Transitions:
        """All moves of these tokens from any state to one that is not dead; `index` points into `tokens`."""
        all_bytes, length = self.token_bytes.bytes[tokens], self.token_bytes.length[tokens]
        index = np.flatnonzero(length > 0)
        sources = [self._states_taking[byte] for byte in all_bytes[index, 0]]
        source = np.concatenate(sources) if sources else np.zeros(0, np.int64)
        index = np.repeat(index, np.array([len(states) for states in sources], np.int64))
        state = self.table[source, all_bytes[index, 0]] if len(index) else source
        finished: list[tuple[np.ndarray, ...]] = []
        for i in range(1, MAX_TOKEN_BYTES + 1):  # i bytes of each token are read
            over = length[index] == i
            finished.append((index[over], source[over], state[over]))
            index, source, state = index[~over], source[~over], state[~over]
            if not len(index):
                break
            state = self.table[state, all_bytes[index, i]]
            alive = state != self._dead
            index, source, state = index[alive], source[alive], state[alive]
        return Transitions(*(np.concatenate(parts).astype(np.int32) for parts in zip(*finished)))

    def state_after(self, tokens: Sequence[int], state: int = 0) -> int:
        """The state that tokens lead to from `state`. It is the dead one if they leave the language."""
        for byte in self.token_bytes.to_bytes(tokens):
            state = int(self.table[state, byte])
        return state

    def scanner(self) -> Scanner | None:
        """What checks a text that its automaton alone does not; None: there is nothing to check."""
        return None if self._marks is None else Scanner(self.table, self._marks)

    def states_after(self, tokens: np.ndarray, state: int, ending: bool) -> np.ndarray:
        """[N] the state behind each token, from `state` on; dead if none, and, where `ending`, behind a marked byte."""
        found = np.where(self.token_bytes.length[tokens] > 0, state, self._dead)
        for i in range(int(self.token_bytes.length[tokens].max(initial=0))):
            byte = self.token_bytes.bytes[tokens, i]
            behind = self.table[found, byte]
            if ending and self._marks is not None:
                mark = self._marks[found, byte]
                behind = np.where((mark == 0) | (mark & REQUIRED > 0), behind, self._dead)
            found = np.where(self.token_bytes.length[tokens] > i, behind, found)
        return found

    @cached_property
    def shortest_length(self) -> int:
        """Tokens of the shortest text, over the whole vocabulary. `distance` uses the always scored tokens alone."""
        return int(self._distances(self.transitions_of(np.flatnonzero(self.token_bytes.length)))[0])

    def likely_moves(self, tokens: np.ndarray, log_p: np.ndarray) -> LikelyMoves:
        """The moves of each position's tokens that are not below MIN_PROBABILITY.

        Args:
            tokens: [C, K] the likely tokens of each position.
            log_p: [C, K] their log-probabilities.
        """
        position, rank = np.nonzero(log_p > np.log(MIN_PROBABILITY))
        token, token_log_p = tokens[position, rank], log_p[position, rank].astype(np.float64)
        walk = self._walks.maps_of(token)
        start = self._walks.start[walk]
        count = self._walks.start[walk + 1] - start
        behind = np.cumsum(count)  # Each token becomes `count` moves, which lie one behind the other from `start` on.
        kept = np.arange(count.sum()) + np.repeat(start - behind + count, count)
        first = np.concatenate([[0], behind])[np.searchsorted(position, np.arange(len(tokens) + 1))]
        parts = self._walks.source[kept], self._walks.target[kept], np.repeat(token_log_p, count)
        return LikelyMoves(first.tolist(), *parts, np.repeat(token, count))

    def _find_always_scored(self, live: np.ndarray) -> np.ndarray:
        """All tokens that fit into fixed text, and each that is a single character; see `always_scored_tokens`."""
        length, first = self.token_bytes.length, self.token_bytes.bytes[:, 0]
        is_character = length <= np.where(first < 128, 1, 4 - (first < 0xF0).astype(np.int32) - (first < 0xE0))
        text = length > 0
        # Many states over a small alphabet, where nearly all words fit: words are looked at where they are likely, and
        # only those of narrower states, which spell keys and punctuation, everywhere.
        steps = ((BROAD_STATE, text), (BROAD_STATE // 4, text), (2, text), (BROAD_STATE, is_character & text))
        tokens = next((found for most, among in steps if (found := self._fitting(live, most, among)) is not None), None)
        if tokens is None or np.isinf(self._distances(self.transitions_of(tokens))[0]):
            # Some character has no token of its own and is spelt in bytes.
            known = np.zeros(0, np.int64) if tokens is None else tokens
            tokens = np.unique(np.concatenate([known, np.flatnonzero(length == 1)]))
        return tokens.astype(np.int32)

    def _fitting(self, live: np.ndarray, most: int, among: np.ndarray) -> np.ndarray | None:
        """Those tokens among some [V] that fit into fixed text or are one ASCII character; None if far too many do.

        Args:
            live: [states, 256], whether a text goes on with each byte.
            most: bytes with which fixed text may go on.
            among: [V] bool.
        """
        self._broad = live.sum(axis=1) > most
        length, found, fitting = self.token_bytes.length, [], 0
        for byte in np.flatnonzero(live[:-1].any(axis=0)):
            tokens = self.token_bytes.starting_with(int(byte))
            if byte < 128:
                found.append(tokens[length[tokens] == 1][:1])
            narrow = self._states_taking[byte][~self._broad[self._states_taking[byte]]]
            tokens = tokens[(length[tokens] > 1) & among[tokens]]
            second = self.token_bytes.bytes[tokens, 1]
            for state in np.unique(self.table[narrow, byte]):
                if not self._broad[state]:
                    going_on = live[state].take(second)
                    fitting += int(going_on.sum())
                    if fitting > MAX_SCORED_MOVES:
                        return None
                    found.append(self._within_fixed_text(tokens[going_on], int(state)))
        tokens = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
        states = live.sum(axis=0)[self.token_bytes.bytes[tokens, 0]]
        return tokens if states.sum() <= MAX_SCORED_MOVES or not (length[tokens] > 1).any() else None

    def _within_fixed_text(self, tokens: np.ndarray, state: int) -> np.ndarray:
        """Those tokens that go on from `state`, which their first byte led to, and cross no broad state.

        Their second byte is known to lead on.
        """
        token_bytes, kept = self.token_bytes, []
        states = np.full(len(tokens), state)
        for i in range(1, MAX_TOKEN_BYTES):
            inside = ~self._broad[states]
            tokens, states = tokens[inside], states[inside]
            states = self.table[states, token_bytes.bytes[tokens, i]]
            alive = states != self._dead
            kept.append(tokens[(token_bytes.length[tokens] == i + 1) & alive])
            longer = (token_bytes.length[tokens] > i + 1) & alive
            tokens, states = tokens[longer], states[longer]
            if not len(tokens):
                break
        return np.concatenate(kept)

    def _distances(self, transitions: Transitions) -> np.ndarray:
        """[states] moves from each state to an accepting one, infinite where there is no way."""
        distance = np.where(self.accepting, 0.0, np.inf)
        order = np.argsort(transitions.target, kind="stable")
        source = transitions.source[order]
        first = np.searchsorted(transitions.target[order], np.arange(len(distance) + 1))
        reached, steps = np.flatnonzero(self.accepting), 0
        while len(reached):
            steps += 1
            before = np.unique(np.concatenate([source[first[state] : first[state + 1]] for state in reached.tolist()]))
            reached = before[np.isinf(distance[before])]
            distance[reached] = steps
        return distance

    def _not_stuck(self, transitions: Transitions) -> Transitions:
        """Those moves from whose target the end can be reached."""
        good = np.isfinite(self.distance[transitions.target])
        return Transitions(transitions.index[good], transitions.source[good], transitions.target[good])


@cache
def _lines() -> Dfa:
    """The automaton of all texts without a line break."""
    return build_dfa(repeat(characters(subtract([ALL_CODE_POINTS], SURROGATES, (10, 10))), 0, None))


def accepts_every_line(language: Language) -> bool:
    """Whether every text without a line break is in the language."""
    table, accepting, _ = _lines()
    seen, todo = {(0, 0)}, [(0, 0)]  # pairs of states of both automata, which the same text leads to
    while todo:
        line, state = todo.pop()
        if accepting[line] and not language.accepting[state]:
            return False
        for byte in np.flatnonzero(table[line] != len(table) - 1):
            pair = int(table[line, byte]), int(language.table[state, byte])
            if pair not in seen:
                seen.add(pair)
                todo.append(pair)
    return True
