"""Regular languages over the canvas: the most probable text of a language, given every position's distribution.

A denoiser's positions are independent given the canvas, so the best string of a language is found by dynamic
programming over positions and automaton states (DINGO, arXiv 2505.23061). The automaton reads bytes; tokens walk
through it. Only tokens that matter are looked at: the likely ones of each position, and for every state the tokens
that a narrow way through the language is spelt with, so that there is always a way to its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from .errors import OptionError
from .regular import EVERYTHING, SURROGATES, characters, parser, without
from .subsets import exceeds

LONGEST = 64  # bytes of a token; longer ones are not taken in a constrained text
BROAD = 32  # bytes that may follow: a state of more is inside free text
STATES = 20_000  # of an automaton, so that its table stays below 20 MB
BEGIN, END = "\U0010fffe", "\U0010ffff"  # noncharacters, which no pattern matches
KNOWN = 2**18  # tokens whose ways through an automaton are remembered
FAINT = 1e-5  # probability below which a position's token is not looked at


class Spelling:
    """The bytes that a tokenizer's tokens stand for, in SentencePiece's notation; special ones stand for none."""

    def __init__(self, tokenizer: Any, vocab_size: int, silent: Iterable[int] = ()):
        special = {*tokenizer.all_special_ids, *silent}
        pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocab_size))))
        self.bytes = np.zeros((vocab_size, LONGEST), np.uint8)
        self.length = np.zeros(vocab_size, np.int32)  # 0: not a text
        fallback = np.zeros(vocab_size, bool)
        for token, piece in enumerate(pieces):
            if not piece or token in special:
                continue
            marked = piece[0] == "<" and re.fullmatch(r"<(?:0x([0-9A-F]{2})|unused\d+)>", piece)
            if marked and not marked[1]:
                continue
            byte = marked or None
            spelt = bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
            if len(spelt) <= LONGEST:
                self.bytes[token, : len(spelt)] = np.frombuffer(spelt, np.uint8)
                self.length[token] = len(spelt)
                fallback[token] = byte is not None
        order = np.flatnonzero(self.length)
        order = order[np.argsort(fallback[order], kind="stable")]
        self._by_first = [order[self.bytes[order, 0] == byte] for byte in range(256)]

    def starting(self, byte: int) -> np.ndarray:
        """Tokens whose text begins with a byte; a token of the bare byte comes last."""
        return self._by_first[byte]

    def spell(self, tokens: Sequence[int]) -> bytes:
        """The bytes of a sequence of tokens."""
        return b"".join(self.bytes[t, : self.length[t]].tobytes() for t in tokens)


def automaton(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """The byte automaton of a pattern in the plain subset that `regular.translate` writes.

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
        if (size := weight(tree := _plain(pattern))) > STATES:
            raise _too_large(size)
        if exceeds(tree, 2 * STATES):  # of fewer, the exact number is told below
            raise OptionError(
                f"The constraint takes an automaton of far more than {STATES:,} states, or too long to make: "
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
    if len(number) > STATES:
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


def _plain(pattern: str) -> Any:
    """A plain pattern as `re` parses it."""
    return parser.parse(re.sub(r"\\x\{([0-9a-f]+)\}", lambda found: rf"\U{int(found[1], 16):08x}", pattern))


def weight(tree: Any) -> int:
    """About how many states the automaton of a parsed plain pattern has: its characters, times their repeats."""

    def of(tree: Any) -> int:
        total = 0
        for op, value in tree:
            name = str(op)
            if name == "MAX_REPEAT":
                low, high, body = value
                total += of(body) * (int(high) if high != parser.MAXREPEAT else max(int(low), 1))
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
        f"The constraint takes an automaton of about {states:,} states, and {STATES:,} are the most: ask for smaller "
        "bounds (maxLength, maxItems, {m,n})."
    )


@dataclass(frozen=True)
class Ways:
    """Walks of tokens through an automaton, as parallel arrays: token `at[i]` (an index) leads `source` to `target`."""

    at: np.ndarray
    source: np.ndarray
    target: np.ndarray


class Language:
    """A regular language as one tokenizer's tokens spell it. States are numbered; 0 is the start.

    Args:
        pattern: in the plain subset that `regular.translate` writes.
        spelling: of the tokenizer.
        what: how an error names the pattern.

    Attributes:
        anchors: [S] int32, tokens whose probability is needed at every position.
        distance: [states] tokens from each state to the language's end, infinite where it is out of reach.

    Raises:
        OptionError: no text of the language can be spelt, or the automaton is too large.
    """

    def __init__(self, pattern: str, spelling: Spelling, what: str = "The constraint"):
        self._table, self.accepting = automaton(pattern)
        self._spelling, self._dead = spelling, len(self._table) - 1
        live = self._table != self._dead
        self._sources = [np.flatnonzero(live[:, byte]) for byte in range(256)]
        self._broad = live.sum(axis=1) > BROAD
        self.anchors = self._find_anchors(live)
        ways = self.walk(self.anchors)
        self.distance = self._distances(ways)
        if np.isinf(self.distance[0]):
            raise OptionError(f"{what} has no text that this tokenizer can spell; change it.")
        ways = self._reaching(ways)
        order = np.argsort(ways.target, kind="stable")
        self._ways = Ways(ways.at[order], ways.source[order], ways.target[order])
        self._ends, self._starts = np.unique(self._ways.target, return_index=True)
        self._slot = np.full(len(spelling.length), -1, np.int32)
        self._known = Ways(*(np.zeros(0, np.int32) for _ in range(3)))
        self._bounds = np.zeros(1, np.int64)  # of each slot's ways in `_known`

    def walk(self, tokens: np.ndarray) -> Ways:
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
        for i in range(1, LONGEST + 1):
            over = length[at] == i
            done.append((at[over], source[over], state[over]))
            at, source, state = at[~over], source[~over], state[~over]
            if not len(at):
                break
            state = self._table[state, spelling.bytes[tokens[at], i]]
            alive = state != self._dead
            at, source, state = at[alive], source[alive], state[alive]
        return Ways(*(np.concatenate(parts).astype(np.int32) for parts in zip(*done)))

    def after(self, tokens: Sequence[int], state: int = 0) -> int:
        """The state that tokens lead to; the dead one where they leave the language."""
        for byte in self._spelling.spell(tokens):
            state = int(self._table[state, byte])
        return state

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest text, over all of the vocabulary: `distance` knows the anchors alone."""
        return int(self._distances(self.walk(np.flatnonzero(self._spelling.length)))[0])

    def advance(self, before: np.ndarray, after: np.ndarray, log_p: np.ndarray) -> None:
        """Fill the scores [states] behind a position where it takes an anchor; `log_p` [S] is of the anchors."""
        ways = self._ways
        if len(ways.at):
            after[self._ends] = np.maximum.reduceat(before[ways.source] + log_p[ways.at], self._starts)

    def step_back(
        self, before: np.ndarray, log_p: np.ndarray, likely: tuple[np.ndarray, ...], at: int
    ) -> tuple[int, int]:
        """(token, state before it) of the best way to a state, over anchors and a position's likely ways."""
        source, target, likely_p, token = likely
        mine, theirs = self._ways.target == at, target == at
        sources = np.concatenate([self._ways.source[mine], source[theirs]])
        values = before[sources] + np.concatenate([log_p[self._ways.at[mine]], likely_p[theirs]])
        tokens = np.concatenate([self.anchors[self._ways.at[mine]], token[theirs]])
        found = int(values.argmax())
        return int(tokens[found]), int(sources[found])

    def _find_anchors(self, live: np.ndarray) -> np.ndarray:
        """Tokens along narrow ways, and single characters everywhere."""
        spelling, found = self._spelling, []
        for byte in np.flatnonzero(live[:-1].any(axis=0)):
            tokens = spelling.starting(int(byte))
            single = tokens[spelling.length[tokens] == 1]
            found.append(single[:1] if byte < 128 else single[:0])
            narrow = self._sources[byte][~self._broad[self._sources[byte]]]
            longer = tokens[spelling.length[tokens] > 1]
            for state in np.unique(self._table[narrow, byte]):  # where these tokens are after their first byte
                found.append(self._narrow(longer, int(state)))
        anchors = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
        if np.isinf(self._distances(self.walk(anchors))[0]):  # some character has no token of its own
            every = np.concatenate([spelling.starting(byte) for byte in range(256)])
            anchors = np.unique(np.concatenate([anchors, every[spelling.length[every] == 1]]))
        return anchors.astype(np.int32)

    def _narrow(self, tokens: np.ndarray, state: int) -> np.ndarray:
        """Those that, a byte of them read, go on from a state without crossing a broad one."""
        spelling, kept = self._spelling, []
        states = np.full(len(tokens), state)
        for i in range(1, LONGEST):
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

    def _distances(self, ways: Ways) -> np.ndarray:
        distance = np.where(self.accepting, 0.0, np.inf)
        while True:
            shorter = distance.copy()
            np.minimum.at(shorter, ways.source, distance[ways.target] + 1)
            if (shorter == distance).all():
                return distance
            distance = shorter

    def _reaching(self, ways: Ways) -> Ways:
        """Without those that lead where the end is out of reach."""
        good = np.isfinite(self.distance[ways.target])
        return Ways(ways.at[good], ways.source[good], ways.target[good])

    def _learn(self, tokens: np.ndarray) -> None:
        """Remember the ways of tokens that were not met before."""
        if len(self._bounds) > KNOWN:
            self._slot[:] = -1
            self._known, self._bounds = Ways(*(np.zeros(0, np.int32) for _ in range(3))), np.zeros(1, np.int64)
        new = np.unique(tokens[self._slot[tokens] < 0])
        if not len(new):
            return
        ways = self._reaching(self.walk(new))
        order = np.argsort(ways.at, kind="stable")
        self._known = Ways(
            *(np.concatenate(pair) for pair in zip(
                (self._known.at, self._known.source, self._known.target),
                (new[ways.at[order]].astype(np.int32), ways.source[order], ways.target[order]),
            ))
        )  # fmt: skip
        self._slot[new] = len(self._bounds) - 1 + np.arange(len(new))
        ends = self._bounds[-1] + np.cumsum(np.bincount(ways.at, minlength=len(new)))
        self._bounds = np.concatenate([self._bounds, ends])

    def _likely_ways(self, tokens: np.ndarray, log_p: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """(source, target, log-probability, token) of each position's likely tokens."""
        where, which = np.nonzero(log_p > np.log(FAINT))
        flat = tokens[where, which]
        self._learn(flat)
        slots = self._slot[flat]
        counts = self._bounds[slots + 1] - self._bounds[slots]
        pair = np.repeat(np.arange(len(flat)), counts)
        index = np.arange(len(pair)) - np.repeat(np.cumsum(counts) - counts, counts) + self._bounds[slots][pair]
        parts = self._known.source[index], self._known.target[index], log_p[where, which][pair], flat[pair]
        cuts = np.searchsorted(where[pair], np.arange(1, len(tokens)))
        yield from zip(*(np.split(part, cuts) for part in parts))


@dataclass(frozen=True)
class Marginals:
    """Log-probabilities of a row's positions, and tokens: `likely` and `log_p` [C, K], `best` and `top` [C]."""

    likely: np.ndarray
    log_p: np.ndarray
    best: np.ndarray  # the most probable token
    top: np.ndarray  # its log-probability
    anchors: np.ndarray  # [C, S], of the language's anchors
    ends: np.ndarray  # [C, E], of the end tokens
    marks: np.ndarray  # [C, 2] or [C, 0], of the tokens that open and close thinking


FRESH, THINKING = -2, -1  # states before the language: nothing written yet, and in the middle of a thought


def best_text(
    language: Language, seen: Marginals, state: int, ends: Sequence[int], left: int, marks: Sequence[int] = ()
) -> np.ndarray:
    """The most probable canvas that begins with, or goes on with, a text of the language and its end token.

    Args:
        language: what the text must be in.
        seen: the positions that it has.
        state: where it stands before the first of them; `FRESH` and `THINKING` where a thought may come first.
        ends: tokens one of which ends the text; behind it every position takes its best token.
        left: tokens that the text has room for, its end token included.
        marks: the tokens that open and close a thought.

    Returns:
        [C] int32 tokens.
    """
    length, count = len(seen.best), len(language.distance)
    scores = np.full((length + 1, count), -np.inf)
    thought = np.full(length + 1, -np.inf)  # of still being in a thought
    closed = np.zeros(length + 1, bool)  # whether state 0 is reached best by closing a thought
    if state != THINKING:
        scores[0, max(state, 0)] = 0.0
    if state == THINKING:
        thought[0] = 0.0
    within = np.where(np.isin(seen.likely, [*ends, *marks]), -np.inf, seen.log_p) if len(marks) else seen.log_p
    likely = list(language._likely_ways(seen.likely, seen.log_p))
    for i, (source, target, log_p, _) in enumerate(likely):
        language.advance(scores[i], scores[i + 1], seen.anchors[i])
        np.maximum.at(scores[i + 1], target, scores[i][source] + log_p)
        if len(marks):
            thought[i + 1] = thought[i] + within[i].max()
            if i == 0 and state == FRESH:
                thought[1] = seen.marks[0, 0]
            if (over := thought[i] + seen.marks[i, 1]) > scores[i + 1, 0]:
                scores[i + 1, 0], closed[i + 1] = over, True
    stop, at = _where_to_stop(language, seen, scores, thought[length], left)
    tokens = seen.best.copy()
    if stop < length:
        tokens[stop] = ends[int(seen.ends[stop].argmax())]
    for i in range(stop - 1, -1, -1):
        if at == THINKING:
            tokens[i] = marks[0] if i == 0 and state == FRESH else seen.likely[i, within[i].argmax()]
        elif at == 0 and closed[i + 1]:
            tokens[i], at = marks[1], THINKING
        else:
            tokens[i], at = language.step_back(scores[i], seen.anchors[i], likely[i], at)
    return tokens


def _where_to_stop(
    language: Language, seen: Marginals, scores: np.ndarray, thought: float, left: int
) -> tuple[int, int]:
    """(position of the end token, or the canvas's length where the text goes on; the state before it)."""
    length = len(seen.best)
    rest = np.concatenate([np.cumsum(seen.top[::-1])[::-1], [0.0]])  # of all positions from here on
    accepted = np.where(language.accepting, scores[:-1], -np.inf)
    ended = accepted.max(axis=1) + seen.ends.max(axis=1) + rest[1:]
    ended = np.where(np.arange(length) < left, ended, -np.inf)
    going = np.where(language.distance + 1 <= left - length, scores[length], -np.inf)
    if left - length <= language.distance[0] + 1:
        thought = -np.inf
    if ended.max() >= max(going.max(), thought):
        stop = int(ended.argmax())
        return stop, int(accepted[stop].argmax())
    return length, int(going.argmax()) if going.max() >= thought else THINKING


def exact_text(
    language: Language, seen: Marginals, start: int, stop: int, state: int = 0, room: int = 0
) -> tuple[np.ndarray, float]:
    """The most probable text that takes the positions from `start` to `stop`, and its score.

    Args:
        language: what the text is in.
        seen: the canvas.
        start, stop: the text's positions.
        state: where it stands before the first of them.
        room: tokens that it has afterwards, in canvases to come; without any it ends with these positions.

    Returns:
        [stop - start] int32 tokens and their log-probability; minus infinity where there is none.
    """
    scores = np.full((stop - start + 1, len(language.distance)), -np.inf)
    scores[0, state] = 0.0
    likely = list(language._likely_ways(seen.likely[start:stop], seen.log_p[start:stop]))
    for i, (source, target, log_p, _) in enumerate(likely):
        language.advance(scores[i], scores[i + 1], seen.anchors[start + i])
        np.maximum.at(scores[i + 1], target, scores[i][source] + log_p)
    final = np.where(language.distance <= room, scores[-1], -np.inf)
    at = int(final.argmax())
    tokens, score = seen.best[start:stop].copy(), float(final[at])
    if np.isfinite(score):
        for i in range(stop - start - 1, -1, -1):
            tokens[i], at = language.step_back(scores[i], seen.anchors[start + i], likely[i], at)
    return tokens, score


@cache
def _lines() -> tuple[np.ndarray, np.ndarray]:
    return automaton(characters(without([EVERYTHING], SURROGATES, (10, 10))) + "*")


def covers_lines(language: Language) -> bool:
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
