"""Where tokens lead from every state of an automaton.

The bytes of a token map the states that they can be read from to the states behind them. Many tokens have the same map,
for instance all words within free text. So the maps are numbered, a byte leads from map to map, and each step from one
to another is computed once.
"""

from __future__ import annotations

import numpy as np

from .tokens import MAX_TOKEN_BYTES, TokenBytes

MAX_MAPS = 2**14  # each takes 1 KiB beside its moves
MAX_MOVES = 2**22  # of all maps together; 16 bytes each
NOWHERE, IDENTITY = 0, 1  # the maps of a token that fits nowhere, and of no bytes at all
UNKNOWN = -1


class Walks:
    """The moves of tokens, found when they are asked for and kept.

    Args:
        table: [states, 256] int32, the next state for each byte; the last state is dead.
        token_bytes: of the tokenizer.
        wanted: [states] bool, the states that a token may lead to.
        column: [states] int64, the numbers by which `source` and `target` name states.

    Attributes:
        start: [maps + 1] int64; a map has the moves from its own start to the next one's.
        source: int64, the column of the state before each move; states ascend within a map.
        target: int64, of the state behind it.
    """

    def __init__(self, table: np.ndarray, token_bytes: TokenBytes, wanted: np.ndarray, column: np.ndarray):
        self._table, self._token_bytes, self._wanted, self._column = table, token_bytes, wanted, column
        self._forget()

    @property
    def nbytes(self) -> int:
        """About how much memory the maps take: the table is the automaton's."""
        arrays = (self._of_token, self._next, self.start, self.source, self.target, self._column, self._wanted)
        # A move of a map is two int32, once as arrays and once as bytes.
        return sum(array.nbytes for array in arrays) + 16 * self._moves

    def maps_of(self, tokens: np.ndarray) -> np.ndarray:
        """The number of each token's map, in the shape of `tokens`."""
        if (found := self._of_token[tokens]).min(initial=0) != UNKNOWN:
            return found
        if len(self._maps) > MAX_MAPS or self._moves > MAX_MOVES:
            self._forget()
        asked = np.zeros(len(self._of_token), bool)
        asked[tokens] = True
        self._walk(np.flatnonzero(asked & (self._of_token == UNKNOWN)))
        return self._of_token[tokens]

    def _forget(self) -> None:
        states = np.arange(len(self._table) - 1, dtype=np.int32)
        self._of_token = np.full(len(self._token_bytes.length), UNKNOWN, np.int32)
        self._maps = [(states[:0], states[:0]), (states, states)]  # sources and targets, whether wanted or not
        self._numbers = {b"": NOWHERE}
        self._next = np.full((256, 256), UNKNOWN, np.int32)  # the map behind each map and byte
        self._next[NOWHERE] = NOWHERE
        self._moves = 0
        self.start = np.zeros(3, np.int64)
        self.source = self.target = np.zeros(0, np.int64)

    def _walk(self, tokens: np.ndarray) -> None:
        """Find the maps of tokens."""
        known = len(self._maps)
        longest_first = np.argsort(MAX_TOKEN_BYTES - self._token_bytes.length[tokens].astype(np.uint8), kind="stable")
        tokens = tokens[longest_first]
        length = self._token_bytes.length[tokens]
        spelt = np.ascontiguousarray(self._token_bytes.bytes[tokens].T)
        at = np.where(length > 0, IDENTITY, NOWHERE)
        for i, count in enumerate(np.searchsorted(-length, -np.arange(MAX_TOKEN_BYTES)).tolist()):
            if not count:
                break
            steps = at[:count] * 256 + spelt[i, :count]  # tokens that have more than i bytes
            behind = self._next.take(steps)
            if behind.min() == UNKNOWN:
                self._extend(np.unique(steps[behind == UNKNOWN]))
                behind = self._next.take(steps)
            at[:count] = behind
        self._of_token[tokens] = at
        if len(self._maps) > known:
            self._keep(self._maps[known:])

    def _keep(self, maps: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Add the wanted moves of new maps to those that are told."""
        wanted = [self._wanted[targets] for _, targets in maps]
        sources, targets = ([ends[i][good] for ends, good in zip(maps, wanted)] for i in (0, 1))
        self.source = np.concatenate([self.source, self._column[np.concatenate(sources)]])
        self.target = np.concatenate([self.target, self._column[np.concatenate(targets)]])
        self.start = np.concatenate([self.start, self.start[-1] + np.cumsum([len(part) for part in sources])])

    def _extend(self, steps: np.ndarray) -> None:
        """Find the maps behind pairs of a map and a byte, which are given as map * 256 + byte."""
        before, byte = steps // 256, steps % 256
        parts = [self._maps[number] for number in before]
        source, target = (np.concatenate(ends) for ends in zip(*parts))
        owner = np.repeat(np.arange(len(steps)), [len(sources) for sources, _ in parts])
        target = self._table[target, byte[owner]]
        alive = target != len(self._table) - 1
        source, target, owner = source[alive], target[alive], owner[alive]
        borders = np.searchsorted(owner, np.arange(len(steps) + 1)).tolist()
        for number, value, start, stop in zip(before.tolist(), byte.tolist(), borders, borders[1:]):
            ends = source[start:stop], target[start:stop]
            behind = self._numbers.setdefault(ends[0].tobytes() + ends[1].tobytes(), len(self._maps))
            if behind == len(self._maps):
                self._maps.append(ends)
                self._moves += stop - start
            self._next[number, value] = behind
        if len(self._maps) > len(self._next):
            more = np.full((2 * len(self._maps) - len(self._next), 256), UNKNOWN, np.int32)
            self._next = np.concatenate([self._next, more])
