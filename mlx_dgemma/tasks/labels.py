"""The labels of a choice: what counts as one, its tokens, and where a template has room for it."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..errors import OptionError

MOST_LABELS = 10_000
TRUTH = {True: ("true", "True", "yes", "Yes"), False: ("false", "False", "no", "No")}

Labels = Sequence[str] | range | type[bool]
Encode = Callable[[str], tuple[int, ...]]


class Question(NamedTuple):
    """What is asked: the keys of the result, and for each the texts that count as it."""

    name: str  # "" where there is one question
    keys: tuple[Any, ...]
    texts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LabelTokens:
    """A label's tokens as they may stand on a canvas, and where."""

    label: int
    tokens: tuple[int, ...]
    first: int | None  # index into `marks` of tokens that, right before it, would be part of its word
    last: int | None  # of tokens that, right behind it, would be
    longer: list[tuple[int, ...]] = field(default_factory=list)  # what would make it another label, from its end on
    canvas: int = 0  # with a template: on which canvas it is read
    start: int = 0  # where its slot begins there
    tail: tuple[tuple[int, int], ...] = ()  # (position, token) of the fixed text behind the slot


class TokenEdges(NamedTuple):
    """What reading needs of a tokenizer."""

    flags: np.ndarray  # [V, 4] float32: begins with a digit, with a letter; ends with a digit, with a letter
    special: frozenset[int]


@lru_cache(maxsize=4)
def token_edges(tokenizer: Any, size: int) -> TokenEdges:
    """Which of `size` tokens are parts of words, and which no text."""
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    marks = np.zeros((size, 4), np.float32)
    for token, text in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer.get_vocab())))))):
        if token not in special and text and not (text.startswith("<0x") and text.endswith(">")):  # no single byte
            for at, char in ((0, text[0]), (2, text[-1])):
                if (kind := _kind(char)) is not None:
                    marks[token, at + kind] = 1
    return TokenEdges(marks, frozenset(special))


def _kind(char: str) -> int | None:
    """0 for digits, 1 for letters. Scripts without capitals are often written without spaces: theirs count as none."""
    return 0 if char.isdigit() else 1 if char.lower() != char.upper() else None


def questions_of(labels: Labels | dict[str, Labels]) -> list[Question]:
    """The questions that `labels` ask.

    Raises:
        OptionError: no labels, too many, equal ones, or something that is none.
    """
    if not isinstance(labels, dict):
        return [_question("", labels)]
    if not labels:
        raise OptionError("labels is an empty dict; name at least one question.")
    for name in labels:
        if not isinstance(name, str) or not name.isidentifier():
            raise OptionError(f"A question is named {name!r}; use letters, digits and _, as in 'color'.")
    return [_question(name, one) for name, one in labels.items()]


def _question(name: str, labels: Any) -> Question:
    what = f"labels of {name}" if name else "labels"
    if labels is bool:
        return Question(name, tuple(TRUTH), tuple(TRUTH.values()))
    if not isinstance(labels, (list, tuple, range)):
        given = labels.__name__ if isinstance(labels, type) else repr(labels)
        raise OptionError(f"{what} is {given}; give a list of texts, a range, or bool.")
    if not labels:
        raise OptionError(f"{what} is {labels!r}, which is empty; give at least one label.")
    if len(labels) > MOST_LABELS:
        raise OptionError(f"{what} has {len(labels)} labels; give at most {MOST_LABELS}.")
    if isinstance(labels, range):
        return Question(name, tuple(labels), tuple((str(one),) for one in labels))
    for i, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise OptionError(f"Label {i} is {label!r}; it should be a text that is not empty.")
    texts = [label.strip() for label in labels]
    for label, count in Counter(texts).items():
        if count > 1:
            raise OptionError(f"The label {label!r} is given {count} times; give every label once.")
    return Question(name, tuple(labels), tuple((text,) for text in texts))


def free_text_labels(question: Question, encode: Encode, edges: TokenEdges, canvas: int) -> list[LabelTokens]:
    """A question's labels as they may stand in free text: as they are, and with a space before.

    Raises:
        OptionError: a label longer than the canvas, or one whose tokens are another's.
    """
    found = []
    for label, texts in enumerate(question.texts):
        for text in texts:
            last = _mark(text[-1], 0)
            found.append(LabelTokens(label, encode(text), _mark(text[0], 2), last))
            found.append(LabelTokens(label, encode(f" {text}"), None, last))
            if (count := len(found[-2].tokens)) > canvas:
                raise OptionError(f"The label {text!r} has {count} tokens, more than a canvas of {canvas}; shorten it.")
    return _linked(_distinct(found, question), edges)


def _mark(char: str, at: int) -> int | None:
    kind = _kind(char)
    return None if kind is None else at + kind


def _distinct(spellings: Sequence[LabelTokens], question: Question) -> dict[tuple[int, ...], LabelTokens]:
    """Every spelling once, by its tokens.

    Raises:
        OptionError: two labels that are the same tokens.
    """
    known: dict[tuple[int, ...], LabelTokens] = {}
    for one in spellings:
        other = known.setdefault(one.tokens, one)
        if other.label != one.label:
            first, second = (question.texts[label][0] for label in (other.label, one.label))
            raise OptionError(f"The labels {first!r} and {second!r} are the same tokens; leave one out.")
    return known


def _linked(known: dict[tuple[int, ...], LabelTokens], edges: TokenEdges) -> list[LabelTokens]:
    """Tell spellings which longer ones begin with them; those that begin with a longer one are part of that."""
    for tokens in known:
        for end in range(len(tokens) - 1, 0, -1):
            if shorter := known.get(tokens[:end]):
                if shorter.last is None or not edges.flags[tokens[end], shorter.last]:  # else it counts as one word
                    shorter.longer.append(tokens[end:])
                break
    return list(known.values())


def _parsed(answer: str, questions: Sequence[Question]) -> list[tuple[str, int | None]]:
    """(text, index of the question whose slot follows it) in order; the last has none."""
    if not isinstance(answer, str):
        raise OptionError(f"answer is {answer!r}; give a text with a slot such as 'It is {{}}.'.")
    try:
        parts = list(string.Formatter().parse(answer))
    except ValueError as error:
        raise OptionError(f"The answer template {answer!r} is malformed ({error}); write {{{{ for a brace.") from None
    names = [question.name for question in questions]
    found: list[tuple[str, int | None]] = []
    text = ""
    for literal, name, spec, conversion in parts:
        text += literal  # braces that stand for themselves come apart from the text around them
        if name is None:
            continue
        if spec or conversion or name not in names:
            slot = "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
            asked = ", ".join("{" + one + "}" for one in names)
            raise OptionError(f"The answer template {answer!r} has a slot {slot}; its slots should be {asked}.")
        found.append((text, names.index(name)))
        text = ""
    for i, name in enumerate(names):
        if (count := sum(index == i for _, index in found)) != 1:
            slot = "{" + name + "}"
            raise OptionError(f"The answer template {answer!r} has {count} slots {slot}; give it one.")
    return [*found, (text, None)]


def template_canvases(
    answer: str, questions: Sequence[Question], encode: Encode, edges: TokenEdges, canvas: int
) -> tuple[list[tuple[int | None, ...]], list[list[LabelTokens]]]:
    """The canvases that a template needs, and every question's spellings on them.

    The whole answer is tokenised with a label in its place, so that a space before it may be its own.

    Returns:
        Canvases as their first tokens, None in slots; for each question its spellings.

    Raises:
        OptionError: slots and questions do not agree, slots that touch, or an answer longer than the canvas.
    """
    parts = _parsed(answer, questions)
    order = [index for _, index in parts if index is not None]
    fixed = [text for text, _ in parts]
    usual = [_usual(question, encode) for question in questions]
    known: dict[tuple[int | None, ...], int] = {}
    found: list[list[LabelTokens]] = []
    for i, question in enumerate(questions):
        texts = [(label, text) for label, group in enumerate(question.texts) for text in group]
        filled = [[text if j == i else usual[j] for j in order] for _, text in texts]
        cuts = [_cut(fixed, labels, encode) for labels in filled]
        own = order.index(i)
        # The same borders for all labels, or one would be weighed by a token that is another's own.
        before = min(spans[own][0] for _, spans in cuts)
        behind = min(len(tokens) - spans[own][1] for tokens, spans in cuts)
        spellings = []
        for (label, text), (tokens, spans) in zip(texts, cuts):
            spans[own] = before, len(tokens) - behind
            if len(tokens) > canvas:
                raise OptionError(
                    f"The answer {answer!r} has {len(tokens)} tokens with {text!r}, more than a canvas of {canvas}; "
                    "shorten it."
                )
            if any(end > start for (_, end), (start, _) in pairwise(spans)):
                raise OptionError(f"The answer template {answer!r} has slots that touch; put a space between them.")
            pinned: list[int | None] = list(tokens)
            for start, end in spans:
                pinned[start:end] = [None] * (end - start)
            start, end = spans[own]
            tail = tuple((at, token) for at, token in enumerate(pinned) if at >= end and token is not None)
            row = known.setdefault(tuple(pinned), len(known))
            last = None if behind else _mark(text[-1], 0)
            spellings.append(LabelTokens(label, tokens[start:end], None, last, canvas=row, start=start, tail=tail))
        distinct = _distinct(spellings, question)
        found.append(list(distinct.values()) if behind else _linked(distinct, edges))
    return list(known), found


def _usual(question: Question, encode: Encode) -> str:
    """A label of the commonest length."""
    texts = [text for group in question.texts for text in group]
    lengths = [len(encode(f" {text}")) for text in texts]
    return texts[lengths.index(Counter(lengths).most_common(1)[0][0])]


def _cut(fixed: Sequence[str], labels: Sequence[str], encode: Encode) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Tokens of an answer, and the (start, end) of its slots: what the text before and behind does not account for."""
    pieces = [fixed[0]]
    for label, text in zip(labels, fixed[1:]):
        pieces += [label, text]
    tokens, spans = encode("".join(pieces)), []
    for at in range(1, len(pieces), 2):
        before, behind = encode("".join(pieces[:at])), encode("".join(pieces[at + 1 :]))
        spans.append((_shared(tokens, before), len(tokens) - _shared(tokens[::-1], behind[::-1])))
    return tokens, spans


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (one, other) in enumerate(zip(a, b)) if one != other), min(len(a), len(b)))
