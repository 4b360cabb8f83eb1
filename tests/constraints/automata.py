"""Automata of bytes: what they accept, and random texts that they do."""

from collections import defaultdict

import numpy as np

from mlx_dgemma.constraints.checks import Scanner
from mlx_dgemma.constraints.dfa import build_dfa


def accepts(dfa, text):
    """Whether an automaton alone accepts a text."""
    state = 0
    for byte in text if isinstance(text, bytes) else text.encode():
        state = dfa.table[state, byte]
    return bool(dfa.accepting[state])


class Automaton:
    """The automaton of an expression or a plain pattern, and what is checked beside it."""

    def __init__(self, pattern):
        self.dfa = build_dfa(pattern)
        dead = len(self.dfa.table) - 1
        self.moves = [
            [(int(byte), int(row[byte])) for byte in np.flatnonzero(row != dead)] for row in self.dfa.table[:-1]
        ]
        self.next = [dict(moves) for moves in self.moves]
        self.distance = self._distances()

    def _distances(self):
        """How many bytes each state is from an end."""
        before = defaultdict(set)
        for state, moves in enumerate(self.moves):
            for _, target in moves:
                before[target].add(state)
        edge = set(np.flatnonzero(self.dfa.accepting).tolist())
        distance = dict.fromkeys(edge, 0)
        while edge:
            edge = {state for target in edge for state in before[target] if state not in distance}
            distance.update(dict.fromkeys(edge, 1 + max(distance.values())))
        return distance

    def matches(self, text):
        state, read, marks = 0, text.encode(), self.dfa.marks
        for byte in read:
            if (state := self.next[state].get(byte, -1)) < 0:
                return False
        return bool(self.dfa.accepting[state]) and (marks is None or Scanner(self.dfa.table, marks).feed(read) is None)

    def sample(self, rng, steps=60):
        """A random text that is not checked: random moves at first, then the shortest way to an end."""
        state, text = 0, bytearray()
        while True:
            moves, ends = self.moves[state], self.dfa.accepting[state]
            if ends and (not moves or rng.random() < 0.25 or len(text) > steps):
                return text.decode()
            if len(text) > steps or rng.random() < 0.1:
                nearest = min(self.distance[target] for _, target in moves)
                moves = [move for move in moves if self.distance[move[1]] == nearest]
            target = rng.choice(sorted({target for _, target in moves}))  # or most texts would be free text alone
            byte, state = rng.choice([move for move in moves if move[1] == target])
            text.append(byte)
