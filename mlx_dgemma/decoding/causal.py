"""Text that comes token by token: the encoder's next token is drawn, encoded, and so on.

A pass encodes a token of every row at once; attention goes row by row, over its own prefix, so rows join and leave
between any two passes. The next pass and its draw are under way before the host reads the token that it encodes. A
token's random key depends on its request's seed and its place in the text alone, so neither company nor drafts change
what is drawn.

A row with a draft takes a pass over the whole draft instead, which draws every place with the place's own key. What
is drawn counts as long as the draft before it was drawn, too: exactly what single tokens would have come to.

B is the batch, L the tokens of a pass, V the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import INTERRUPTS, LanguageError, as_exception
from ..model.config import ModelConfig
from ..model.diffusion_gemma import DiffusionGemma
from ..model.functions import finite
from ..model.kv_cache import BUFFER_STEP
from .costs import AT_ONCE, Costs
from .events import Block, Event, Finished
from .request import Request
from .sampler import draw
from .speculative import Drafter, draft_canvas

Told = tuple[Request, Event | Exception]
KEYS = 64  # random keys made at once


class Drawn(NamedTuple):
    """Tokens that were drawn, as a graph that may not be computed yet."""

    tokens: mx.array  # [L] int32
    log_probs: mx.array  # [L] float32, nats
    valid: mx.array  # [1] bool, whether the states that they were drawn from are numbers


class Taken(NamedTuple):
    """Tokens that the reader has taken, and whether the text ends with them."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: bool
    drawn: int  # of these, tokens that were drawn; the others end a thought whose budget is spent


class Row:
    """A request whose text comes token by token.

    Attributes:
        next: the token that is encoded next: on the host, or drawn and not read yet.
        pending: tokens behind it that are not drawn, since they end a thought.
        state: of the language before it, where the text is in one.
        scanner: what checks the language beside its states, before it; None: there is nothing to check.
        drafter: makes drafts; None in causal mode.
        steps: denoising steps that events have told of.
    """

    def __init__(self, request: Request, config: ModelConfig, costs: Callable[[], Costs]):
        self.request, self.session, self.sampling = request, request.session, request.options.sampling
        self.next: int | Drawn = request.prompt.tokens[-1]
        self.language = request.control.next_tokens() if request.control else None
        self.state = self.language.state if self.language else 0
        self.scanner = self.language.scanner if self.language else None
        self.pending: list[int] = []
        # Whether a token must be known before the next one can be drawn.
        self.waits = self.language is not None or request.options.thinking_budget is not None
        self.drafter: Drafter | None = None
        if request.options.mode == "speculative":
            longest, ends = config.canvas_length - 1, request.options.end_tokens
            self.drafter = Drafter(request.prompt.cache_key, costs(), longest, ends, request.likely)
        self.steps = request.steps
        self._place = 0  # of the next token that is drawn
        self._root, self._keys = mx.random.key(request.seed), mx.zeros((0, 2), mx.uint32)
        self._seen: mx.array | None = None  # [1, V] bool
        if self.sampling.repetition_penalty != 1:
            self._seen = mx.array(_one_hot(request.prompt.tokens, config.text.vocab_size))

    def draw(
        self, logits: mx.array, at: int = 0, draft: mx.array | None = None, allowed: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Draw the tokens of L places.

        Args:
            logits: [L, V].
            at: how many places lie between the next one and the first of these.
            draft: int32, the tokens from the next place on; None where L is 1.
            allowed: [L, V] bool, as `sampler.draw` takes it.

        Returns:
            As `sampler.draw`.
        """
        count, seen = len(logits), self._seen
        if seen is not None and draft is not None:
            before = mx.arange(logits.shape[1]) == draft[: at + count - 1, None]
            before = mx.concatenate([mx.zeros_like(seen), before]).astype(mx.int32)
            seen = seen | (mx.cumsum(before, axis=0)[at:] > 0)
        return draw(logits, self.sampling, self._keys_of(at, count), seen, allowed)

    def note(self, tokens: mx.array | Sequence[int]) -> None:
        """The next places hold these tokens."""
        self._place += len(tokens)
        if self._seen is not None:
            if isinstance(tokens, mx.array):
                self._seen = self._seen | (mx.arange(self._seen.shape[1]) == tokens[:, None])
            else:
                self._seen = self._seen | mx.array(_one_hot(tokens, self._seen.shape[1]))

    def _keys_of(self, at: int, count: int) -> mx.array | None:
        """[L, 2], the keys of the places; None where none are needed."""
        if self.sampling.temperature == 0:
            return None
        start = self._place + at
        while len(self._keys) < start + count:
            self._root, key = mx.random.split(self._root, 2)
            self._keys = mx.concatenate([self._keys, mx.random.split(key, KEYS)])
        return self._keys[start : start + count]


class TokenLoop:
    """Requests in causal and speculative mode, generated together.

    Args:
        model: the model.
        load_seconds: what loading it took, for statistics.
        costs: called for what its passes cost, once a request is in speculative mode.
    """

    def __init__(self, model: DiffusionGemma, load_seconds: float, costs: Callable[[], Costs]):
        self.model, self._load_seconds, self._costs = model, load_seconds, costs
        self._rows: list[Row] = []

    def add(self, request: Request) -> None:
        """Take in a request whose session holds all of its prompt but the last token."""
        self._rows.append(Row(request, self.model.config, self._costs))

    def remove(self, request: Request) -> None:
        """Forget a request, if it is here. Its session holds no more than was read of its text."""
        self._rows = [row for row in self._rows if row.request is not request]

    def step(self) -> Iterator[Told]:
        """A pass over the next token of each row, and one over the drafts of those that have one.

        Yields:
            A request and its event. `Finished`, or what it failed with, is a request's last.
        """
        drafting = [row for row in self._rows if row.drafter is not None and row.drafter.ready and not row.pending]
        plain = [row for row in self._rows if row not in drafting]
        for rows, generate in ((plain, self._single), (drafting, self._with_drafts)):
            try:
                if rows:
                    yield from generate(rows)
            except INTERRUPTS:
                raise
            except BaseException as error:  # of a whole batch: what it did to whom cannot be told
                for row in rows:
                    if row in self._rows:
                        row.session.reset()
                        yield self._fail(row, as_exception(error))

    def _single(self, rows: list[Row]) -> Iterator[Told]:
        """Encode the next token of each row and draw the one behind it; then read the token that was encoded."""
        next_tokens = [row.next.tokens if isinstance(row.next, Drawn) else mx.array([row.next]) for row in rows]
        hidden = self._encode(rows, mx.concatenate(next_tokens)[:, None])
        logits, valid = self.model.logits(hidden)[:, 0], finite(hidden)

        ahead = {i: self._draw_next(row, logits[i], valid[i]) for i, row in enumerate(rows) if not row.waits}
        mx.async_eval(list(ahead.values()), logits, valid, [row.session.prefix.state for row in rows])
        if any(row.session.prefix.offset % BUFFER_STEP == 0 for row in rows):
            mx.clear_cache()  # buffers of shapes that the longer prefix has no more use for
        for i, row in enumerate(rows):
            try:
                if isinstance(row.next, Drawn):
                    taken = self._take_next(row, row.next)
                    row.session.accept(list(taken.tokens[: taken.drawn]))
                    yield from self._tell(row, taken)
                else:
                    row.session.accept([row.next])
                if row in self._rows:
                    if row.pending:
                        row.next = row.pending.pop(0)
                    else:
                        row.next = ahead[i] if i in ahead else self._draw_next(row, logits[i], valid[i])
                        mx.async_eval(row.next)
            except INTERRUPTS:
                raise
            except BaseException as error:
                yield self._fail(row, as_exception(error))

    def _draw_next(self, row: Row, logits: mx.array, valid: mx.array) -> Drawn:
        """Draw the token of the next place by its logits [V]."""
        allowed = None
        if row.language is not None:
            allowed = mx.array(row.language.allowed(row.state, row.request.reader.left)[None])
        tokens, log_probs = row.draw(logits[None], allowed=allowed)
        if row.scanner is not None and np.asarray(valid):
            token, log_prob = self._within(row, *_numbers(tokens, log_probs), logits)
            tokens, log_probs = mx.array([token], mx.int32), mx.array([log_prob])
        if not row.waits:
            row.note(tokens)
        return Drawn(tokens, log_probs, valid[None])

    @staticmethod
    def _within(
        row: Row, token: int, log_prob: float, logits: mx.array, draft: Sequence[int] = ()
    ) -> tuple[int, float]:
        """The token that was drawn behind a draft; where the text goes too far with it, one that is drawn anew.

        Raises:
            LanguageError: there is none.
        """
        state, scanner, left = row.state, row.scanner, row.request.reader.left - len(draft)
        assert row.language is not None
        for one in draft:
            scanner, state = row.language.scan(scanner, state, one), row.language.after(state, one)
        before, refused = mx.array(list(draft), mx.int32), []
        while row.language.scan(scanner, state, token) is None:
            refused.append(token)
            for room in (left, left + row.language.reserve):
                allowed = row.language.allowed(state, room)
                allowed[refused] = False
                if allowed.any():
                    break
            else:
                raise LanguageError(
                    "The text has an array or an object that repeats itself, and token by token nothing can be taken "
                    "back; ask again with another seed, or in diffusion mode."
                )
            tokens, log_probs = row.draw(logits[None], len(draft), before, mx.array(allowed[None]))
            token, log_prob = _numbers(tokens, log_probs)
        return token, log_prob

    def _with_drafts(self, rows: list[Row]) -> Iterator[Told]:
        """Draft some tokens of each row, verify them in one pass, and take those that causal mode would draw."""
        for row in rows:
            try:
                if isinstance(row.next, Drawn):
                    taken = self._take_next(row, row.next)
                    row.next = row.pending.pop(0) if row.pending else taken.tokens[-1]
                    yield from self._tell(row, taken)
            except INTERRUPTS:
                raise
            except BaseException as error:
                yield self._fail(row, as_exception(error))
        rows = [row for row in rows if row in self._rows and not row.pending]
        if not rows:
            return
        drafts = self._drafts(rows)
        padded = np.zeros((len(rows), 1 + max(len(draft) for draft in drafts)), np.int32)
        for i, (row, draft) in enumerate(zip(rows, drafts)):
            padded[i, : 1 + len(draft)] = [row.next, *draft]
        hidden = self._encode(rows, mx.array(padded))
        valid = finite(hidden)
        mx.async_eval(hidden, valid)
        for i, row in enumerate(rows):
            try:
                drawn = Drawn(*self._draw_verified(row, hidden[i], drafts[i]), valid[i : i + 1])
                yield from self._take_verified(row, drafts[i], drawn, hidden[i])
            except INTERRUPTS:
                raise
            except BaseException as error:
                yield self._fail(row, as_exception(error))

    def _drafts(self, rows: list[Row]) -> list[list[int]]:
        """Each row's draft: of the text so far or of what the last one left, else the model's."""
        config, asked = self.model.config, {}
        found: list[list[int]] = [[] for _ in rows]
        for i, row in enumerate(rows):
            room = config.text.max_position_embeddings - row.session.prefix.offset - 2  # beside the tokens around it
            most = max(min(row.request.reader.left - 1, room), 0)
            assert row.drafter is not None
            draft = row.drafter.propose(most, config.canvas_length - 1)
            if isinstance(draft, list):
                found[i] = draft
            elif draft:
                asked[i] = draft, most
        if asked:
            length, makers = max(length for length, _ in asked.values()), [rows[i] for i in asked]
            prefixes, seeds = [row.session.prefix for row in makers], [row.request.seed for row in makers]
            first = [row.next for row in makers if not isinstance(row.next, Drawn)]
            canvas, keys = draft_canvas(prefixes, first, seeds, length, config.text.vocab_size)
            made = self.model.head.predict(self.model.denoise(canvas, prefixes), 1.0, keys)
            tokens, sure = np.asarray(made.argmax), np.asarray(made.confidence)
            for place, (i, (_, most)) in enumerate(asked.items()):
                rows[i].request.steps += 1
                rows[i].request.positions += length + 1
                drafter = rows[i].drafter
                assert drafter is not None
                found[i] = drafter.keep(tokens[place, 1:].tolist(), sure[place, 1:].tolist(), most)
        return found

    def _draw_verified(self, row: Row, hidden: mx.array, draft: list[int]) -> tuple[mx.array, mx.array]:
        """Draw the place of every token of a draft and the one behind; hidden [L, H] may have padding behind it.

        In a language, the places end where the draft leaves it.
        """
        count, allowed = len(draft) + 1, None
        if row.language is not None:
            state, left, scanner = row.state, row.request.reader.left, row.scanner
            masks = [row.language.allowed(state, left)]
            for i, token in enumerate(draft):
                if not masks[-1][token] or token in row.request.options.end_tokens:
                    break
                if scanner is not None and (scanner := row.language.scan(scanner, state, token)) is None:
                    break
                state = row.language.after(state, token)
                masks.append(row.language.allowed(state, left - i - 1))
            count, allowed = len(masks), mx.array(np.stack(masks))
        parts, before = [], mx.array(draft, mx.int32)
        for start in range(0, count, AT_ONCE):
            part = slice(start, min(start + AT_ONCE, count))
            logits = self.model.logits(hidden[None, part])[0]
            parts.append(row.draw(logits, start, before, None if allowed is None else allowed[part]))
            mx.async_eval(parts[-1])
        return mx.concatenate([tokens for tokens, _ in parts]), mx.concatenate([log_probs for _, log_probs in parts])

    def _take_verified(self, row: Row, draft: list[int], drawn: Drawn, hidden: mx.array) -> Iterator[Told]:
        """Take the tokens that were drawn up to the first that the draft has not; hidden [L, H] is the pass's."""
        request, drafter, first = row.request, row.drafter, row.next
        tokens = np.asarray(drawn.tokens).tolist()
        right = next((i for i, (one, other) in enumerate(zip(draft, tokens)) if one != other), len(draft))
        right = min(right, len(tokens) - 1)
        assert drafter is not None and not isinstance(first, Drawn)
        drafter.learn(draft, tokens, right)
        if row.scanner is not None and np.asarray(drawn.valid)[0]:
            log_probs, logits = np.asarray(drawn.log_probs).tolist(), self.model.logits(hidden[None, right : right + 1])
            last = self._within(row, tokens[right], log_probs[right], logits[0, 0], draft[:right])
            tokens, log_probs = [*tokens[:right], last[0]], [*log_probs[:right], last[1]]
            drawn = Drawn(mx.array(tokens, mx.int32), mx.array(log_probs), drawn.valid)
        taken = self._take(row, drawn, right + 1)
        row.note(taken.tokens)
        row.session.accept([first, *taken.tokens[: min(right, taken.drawn)]])
        row.next = row.pending.pop(0) if row.pending else taken.tokens[-1]
        if draft:
            request.verified, request.drafted = request.verified + 1, request.drafted + len(draft)
            request.accepted += min(right, taken.drawn)
        yield from self._tell(row, taken)

    def _encode(self, rows: list[Row], tokens: mx.array) -> mx.array:
        """[B, L] -> [B, L, H], behind the rows' prefixes."""
        for row in rows:
            row.request.passes += 1
        return self.model.encode_ahead(tokens, [row.session.prefix for row in rows])

    def _take_next(self, row: Row, drawn: Drawn) -> Taken:
        """Read the next token."""
        taken = self._take(row, drawn)
        if row.waits:
            row.note(taken.tokens)
        return taken

    def _take(self, row: Row, drawn: Drawn, count: int = 1) -> Taken:
        """Read tokens that were drawn, `count` of them or up to the text's or a thought's end."""
        if not np.asarray(drawn.valid)[0]:
            row.session.reset()
            raise self.model.range_error()
        tokens, log_probs = (np.asarray(a).tolist()[:count] for a in (drawn.tokens, drawn.log_probs))
        own, reader = len(tokens), row.request.reader
        if row.request.options.thinking_budget is not None:
            closed, log_probs = reader.close_thought(tokens, log_probs)
            if closed != tokens:
                own = next(i for i, (one, other) in enumerate(zip([*tokens, None], closed)) if one != other)
                row.pending = closed[own:]
            tokens = closed
        for i, (token, log_prob) in enumerate(zip(tokens, log_probs)):
            if row.language is not None:
                if row.scanner is not None:
                    row.scanner = row.language.scan(row.scanner, row.state, token) or row.scanner
                row.state = row.language.after(row.state, token)
            if row.drafter is not None:
                row.drafter.take(token)
            if reader.feed([token], [log_prob]) is not None:
                return Taken(tuple(tokens[: i + 1]), tuple(log_probs[: i + 1]), True, min(own, i + 1))
        return Taken(tuple(tokens), tuple(log_probs), False, own)

    def _tell(self, row: Row, taken: Taken) -> Iterator[Told]:
        """The events of tokens that were taken, once the session holds what was encoded of them."""
        request, reader = row.request, row.request.reader
        request.first_block = request.first_block or time.perf_counter() - request.started
        steps = int(request.steps > row.steps)
        block, request.blocks, row.steps = request.blocks, request.blocks + 1, request.steps
        over, held = taken.ended, len(request.prompt.tokens) + len(reader.tokens)
        if not over and held >= self.model.config.text.max_position_embeddings:
            reader.cut("length")
            over = True
        yield request, Block(block, steps, taken.tokens, *reader.take(), taken.log_probs)
        if over:
            self.remove(request)
            yield request, Finished(request.result(self._load_seconds))

    def _fail(self, row: Row, error: Exception) -> Told:
        self.remove(row.request)
        return row.request, error


def _one_hot(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """[1, V] bool, true for these tokens."""
    found = np.zeros((1, vocab_size), bool)
    found[0, list(tokens)] = True
    return found


def _numbers(token: mx.array, log_prob: mx.array) -> tuple[int, float]:
    return int(np.asarray(token)[0]), float(np.asarray(log_prob)[0])
