"""Plain patterns as other programs read them: an automaton made by outlines_core, and `re`."""

import re
from collections import defaultdict

from outlines_core import Index, Vocabulary

BYTES = Vocabulary(256, {bytes([value]): [value] for value in range(256)})


class Automaton:
    r"""The automaton of a plain pattern, byte by byte.

    outlines_core looks for the leftmost match, in which a|ab is a alone; \z makes it look for all of them. With \z,
    the start needs a byte before it where the empty text matches.
    """

    def __init__(self, plain):
        index = Index(rf"\x{{0}}(?:{plain})\z", BYTES)
        self.moves = {
            state: sorted((byte, target) for byte, target in targets.items() if byte < 256)
            for state, targets in index.get_transitions().items()
        }
        ((_, self.start),) = self.moves[index.get_initial_state()]
        self.final = index.get_final_states()
        self.next = {state: dict(moves) for state, moves in self.moves.items()}
        self.distance = self._distances()

    def _distances(self):
        """How many bytes each state is from an end."""
        before = defaultdict(set)
        for state, moves in self.moves.items():
            for _, target in moves:
                before[target].add(state)
        distance, edge = dict.fromkeys(self.final, 0), set(self.final)
        while edge:
            edge = {state for target in edge for state in before[target] if state not in distance}
            distance.update(dict.fromkeys(edge, 1 + max(distance.values())))
        return distance

    def matches(self, text):
        state = self.start
        for byte in text.encode():
            state = self.next.get(state, {}).get(byte)
        return state in self.final

    def sample(self, rng, steps=60):
        """A random text: random moves at first, then the shortest way to an end."""
        state, text = self.start, bytearray()
        while True:
            moves = [move for move in self.moves.get(state, ()) if move[1] in self.distance]
            if state in self.final and (not moves or rng.random() < 0.25 or len(text) > steps):
                return text.decode()
            if len(text) > steps or rng.random() < 0.2:
                nearest = min(self.distance[target] for _, target in moves)
                moves = [move for move in moves if self.distance[move[1]] == nearest]
            byte, state = rng.choice(moves)
            text.append(byte)


def as_python(plain):
    """A plain pattern in the syntax of `re`."""
    return re.sub(r"\\x\{([0-9a-f]+)\}", lambda match: f"\\U{int(match[1], 16):08x}", plain)
