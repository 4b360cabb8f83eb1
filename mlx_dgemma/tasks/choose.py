"""Choices: how probable each label is as the model's answer, read in one denoising step.

A canvas of noise is denoised once, at temperature 1. Given the canvas, positions are independent, so the probability of
a label is the product of its tokens' probabilities. The prompt is encoded once for all canvases.

- Without an answer template a label may stand anywhere. `free_text_scores` reads every position, and the answer is at
  the first position where labels are probable (`answer_position`).
- With a template the canvas holds its text, and noise in its slots. Labels of different lengths need slots of different
  widths, so there is a canvas for every width. `template_scores` also weighs the fixed text behind the slot, which the
  model does not expect where a slot is too wide or too narrow. If there are several questions, each varies its own
  slot, and the other slots are as wide as most of their labels are.

A label counts as whole words. If it goes on with a digit or a letter, or as a longer label, it is another answer.

In shapes B is the number of canvases, C their length, V the vocabulary's size, N the number of labels.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypedDict, TypeVar

import mlx.core as mx
import numpy as np

from ..decoding.control import rows_of
from ..decoding.request import Request
from ..decoding.session import PromptTokens, Session
from ..errors import OptionError
from ..model import device, head, rng, tiling
from ..model.config import ModelConfig
from ..model.diffusion_gemma import DiffusionGemma
from ..model.functions import finite
from ..model.kv_cache import Prefix
from ..prompt.audio.transcripts import with_transcripts
from ..prompt.builder import PromptBuilder
from ..prompt.messages import Message, messages_of, reject_surrogates
from .labels import (
    FixedTokens,
    Labels,
    LabelTokens,
    Question,
    TokenEdges,
    check_text,
    free_text_labels,
    questions_of,
    template_canvases,
    token_edges,
)

NEUTRAL_PROMPT = "N/A"  # asked instead of the prompt, to learn how probable the labels are without a question
ANSWER_SHARE = 0.1  # the answer is where labels first are this probable, as a share of the most probable position
MIN_LABEL_MASS = 0.05  # if all labels together are less probable, the model answers something else (bench/choose.py)
MAX_ROWS = 8  # canvases denoised together, each with a copy of the prefix
OPTIONS = ("image_tokens", "fps", "max_frames", "prefill_chunk")  # those of `GenerationOptions` that a choice has


@dataclass(frozen=True)
class Choice:
    """Probabilities by label, or by question and label, and the costs of reading them."""

    probabilities: dict[Any, Any]
    named: dict[str, float]  # by question ("" for one): the largest probability that its labels have together
    prompt_tokens: int
    canvases: int  # that were denoised, including those of `calibrate`
    images: int  # pictures and video frames in the prompt
    seconds: float
    peak_memory_bytes: int
    seed: int


class CanvasProbabilities(NamedTuple):
    """What denoised canvases say, padded behind the canvas so that a label may be looked up near its end.

    In the padding every token is impossible, and no token begins or ends with a digit or a letter.
    """

    log_p: np.ndarray  # [B, C + padding, T + 1] of T tokens; the last column is 0 and stands for no token
    edge_p: np.ndarray  # [B, C + padding, 4] probability of the tokens that have each of `TokenEdges.flags`
    column: dict[int, int]  # of each token in `log_p`


T = TypeVar("T")
Passes = Generator[int, None, T]  # yields the number of positions that each pass denoised, and returns what they said
Said = tuple[np.ndarray, float | None]  # of a question: its scores, and the mass of its labels in a template


def result_of(passes: Passes[T]) -> T:
    """What passes return, made one after the other."""
    while True:
        try:
            next(passes)
        except StopIteration as end:
            return end.value


def denoise_and_read(
    model: DiffusionGemma, prefix: Prefix, canvases: np.ndarray, tokens: Sequence[int], sets: np.ndarray
) -> Passes[tuple[np.ndarray, np.ndarray]]:
    """Denoise canvases [B, C] once and read them with `read_probabilities`, MAX_ROWS in a pass.

    Args:
        prefix: of one row; it is as it was between two passes.

    Raises:
        RangeError: the states of a canvas hold inf or NaN.
    """
    found = []
    for start in range(0, len(canvases), MAX_ROWS):
        group = canvases[start : start + MAX_ROWS]
        rows = rows_of(prefix, len(group))
        hidden = model.denoise(mx.array(group.astype(np.int32)), rows)
        queue = device.Queue()
        queue.add(*rows.stages, hidden)
        queue.finish()
        if not finite(hidden).all():
            raise model.range_error()
        found.append(read_probabilities(model, hidden, tokens, sets))
        yield group.size
    log_p, mass = zip(*found)
    return np.concatenate(log_p), np.concatenate(mass)


def read_probabilities(
    model: DiffusionGemma, hidden: mx.array, tokens: Sequence[int], sets: np.ndarray, nbytes: int = head.CHUNK_BYTES
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of some tokens and the probabilities of some sets, in one pass over the vocabulary.

    Args:
        hidden: [B, C, H] from `model.denoise`.
        tokens: T ids in ascending order.
        sets: [V, M] float32, 1 where a token is in a set.
        nbytes: of float32 logits at once.

    Returns:
        log_p: [B, C, T] float64.
        mass: [B, C, M] float64.
    """
    shape, temperature = hidden.shape[:2], mx.array(1.0)
    members_of = [None, *mx.array(sets.T)]  # None: all tokens
    ids = np.asarray(tokens)
    level = np.full((*shape, 1), -np.inf)  # the largest logit so far
    total = np.zeros((*shape, len(members_of)))  # sums of exp(logit - level)
    logits = []
    for start, end in tiling.vocab_chunks(model.config.text.vocab_size, shape[0] * shape[1], nbytes):
        z = model.head.logits_slice(hidden, temperature, start, end)
        top = z.max(axis=-1, keepdims=True)
        p = mx.exp(z - top)
        sums = [_block_sums(p if members is None else p * members[start:end]) for members in members_of]
        here = ids[(ids >= start) & (ids < end)] - start
        logits.append(np.asarray(z[..., mx.array(here.astype(np.int32))]).astype(np.float64))
        higher = np.maximum(level, np.asarray(top).astype(np.float64))
        found = np.stack([np.asarray(part).astype(np.float64).sum(axis=-1) for part in sums], axis=-1)
        total = total * np.exp(level - higher) + found * np.exp(np.asarray(top) - higher)
        level = higher
    log_p = np.concatenate(logits, axis=-1) - level - np.log(total[..., :1])
    return log_p, total[..., 1:] / total[..., :1]


def _block_sums(x: mx.array) -> mx.array:
    """[B, C, n] -> [B, C, n / 16] sums of neighbours; the rest is summed in float64.

    A single float32 sum would lose thousands of small numbers beside a large one.
    """
    x = mx.pad(x, [(0, 0), (0, 0), (0, -x.shape[-1] % 16)])
    return x.reshape(*x.shape[:2], -1, 16).sum(axis=-1)


def pad_canvases(log_p: np.ndarray, edge_p: np.ndarray, tokens: Sequence[int], padding: int) -> CanvasProbabilities:
    """What `denoise_and_read` found, with `padding` positions behind each canvas."""
    behind = ((0, 0), (0, padding))
    log_p = np.pad(log_p, (*behind, (0, 1)), constant_values=-np.inf)
    log_p[..., -1] = 0
    return CanvasProbabilities(log_p, np.pad(edge_p, (*behind, (0, 0))), {token: i for i, token in enumerate(tokens)})


def free_text_scores(
    canvases: CanvasProbabilities, labels: Sequence[LabelTokens], label_count: int, canvas_length: int
) -> np.ndarray:
    """[C, N] log-probability that a label begins at each position of canvas 0, as whole words."""
    scores = np.full((canvas_length, label_count), -np.inf)
    positions = np.arange(canvas_length)
    for one in labels:
        score = _log_p_of(canvases, 0, positions, one.tokens)
        score = score + _log_p_of_end(canvases, 0, positions + len(one.tokens), one)
        if one.joins_before is not None:
            score[1:] += _log(1 - canvases.edge_p[0, : canvas_length - 1, one.joins_before])
        scores[:, one.label] = np.logaddexp(scores[:, one.label], score)
    return scores


def template_scores(
    canvases: CanvasProbabilities, labels: Sequence[LabelTokens], label_count: int
) -> tuple[np.ndarray, float]:
    """Scores of the labels of one question in its slots.

    Returns:
        scores: [N] log-weights, each of a label and of the fixed text behind its slot.
        mass: the probability that all labels have together, on the canvas where it is largest.
    """
    scores = np.full(label_count, -np.inf)
    masses: dict[int, float] = defaultdict(float)
    for one in labels:
        start = np.array([one.start])
        score = _log_p_of(canvases, one.canvas, start, one.tokens)[0]
        score += _log_p_of_end(canvases, one.canvas, start + len(one.tokens), one)[0]
        masses[one.canvas] += float(np.exp(score))
        for position, token in one.tail:
            score += _log_p_of(canvases, one.canvas, np.array([position]), (token,))[0]
        scores[one.label] = np.logaddexp(scores[one.label], score)
    return scores, max(masses.values())


def _log_p_of(canvases: CanvasProbabilities, canvas: int, positions: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """[P] log-probability that these tokens stand from each position on."""
    log_p, total = canvases.log_p[canvas], np.zeros(len(positions))
    for i, token in enumerate(tokens):
        total = total + log_p[np.minimum(positions + i, len(log_p) - 1), canvases.column[token]]
    return total


def _log_p_of_end(canvases: CanvasProbabilities, canvas: int, ends: np.ndarray, label: LabelTokens) -> np.ndarray:
    """[P] log-probability that a label is over at each position: neither its word nor a longer label goes on."""
    goes_on = np.zeros(len(ends))
    if label.joins_behind is not None:
        goes_on += canvases.edge_p[canvas, ends, label.joins_behind]
    for tokens in label.longer:
        goes_on += np.exp(_log_p_of(canvases, canvas, ends, tokens))
    return _log(1 - goes_on)


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, 1e-12))  # rounding may leave a difference below 0


def answer_position(scores: np.ndarray) -> tuple[int, float]:
    """Where scores [C, N] have the answer, and the largest probability of all labels together at any position.

    It is the first position at which the labels together are at least ANSWER_SHARE as probable as anywhere. An answer
    may name other labels later, as "51 is larger than 23" does.
    """
    mass = np.logaddexp.reduce(scores, axis=-1)
    at = int(np.argmax(mass >= mass.max() + np.log(ANSWER_SHARE)))
    return at, float(np.exp(mass.max()))


def softmax(scores: np.ndarray) -> list[float]:
    """Log-weights [N] as probabilities."""
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()).tolist()


@dataclass(frozen=True)
class Plan:
    """The canvases to denoise, and the tokens to read there."""

    questions: list[Question]
    labels: list[list[LabelTokens]]  # of each question
    fixed: list[FixedTokens]
    free_text: bool  # whether there is no template
    canvas_length: int
    edges: TokenEdges

    def canvases(self, noise: np.ndarray) -> np.ndarray:
        """[B, C]: the same noise [C] on every canvas, and the fixed tokens."""
        rows = np.repeat(noise[None], len(self.fixed), axis=0)
        for row, tokens in zip(rows, self.fixed):
            at = [i for i, token in enumerate(tokens) if token is not None]
            row[at] = [tokens[i] for i in at]
        return rows

    def scores(self, model: DiffusionGemma, prefix: Prefix, key: mx.array) -> Passes[list[Said]]:
        """For each question what `template_scores` returns or, without a template, [C, N] scores and None.

        Args:
            prefix: of one row, the encoded prompt.
            key: [2], of the canvases' noise.
        """
        noise = np.asarray(rng.noise(self.canvas_length, model.config.text.vocab_size, key[None]))[0]
        labels = [one for group in self.labels for one in group]
        label_tokens = [(*one.tokens, *(token for rest in one.longer for token in rest)) for one in labels]
        tail_tokens = {token for one in labels for _, token in one.tail}
        tokens = sorted(tail_tokens.union(*label_tokens))
        log_p, edge_p = yield from denoise_and_read(model, prefix, self.canvases(noise), tokens, self.edges.flags)
        canvases = pad_canvases(log_p, edge_p, tokens, max(map(len, label_tokens)))
        counts = [len(question.keys) for question in self.questions]
        if self.free_text:
            return [(free_text_scores(canvases, self.labels[0], counts[0], self.canvas_length), None)]
        return [template_scores(canvases, group, count) for group, count in zip(self.labels, counts)]


def read_answers(said: Said, neutral: Said | None = None) -> tuple[list[float], float]:
    """The probabilities of a question's labels, and that of all together, at most where any answer is.

    Args:
        said: of the question asked, and of `NEUTRAL_PROMPT` if the probabilities are divided by what it gives.
    """
    (scores, mass), other = said, None if neutral is None else neutral[0]
    if mass is None:
        at, mass = answer_position(scores)
        scores, other = scores[at], None if other is None else other[at]
    return softmax(scores if other is None else scores - other), mass


def plan_of(tokenizer: Any, config: ModelConfig, questions: list[Question], answer: str | None) -> Plan:
    """What has to be denoised and read for some questions.

    Raises:
        OptionError: labels or the answer template are wrong.
    """
    if answer is None and len(questions) > 1:
        names = " ".join("{" + question.name + "}" for question in questions)
        raise OptionError(f"There are {len(questions)} questions and no answer template; give one such as {names!r}.")
    edges = token_edges(tokenizer, config.text.vocab_size)

    @cache
    def encode(text: str) -> tuple[int, ...]:
        reject_surrogates("The text", text)
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    texts = [("label", text) for question in questions for group in question.texts for text in group]
    for what, text in [*texts, *([("answer template", answer)] if isinstance(answer, str) else [])]:
        check_text(what, text, tokenizer, encode, edges, config.canvas_length)
    length = config.canvas_length
    fixed: list[FixedTokens] = [()]
    if answer is None:
        labels = [free_text_labels(questions[0], encode, edges, length)]
    else:
        fixed, labels = template_canvases(answer, questions, encode, edges, length)
    return Plan(questions, labels, fixed, answer is None, length, edges)


class ChooseKeywords(TypedDict, total=False):
    """Keyword arguments of `choose`."""

    answer: str | None
    images: Sequence[Any]
    video: Any
    system: str | None
    seed: int
    calibrate: bool
    image_tokens: int | None
    fps: float | None
    max_frames: int | None
    prefill_chunk: int | None


def neutral_of(messages: Sequence[Message]) -> list[Message]:
    """The conversation in which nothing is asked."""
    system = [one for one in messages if one["role"] in ("system", "developer")]
    return [*system, {"role": "user", "content": NEUTRAL_PROMPT}]


def encoded(model: DiffusionGemma, prompt: PromptTokens, chunk: int | None = None) -> Prefix:
    """A prefix that holds a prompt and has room for a canvas."""
    return Session(model, len(prompt.tokens) + model.config.canvas_length).encode_all(prompt, chunk)


@dataclass(frozen=True)
class Asked:
    """A choice that was checked; nothing is computed yet."""

    plan: Plan
    requests: list[Request]  # the prompt's, and with `calibrate` that of the conversation in which nothing is asked
    named: bool  # whether the questions have names
    templated: bool  # whether there is an answer template
    chunk: int | None  # prompt tokens encoded at once


def ask(
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
) -> Asked:
    """Check what `Engine.choose` is asked, whose arguments it takes, and make the requests of it.

    Raises:
        PromptError, OptionError: as `Engine.choose`.
    """
    for name in options:
        if name not in OPTIONS:
            raise OptionError(f"{name} is not an option of choose; the options are {', '.join(OPTIONS)}.")
    effective = builder.options.override(**options)
    plan = plan_of(builder.tokenizer, builder.config, questions_of(labels), answer)
    asked = messages_of(with_transcripts(prompt), system, images, video)
    requests = [builder.request(one, seed, effective) for one in ([asked, neutral_of(asked)] if calibrate else [asked])]
    return Asked(plan, requests, isinstance(labels, dict), answer is not None, effective.prefill_chunk)


def choose(
    model: DiffusionGemma,
    builder: PromptBuilder,
    prompt: str | Sequence[Message],
    labels: Labels | dict[str, Labels],
    **keywords: Any,
) -> Choice:
    """What `Engine.choose` returns, and the costs of it."""
    return compute(model, ask(builder, prompt, labels, **keywords))


def compute(model: DiffusionGemma, asked: Asked) -> Choice:
    """Compute what was asked."""
    plan, prompts = asked.plan, [request.prompt for request in asked.requests]
    seed = asked.requests[0].seed
    key = mx.random.key(seed)
    mx.reset_peak_memory()
    started = time.perf_counter()
    with device.wired_limit(model.low_memory):
        read_of = [result_of(plan.scores(model, encoded(model, one, asked.chunk), key)) for one in prompts]
    found, named = read_questions(plan.questions, read_of, asked.templated)
    return Choice(
        found if asked.named else found[""],
        named,
        prompt_tokens=len(prompts[0].tokens),
        canvases=len(plan.fixed) * len(prompts),
        images=len(prompts[0].pictures),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=mx.get_peak_memory(),
        seed=seed,
    )


def read_questions(
    questions: Sequence[Question], read_of: Sequence[Sequence[Said]], template: bool
) -> tuple[dict[str, dict[Any, float]], dict[str, float]]:
    """The probabilities of each question's labels, and that of all together; a warning where it is small."""
    found, named = {}, {}
    for question, *said in zip(questions, *read_of):
        probabilities, mass = read_answers(*said)
        named[question.name] = mass
        if mass < MIN_LABEL_MASS:
            name = f" of {question.name}" if question.name else ""
            mend = "give other labels" if template else "give an answer template or other labels"
            warnings.warn(f"The model answers with none of the labels{name} ({mass:.1%}); {mend}.", stacklevel=5)
        found[question.name] = dict(zip(question.keys, probabilities))
    return found, named
