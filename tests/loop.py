"""The block loop for tests: run over a random model, and once more as the specification tells it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from naive import two_levels
from support import small_model

from mlx_dgemma.decoding.events import Finished
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.request import Request
from mlx_dgemma.decoding.session import PromptTokens, Session
from mlx_dgemma.decoding.step import CONFIDENT, LIKELY, UNLIKELY
from mlx_dgemma.engine import Engine
from mlx_dgemma.model import tiling

# A random model is never sure, so these bounds are wide: some canvases settle and some do not.
OPTIONS = GenerationOptions(
    max_denoising_steps=10, entropy_bound=2.5, confidence_threshold=1.0, end_tokens=(39,), exact=True
)


class Reader:
    """Takes blocks until there are `blocks` of them, whatever their text has room for."""

    text, thinking, tool_calls = "", "", ()

    def __init__(self, blocks, room=10**6):
        self.blocks, self.room, self.taken, self.reason, self.log_probs = blocks, room, [], None, []

    @property
    def tokens(self):
        return [token for block in self.taken for token in block]

    @property
    def finish_reason(self):
        return "length" if len(self.taken) == self.blocks else self.reason

    @property
    def left(self):
        return max(self.room - len(self.tokens), 1)

    def feed(self, tokens, log_probs):
        self.taken.append(tokens)
        self.log_probs += log_probs
        return "length" if len(self.taken) == self.blocks else None

    def cut(self, reason):
        self.reason = reason

    def take(self):
        return "", ""

    def preview(self, tokens):
        return ""


def request_of(model, prompt, reader, seed, options, control=None, chunk=2048):
    """A request and the session for it."""
    asked = PromptTokens(list(prompt), list(prompt))
    return Request(asked, seed, replace(options, prefill_chunk=chunk), reader, control, drafts=True), Session(model)


def run(model, prompts, blocks, seeds, options=OPTIONS, chunk=2048, room=10**6, late=()):
    """Each row's events, and all readers, for prompts of any length; rows in `late` come after so many steps."""
    readers, events = [Reader(n, room) for n in blocks], [[] for _ in prompts]
    requests = [request_of(model, *one, options, None, chunk) for one in zip(prompts, readers, seeds)]
    loop, waiting = Loop(model), dict(late)
    for row, request in enumerate(requests):
        if row not in waiting:
            loop.add(*request)
    steps = 0
    while loop.requests or waiting:
        for row, when in list(waiting.items()):
            if when <= steps:
                loop.add(*requests[row])
                del waiting[row]
        for request, event in loop.step():
            if isinstance(event, Exception):
                raise event
            if not isinstance(event, Finished):
                events[[one for one, _ in requests].index(request)].append(event)
        steps += 1
    return events, readers


class Told(NamedTuple):
    """A block of `plain_loop`."""

    tokens: tuple
    steps: int
    why: set  # the rules that ended it; none where the steps were used up
    accepted: list  # of each step, as the two that follow
    entropy: list
    counted: list  # positions that had to settle


def confident(p, kept):
    """What fast mode keeps, [C] of numpy: as `sampler.accept_confident`."""
    now = ~kept & (p >= CONFIDENT)
    others, taken = ~kept & ~now, kept | now
    for some in (others & ((p >= LIKELY) | (not now.any())), others & (p <= UNLIKELY) & now.any()):
        taken |= some & (p == p[some].max(initial=-1))
    return taken


def plain_loop(model, prompt, blocks, seed, options=OPTIONS, room=10**6):
    """The block loop as the specification tells it: one row, a fresh prefix for every single step."""
    tokens, out, key = list(prompt), [], mx.random.key(seed)
    total, length, vocab = options.max_denoising_steps, model.config.canvas_length, model.config.text.vocab_size
    for block in range(blocks):
        key, block_key = mx.random.split(key, 2)
        draws = mx.random.split(block_key, 2 * total + 1)
        canvas = mx.random.randint(0, vocab, (length,), key=draws[0])
        conditioning, bests, why, seen, kept = None, [], set(), ([], [], []), np.zeros(length, bool)
        for step in range(total):
            prefix = model.new_prefix()
            model.encode(mx.array([tokens]), prefix)
            logits = model.logits(model.denoise(canvas[None], prefix, conditioning))
            logits = logits / (options.t_min + (options.t_max - options.t_min) * (total - step) / total)
            conditioning = model.condition(logits)
            p = np.array(mx.softmax(logits[0], axis=-1), np.float64)
            entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
            bests.append(np.array(mx.argmax(logits[0], axis=-1)))
            uncertainty = entropy
            if options.fast:
                accepted = confident(p.max(-1), kept)
                taken = np.where(kept, np.array(canvas), bests[-1])
                kept, uncertainty = accepted, np.where(accepted, 0, entropy)
            else:
                accepted, before = np.zeros(length, bool), 0.0
                for j in np.argsort(entropy):
                    accepted[j] = before <= options.entropy_bound * (1 + options.entropy_rise * step)
                    before += entropy[j]
                if options.exact:
                    gumbel = mx.random.gumbel((length, vocab), key=draws[2 * step + 1])
                    taken = np.array(mx.argmax(logits[0] + gumbel, axis=-1))
                else:
                    taken = two_levels(logits[0], draws[2 * step + 1], tiling.TILES, tiling.STRIDE)
            fresh = np.array(mx.random.randint(0, vocab, (length,), key=draws[2 * step + 2]))
            canvas = mx.array(np.where(accepted, taken, fresh).astype(np.int32))
            counts = np.ones(length, bool)
            if not options.exact:
                ends = [j + 1 for j in range(length) if bests[-1][j] in options.end_tokens]
                counts[min([*ends, max(room - block * length, 1)]) :] = False
            for one, value in zip(seen, (accepted, entropy, counts)):
                one.append(value)

            def stood(steps, bests=bests, counts=counts):
                return len(bests) > steps and all((b == bests[-1])[counts].all() for b in bests[-1 - steps :])

            if stood(options.stability_threshold) and (
                uncertainty[counts].sum() / length < options.confidence_threshold
            ):
                why.add("settled")
            if options.patience and stood(options.patience):
                why.add("patience")
            if (uncertainty[counts] < options.certainty_threshold).all():
                why.add("certainty")
            if why:
                break
        out.append(Told(tuple(bests[-1].tolist()), len(bests), why, *seen))
        tokens += bests[-1].tolist()
    return out


class Telling(Reader):
    """A reader whose text is the tokens' numbers."""

    def __init__(self, blocks):
        super().__init__(blocks)
        self.told = 0

    @property
    def text(self):
        return spelled(self.tokens)

    def take(self):
        new = self.tokens[self.told :]
        self.told += len(new)
        return spelled(new), ""

    def preview(self, tokens):
        return spelled(tokens)


def spelled(tokens, **_):
    return "".join(f"{token} " for token in tokens)


def tiny_engine(folder=None):
    """An engine around a random model, window 5 and canvas 4, for requests of `tiny_request`; it has no tokenizer."""
    model = small_model(3, scale=0.2, max_position_embeddings=512)
    return Engine(SimpleNamespace(path=folder), model, SimpleNamespace(decode=spelled), OPTIONS)


def tiny_request(tokens, blocks=2, seed=0, **options):
    few = {"max_denoising_steps": 3, **options}
    return Request(PromptTokens(list(tokens), list(tokens)), seed, replace(OPTIONS, **few), Telling(blocks))
