"""The search of the best text once more, position by position over all moves; the first of equals wins."""

import numpy as np

from mlx_dgemma.constraints.language import MIN_PROBABILITY
from mlx_dgemma.constraints.search import FRESH, THINKING


class Naive:
    """Oracle for `best_text` and `exact_text`."""

    def __init__(self, language):
        self.language = language
        index, source, target = self.moves(language.always_scored_tokens)
        order = np.argsort(target, kind="stable")
        self.index, self.source, self.target = index[order], source[order], target[order]

    def moves(self, tokens):
        moves = self.language.transitions_of(tokens)
        good = np.isfinite(self.language.distance[moves.target])
        return moves.index[good], moves.source[good], moves.target[good]

    def at(self, always_scored_log_p, likely, likely_log_p):
        """All moves of a position as token, source, target and log-probability; the always scored ones first."""
        likely, likely_log_p = (part[likely_log_p > np.log(MIN_PROBABILITY)] for part in (likely, likely_log_p))
        index, source, target = self.moves(likely)
        order = np.argsort(index, kind="stable")
        token = np.concatenate([self.language.always_scored_tokens[self.index], likely[index[order]]])
        log_p = np.concatenate([always_scored_log_p[self.index], likely_log_p[index[order]]])
        return token, np.append(self.source, source[order]), np.append(self.target, target[order]), log_p

    def forward(self, before, moves):
        after = np.full(len(before), -np.inf)
        _, source, target, log_p = moves
        np.maximum.at(after, target, before[source] + log_p)
        return after

    def back(self, before, moves, state):
        token, source, _, log_p = (part[moves[2] == state] for part in moves)
        best = (before[source] + log_p).argmax()
        return token[best], source[best]

    def best_text(self, seen, state, end_tokens, room, thought_tokens=()):
        length = len(seen.argmax)
        moves = [self.at(*of) for of in zip(seen.always_scored_log_p, seen.likely, seen.likely_log_p)]
        scores = np.full((length + 1, len(self.language.distance)), -np.inf)
        thought, by_closing = np.full(length + 1, -np.inf), np.zeros(length + 1, bool)
        if state == THINKING:
            thought[0] = 0
        else:
            scores[0, max(state, 0)] = 0
        silent = self.language.token_bytes.length[seen.likely] == 0
        never = silent | np.isin(seen.likely, [*end_tokens, *thought_tokens])
        inside = np.where(never, -np.inf, seen.likely_log_p)
        for i in range(length):
            scores[i + 1] = self.forward(scores[i], moves[i])
            if thought_tokens:
                thought[i + 1] = thought[i] + inside[i].max()
                if i == 0 and state == FRESH:
                    thought[1] = seen.thought_log_p[0, 0]
                closed = thought[i] + seen.thought_log_p[i, 1]
                if closed > scores[i + 1, 0]:
                    scores[i + 1, 0], by_closing[i + 1] = closed, True
        stop, at = self.where_to_stop(seen, scores, thought[length], room)
        tokens = seen.argmax.copy()
        if stop < length:
            tokens[stop] = end_tokens[seen.end_log_p[stop].argmax()]
        for i in reversed(range(stop)):
            if at == THINKING:
                tokens[i] = thought_tokens[0] if i == 0 and state == FRESH else seen.likely[i, inside[i].argmax()]
            elif at == 0 and by_closing[i + 1]:
                tokens[i], at = thought_tokens[1], THINKING
            else:
                tokens[i], at = self.back(scores[i], moves[i], at)
        return tokens

    def where_to_stop(self, seen, scores, thought, room):
        length, distance = len(seen.argmax), self.language.distance
        rest = np.append(np.cumsum(seen.argmax_log_p[::-1])[::-1], 0)
        accepted = np.where(self.language.accepting, scores[:-1], -np.inf)
        ended = accepted.max(axis=1) + seen.end_log_p.max(axis=1) + rest[1:]
        ended = np.where(np.arange(length) < room, ended, -np.inf)
        going_on = np.where(distance + 1 <= room - length, scores[length], -np.inf)
        if room - length <= distance[0] + 1:
            thought = -np.inf
        if ended.max() >= max(going_on.max(), thought):
            return ended.argmax(), accepted[ended.argmax()].argmax()
        return length, going_on.argmax() if going_on.max() >= thought else THINKING

    def exact_text(self, seen, start, stop, state, room):
        scores = [np.where(np.arange(len(self.language.distance)) == state, 0.0, -np.inf)]
        of = seen.always_scored_log_p[start:stop], seen.likely[start:stop], seen.likely_log_p[start:stop]
        moves = [self.at(*parts) for parts in zip(*of)]
        for one in moves:
            scores.append(self.forward(scores[-1], one))
        final = np.where(self.language.distance <= room, scores[-1], -np.inf)
        at, tokens = final.argmax(), seen.argmax[start:stop].copy()
        if np.isfinite(final[at]):
            for i in reversed(range(stop - start)):
                tokens[i], at = self.back(scores[i], moves[i], at)
        return tokens, final.max()
