"""Choices: how probable each label is as the model's answer, read in one denoising step.

A canvas of noise is denoised once, at temperature 1, and what its positions say of the labels' tokens is multiplied:
given the canvas, positions are independent. The prompt is encoded once, whatever is asked.

- Without a template the model answers in its own words, so a label may stand anywhere: `spoken` reads all positions,
  and the answer is where labels first are probable.
- With one, the canvas holds its text and noise in its slots. A label needs room for its own tokens, so there is
  a canvas for every width, and `filled` weighs a label by the fixed text behind its slot too: where a
  slot is too wide or too narrow the model does not expect that text. Of several questions each varies its own slot
  alone, with the others as wide as most of their labels are.

A label counts as whole words: what goes on with a further digit or letter, or as a longer label, is another answer.
B are canvases, C their length, V the vocabulary, S spellings of labels, N labels.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..decoding.session import PromptTokens, Session
from ..errors import OptionError
from ..model import device, head, rng
from ..model.diffusion_gemma import DiffusionGemma
from ..model.kv_cache import Prefix
from ..prompt.builder import PromptBuilder
from ..prompt.messages import Message, messages_of, reject_surrogates
from .labels import Labels, Question, Spelling, Vocabulary, layouts_of, questions_of, spellings_of, vocabulary

NEUTRAL = "N/A"  # asked instead of the prompt, to learn what the labels get without a question
FIRST = 0.1  # share of the labels' largest probability from which on a position has the answer
RARE = 0.05  # probability of all labels below which the model answers something else; bench/choose.py measures it
ROWS = 8  # canvases denoised together, each with a copy of the prefix
OPTIONS = ("image_tokens", "fps", "max_frames", "prefill_chunk")  # of `GenerationOptions`, those that reading has


@dataclass(frozen=True)
class Choice:
    """Probabilities by label, or by question and label, and what reading them took."""

    probabilities: dict[Any, Any]
    named: dict[str, float]  # by question ("" for one): the probability of all labels together, at its largest
    prompt_tokens: int
    canvases: int  # denoised, those for the prior included
    images: int  # pictures and video frames in the prompt
    seconds: float
    peak_memory_bytes: int
    seed: int


class Reading(NamedTuple):
    """What canvases say, with positions behind the canvas that are impossible and belong to no word."""

    log_p: np.ndarray  # [B, C + longest, T + 1] of the tokens asked for; the last column is 0, for no token
    marks: np.ndarray  # [B, C + longest, 4] probability of tokens that begin or end with a digit or a letter
    column: dict[int, int]  # of each token


def denoised(
    model: DiffusionGemma, prefix: Prefix, canvases: np.ndarray, wanted: Sequence[int], marks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`read` canvases [B, C] after one step behind a prefix of one row, `ROWS` at a time."""
    found = []
    for start in range(0, len(canvases), ROWS):
        group = canvases[start : start + ROWS]
        if prefix.batch_size != len(group):
            prefix.select_rows([0] * len(group))
        hidden = model.denoise(mx.array(group.astype(np.int32)), prefix)
        queue = device.Queue()
        queue.add(*prefix.stages, hidden)
        queue.finish()
        found.append(read(model, hidden, wanted, marks))
    log_p, mass = zip(*found)
    return np.concatenate(log_p), np.concatenate(mass)


def read(
    model: DiffusionGemma, hidden: mx.array, wanted: Sequence[int], marks: np.ndarray, nbytes: int = head.CHUNK_BYTES
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of some tokens and the probability of some sets, in one pass over the vocabulary.

    Args:
        hidden: [B, C, H] from `denoise`.
        wanted: T ascending token ids.
        marks: [V, M], 1 where a token is in a set.
        nbytes: of float32 logits at once.

    Returns:
        [B, C, T] and [B, C, M], float64.
    """
    shape, one = hidden.shape[:2], mx.array(1.0)  # the temperature: what is asked is the model's, not the sampler's
    sets, ids = [None, *mx.array(marks.T)], np.asarray(wanted)
    level = np.full((*shape, 1), -np.inf)
    total = np.zeros((*shape, len(sets)))  # sums of exp(logit - level): of all tokens, and of each set
    picked = []
    for start, end in head.vocab_chunks(model.config.text.vocab_size, shape[0] * shape[1], nbytes):
        z = model.head.logits_slice(hidden, one, start, end)
        top = z.max(axis=-1, keepdims=True)
        mass = mx.exp(z - top)
        sums = [_blocks(mass if members is None else mass * members[start:end]) for members in sets]
        here = ids[(ids >= start) & (ids < end)] - start
        picked.append(np.asarray(z[..., mx.array(here.astype(np.int32))]).astype(np.float64))
        higher = np.maximum(level, np.asarray(top).astype(np.float64))
        found = np.stack([np.asarray(part).astype(np.float64).sum(axis=-1) for part in sums], axis=-1)
        total = total * np.exp(level - higher) + found * np.exp(np.asarray(top) - higher)
        level = higher
    return np.concatenate(picked, axis=-1) - level - np.log(total[..., :1]), total[..., 1:] / total[..., :1]


def _blocks(x: mx.array) -> mx.array:
    """Sums of 16 neighbours: thousands of small numbers would vanish one by one in a float32 that holds a large one."""
    x = mx.pad(x, [(0, 0), (0, 0), (0, -x.shape[-1] % 16)])
    return x.reshape(*x.shape[:2], -1, 16).sum(axis=-1)


def reading_of(log_p: np.ndarray, marks: np.ndarray, wanted: Sequence[int], longest: int) -> Reading:
    """What was read, with `longest` positions behind the canvas."""
    more = ((0, 0), (0, longest))
    padded = np.pad(log_p, (*more, (0, 1)), constant_values=-np.inf)
    padded[..., -1] = 0
    column = {token: i for i, token in enumerate(wanted)}
    return Reading(padded, np.pad(marks, (*more, (0, 0))), column)


def spoken(reading: Reading, spellings: Sequence[Spelling], labels: int, canvas: int) -> np.ndarray:
    """[C, N] log-probability that a label stands at each position of canvas 0, in full."""
    scores = np.full((canvas, labels), -np.inf)
    positions = np.arange(canvas)
    for one in spellings:
        score = _said(reading, 0, positions, one.tokens)
        score = score + _ended(reading, 0, positions + len(one.tokens), one)
        if one.first is not None:
            score[1:] += _log(1 - reading.marks[0, : canvas - 1, one.first])
        scores[:, one.label] = np.logaddexp(scores[:, one.label], score)
    return scores


def filled(reading: Reading, spellings: Sequence[Spelling], labels: int) -> tuple[np.ndarray, float]:
    """[N] log-weights of labels in their slots, and that of all labels on the canvas that fits best."""
    scores = np.full(labels, -np.inf)
    masses: dict[int, float] = defaultdict(float)
    for one in spellings:
        at = np.array([one.start])
        score = _said(reading, one.canvas, at, one.tokens)[0]
        score += _ended(reading, one.canvas, at + len(one.tokens), one)[0]
        masses[one.canvas] += float(np.exp(score))
        for position, token in one.tail:
            score += _said(reading, one.canvas, np.array([position]), (token,))[0]
        scores[one.label] = np.logaddexp(scores[one.label], score)
    return scores, max(masses.values())


def _said(reading: Reading, canvas: int, positions: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """[P] log-probability of tokens from each position on; behind the canvas there are none."""
    log_p, total = reading.log_p[canvas], np.zeros(len(positions))
    for i, token in enumerate(tokens):
        total = total + log_p[np.minimum(positions + i, len(log_p) - 1), reading.column[token]]
    return total


def _ended(reading: Reading, canvas: int, ends: np.ndarray, one: Spelling) -> np.ndarray:
    """[P] log-probability that a label is over at each position: no further digit or letter, no longer label."""
    on = np.zeros(len(ends))
    if one.last is not None:
        on += reading.marks[canvas, ends, one.last]
    for tokens in one.longer:
        on += np.exp(_said(reading, canvas, ends, tokens))
    return _log(1 - on)


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, 1e-12))  # rounding may leave less than nothing


def place(scores: np.ndarray) -> tuple[int, float]:
    """Where [C, N] scores have the answer, and the largest probability that the labels have together anywhere.

    The first position at which the labels together are at least `FIRST` as probable as anywhere: an answer may name
    others later, as "51 is larger than 23" does.
    """
    mass = np.logaddexp.reduce(scores, axis=-1)
    at = int(np.argmax(mass >= mass.max() + np.log(FIRST)))
    return at, float(np.exp(mass.max()))


def normalised(scores: np.ndarray) -> list[float]:
    """[N] log-weights as probabilities."""
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()).tolist()


@dataclass(frozen=True)
class _Plan:
    """What to denoise and what to read there."""

    questions: list[Question]
    spellings: list[list[Spelling]]  # of each question
    pinned: list[tuple[int | None, ...]]  # each canvas's first tokens
    free: bool  # without a template
    canvas: int
    words: Vocabulary

    def canvases(self, noise: np.ndarray) -> np.ndarray:
        """[B, C]: the same noise, with what is pinned."""
        rows = np.repeat(noise[None], len(self.pinned), axis=0)
        for row, tokens in zip(rows, self.pinned):
            at = [i for i, token in enumerate(tokens) if token is not None]
            row[at] = [tokens[i] for i in at]
        return rows

    def scores(self, model: DiffusionGemma, prefix: Prefix, noise: np.ndarray) -> list[tuple[np.ndarray, float | None]]:
        """For each question [C, N] scores without a template, else [N] and the probability of all labels."""
        spellings = [one for group in self.spellings for one in group]
        said = [(*one.tokens, *(token for rest in one.longer for token in rest)) for one in spellings]
        tails = {token for one in spellings for _, token in one.tail}
        wanted = sorted(tails.union(*said))
        log_p, marks = denoised(model, prefix, self.canvases(noise), wanted, self.words.marks)
        reading = reading_of(log_p, marks, wanted, max(map(len, said)))
        if self.free:
            return [(spoken(reading, self.spellings[0], len(self.questions[0].keys), self.canvas), None)]
        return [filled(reading, group, len(one.keys)) for group, one in zip(self.spellings, self.questions)]


def _plan(builder: PromptBuilder, questions: list[Question], answer: str | None) -> _Plan:
    if answer is None and len(questions) > 1:
        names = " ".join("{" + question.name + "}" for question in questions)
        raise OptionError(f"There are {len(questions)} questions and no answer template; give one such as {names!r}.")
    words = vocabulary(builder.tokenizer, builder.config.text.vocab_size)

    @cache
    def encode(text: str) -> tuple[int, ...]:
        reject_surrogates("The text", text)
        return tuple(builder.tokenizer.encode(text, add_special_tokens=False))

    texts = [("label", text) for question in questions for group in question.texts for text in group]
    for what, text in [*texts, *([("answer template", answer)] if isinstance(answer, str) else [])]:
        if special := words.special.intersection(encode(text)):
            token = builder.tokenizer.convert_ids_to_tokens(min(special))
            raise OptionError(f"The {what} {text!r} holds the special token {token}; leave it out.")
    length = builder.config.canvas_length
    pinned: list[tuple[int | None, ...]] = [()]
    if answer is None:
        spellings = [spellings_of(questions[0], encode, words, length)]
    else:
        pinned, spellings = layouts_of(answer, questions, encode, words, length)
    return _Plan(questions, spellings, pinned, answer is None, length, words)


def encoded(model: DiffusionGemma, prompt: PromptTokens, chunk: int | None = None) -> Prefix:
    """A prefix that holds a prompt and has room for a canvas."""
    return Session(model, len(prompt.tokens) + model.config.canvas_length).encode_all(prompt, chunk)


def choose(
    model: DiffusionGemma,
    builder: PromptBuilder,
    prompt: str | Sequence[Message],
    labels: Labels | dict[str, Labels],
    *,
    answer: str | None = None,
    images: Sequence[Any] = (),
    video: Any = None,
    system: str | None = None,
    seed: int = 0,
    calibrate: bool = False,
    **options: Any,
) -> Choice:
    """As `Engine.choose`, with what it took."""
    for name in options:
        if name not in OPTIONS:
            raise OptionError(f"{name} is not an option of choose; the options are {', '.join(OPTIONS)}.")
    effective = builder.options.override(**options)
    plan = _plan(builder, questions_of(labels), answer)
    asked = messages_of(prompt, system, images, video)
    neutral = [*(one for one in asked if one["role"] in ("system", "developer")), {"role": "user", "content": NEUTRAL}]
    requests = [builder.request(one, seed, effective) for one in ([asked, neutral] if calibrate else [asked])]
    prompts, chunk = [request.prompt for request in requests], effective.prefill_chunk
    key = mx.random.key(requests[0].seed)[None]
    noise = np.asarray(rng.noise(plan.canvas, builder.config.text.vocab_size, key))[0]
    mx.reset_peak_memory()
    started = time.perf_counter()
    with device.wired_limit():
        read_of = [plan.scores(model, encoded(model, prompt, chunk), noise) for prompt in prompts]
    found, named = {}, {}
    for question, *said in zip(plan.questions, *read_of):
        scores, mass = [one for one, _ in said], said[0][1]
        if mass is None:
            at, mass = place(scores[0])
            scores = [one[at] for one in scores]
        named[question.name] = mass
        if mass < RARE:
            name = f" of {question.name}" if question.name else ""
            mend = "give other labels" if answer is not None else "give an answer template or other labels"
            warnings.warn(f"The model answers with none of the labels{name} ({mass:.1%}); {mend}.", stacklevel=3)
        weights = scores[0] - scores[1] if calibrate else scores[0]
        found[question.name] = dict(zip(question.keys, normalised(weights)))
    return Choice(
        found if isinstance(labels, dict) else found[""],
        named,
        prompt_tokens=len(prompts[0].tokens),
        canvases=len(plan.pinned) * len(prompts),
        images=len(prompts[0].pictures),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=mx.get_peak_memory(),
        seed=requests[0].seed,
    )
