"""The scores of all states before every position of a canvas, and the way back through them."""

from __future__ import annotations

import numpy as np

from .language import Language
from .moves import LikelyMoves

BLOCK = 64  # positions that are prepared together


class Lattice:
    """Dynamic programming over the positions of a canvas and the states of a language.

    Args:
        language: of the text.
        always_scored_log_p: [C, S] log-probabilities of the language's always scored tokens.
        likely: [C, K] further tokens of each position.
        likely_log_p: [C, K] theirs.
        state: of the language before the first position; None: the text has not begun.
        entry: [C] float64, the score of a text that only begins behind each position; None: none does.

    Attributes:
        scores: [C + 1, states] float64, the log-probability of the best tokens for the positions before each one that
            lead to each state; minus infinity if there are none. States are columns of `ScoredMoves`.
    """

    def __init__(
        self,
        language: Language,
        always_scored_log_p: np.ndarray,
        likely: np.ndarray,
        likely_log_p: np.ndarray,
        state: int | None,
        entry: np.ndarray | None = None,
    ):
        self._language, self._scored = language, language.scored_moves
        self._log_p, self._likely, self._likely_log_p = always_scored_log_p, likely, likely_log_p
        self._start = int(self._scored.column[0])
        self._entry = entry
        self._entered = [False] * len(likely)  # whether the best way to the start is to begin behind a position
        self._prepared: list[tuple[np.ndarray, LikelyMoves]] = []
        self._by_scored = np.empty((len(likely), self._scored.reached))  # the scores that scored moves alone lead to
        self.scores = np.full((len(likely) + 1, len(self._scored.column)), -np.inf)
        if state is not None:
            self.scores[0, self._scored.column[state]] = 0.0

    def extend(self, i: int) -> None:
        """Score the states behind position i, the positions before it being done."""
        if i % BLOCK == 0:
            block = slice(i, i + BLOCK)
            moves = self._language.likely_moves(self._likely[block], self._likely_log_p[block])
            self._prepared.append((self._scored.best_of_groups(self._log_p[block]), moves))
        scored, (of_groups, likely) = self._scored, self._prepared[-1]
        before, after = self.scores[i], self.scores[i + 1]
        if scored.reached:
            score = before.take(scored.edge_source)
            score += of_groups[i % BLOCK].take(scored.edge_group)
            after[: scored.reached] = np.maximum.reduceat(score, scored.edge_starts, out=self._by_scored[i])
        start, stop = likely.first[i % BLOCK], likely.first[i % BLOCK + 1]
        if start < stop:
            score = before.take(likely.source[start:stop])
            score += likely.log_p[start:stop]
            np.maximum.at(after, likely.target[start:stop], score)
        if self._entry is not None and self._entry[i] > after[self._start]:
            after[self._start], self._entered[i] = self._entry[i], True

    def trace(self, stop: int, column: int) -> tuple[int, np.ndarray]:
        """The best text that takes the positions up to `stop` and leads to a column there.

        Returns:
            begin: its first position.
            tokens: [stop - begin] int32.
        """
        tokens, edges, i = np.zeros(stop, np.int32), [], stop
        while i and not (column == self._start and self._entered[i - 1]):
            i -= 1
            if column >= self._scored.reached or self._by_scored[i, column] != self.scores[i + 1, column]:
                tokens[i], column = self._first_likely(i, column)
            elif len(found := self._best_edges(i, column)) == 1:
                edges.append((i, column, found[0]))
                column = int(self._scored.edge_source[found[0]])
            else:
                tokens[i], column = self._first_scored(i, column)
        if edges:
            at, columns, edge = np.array(edges).T
            before = self.scores[at, self._scored.edge_source[edge]]
            group, log_p = self._scored.edge_group[edge], self._log_p[at]
            first = self._scored.first_with(self.scores[at + 1, columns], group, before, log_p)
            tokens[at] = self._language.always_scored_tokens[first]
        return i, tokens[i:]

    def _best_edges(self, i: int, column: int) -> list[int]:
        """The edges at position i that lead to a column with the highest score."""
        scored = self._scored
        start, stop = scored.edge_first[column], scored.edge_first[column + 1]
        score = self.scores[i].take(scored.edge_source[start:stop])
        score += self._prepared[i // BLOCK][0][i % BLOCK].take(scored.edge_group[start:stop])
        return [start + int(edge) for edge in (score == self.scores[i + 1, column]).nonzero()[0]]

    def _first_scored(self, i: int, column: int) -> tuple[int, int]:
        """The first always scored token that leads to a column with the highest score, and the column before it."""
        scored = self._scored
        moves = slice(scored.first[column], scored.first[column + 1])
        index, source = scored.index[moves], scored.source[moves]
        score = self.scores[i, source] + self._log_p[i, index]
        move = (score == self.scores[i + 1, column]).argmax()
        return int(self._language.always_scored_tokens[index[move]]), int(source[move])

    def _first_likely(self, i: int, column: int) -> tuple[int, int]:
        """As `_first_scored`, of the likely tokens by their rank."""
        likely = self._prepared[i // BLOCK][1]
        start, stop = likely.first[i % BLOCK], likely.first[i % BLOCK + 1]
        moves = (likely.target[start:stop] == column).nonzero()[0] + start
        source = likely.source.take(moves)
        score = self.scores[i].take(source) + likely.log_p.take(moves)
        move = (score == self.scores[i + 1, column]).argmax()
        return int(likely.token[moves[move]]), int(source[move])
