"""The labels of a choice: which texts count as a label, their tokens, and their place in an answer template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from ..constraints.tokens import MAX_TOKEN_BYTES
from ..errors import OptionError, shown
from .templates import split_template

MAX_LABELS = 10_000
BOOL_TEXTS = {True: ("true", "True", "yes", "Yes"), False: ("false", "False", "no", "No")}

Labels = Sequence[str] | range | type[bool]
Encode = Callable[[str], tuple[int, ...]]
FixedTokens = tuple[int | None, ...]  # what a canvas begins with; None in a slot


class Question(NamedTuple):
    """The keys of a result, and for each key the texts that count as it."""

    name: str  # "" if there is only one question, which has no name
    keys: tuple[Any, ...]
    texts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LabelTokens:
    """One way to write a label as tokens. Without a template it may stand at any position of canvas 0.

    A label counts as a whole word only. `joins_before` and `joins_behind` are columns of `TokenEdges.flags`: of the
    tokens that would be part of the label's word if they stood right before it or right behind it.
    """

    label: int  # index into `Question.keys`
    tokens: tuple[int, ...]
    joins_before: int | None  # None: any token may stand there
    joins_behind: int | None
    longer: list[tuple[int, ...]] = field(default_factory=list)  # continuations that make it another label
    # In a template:
    canvas: int = 0  # index of its canvas
    start: int = 0  # position at which its slot begins
    tail: tuple[tuple[int, int], ...] = ()  # (position, token) of the fixed text behind the slot


class TokenEdges(NamedTuple):
    """The characters at both ends of every token."""

    flags: np.ndarray  # [V, 4] float32, 0 or 1: begins with a digit, with a letter, ends with a digit, with a letter
    special: frozenset[int]  # tokens that are not text


_BEGINS, _ENDS = 0, 2  # first columns of `flags`; a letter's is the next one
_KNOWN_EDGES: WeakKeyDictionary[Any, TokenEdges] = WeakKeyDictionary()  # by tokenizer


def token_edges(tokenizer: Any, vocab_size: int) -> TokenEdges:
    """The edges of the first `vocab_size` tokens, computed once for a tokenizer."""
    known = _KNOWN_EDGES.get(tokenizer)
    if known is None or len(known.flags) != vocab_size:
        known = _KNOWN_EDGES[tokenizer] = _read_edges(tokenizer, vocab_size)
    return known


def _read_edges(tokenizer: Any, vocab_size: int) -> TokenEdges:
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    flags = np.zeros((vocab_size, 4), np.float32)
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer.get_vocab())))))
    for token, piece in enumerate(pieces):
        is_byte = piece and piece.startswith("<0x") and piece.endswith(">")
        if token in special or not piece or is_byte:
            continue
        for edge, character in ((_BEGINS, piece[0]), (_ENDS, piece[-1])):
            if (column := _column(edge, character)) is not None:
                flags[token, column] = 1
    return TokenEdges(flags, frozenset(special))


def _column(edge: int, character: str) -> int | None:
    """The column of `flags` of tokens with such a character, a digit or a letter, at an edge.

    Letters without capitals have none: many of their scripts are written without spaces between words.
    """
    if character.isdigit():
        return edge
    return edge + 1 if character.lower() != character.upper() else None


def questions_of(labels: Labels | dict[str, Labels]) -> list[Question]:
    """The questions that `labels` ask.

    Raises:
        OptionError: there are no labels, too many, equal ones, or something that is not a label.
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
        return Question(name, tuple(BOOL_TEXTS), tuple(BOOL_TEXTS.values()))
    if not isinstance(labels, (list, tuple, range)):
        given = labels.__name__ if isinstance(labels, type) else repr(labels)
        raise OptionError(f"{what} is {given}; give a list of texts, a range, or bool.")
    if not labels:
        raise OptionError(f"{what} is {labels!r}, which is empty; give at least one label.")
    if len(labels) > MAX_LABELS:
        raise OptionError(f"{what} has {len(labels)} labels; give at most {MAX_LABELS}.")
    if isinstance(labels, range):
        return Question(name, tuple(labels), tuple((str(number),) for number in labels))
    for i, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise OptionError(f"Label {i} is {label!r}; it should be a text that is not empty.")
    texts = [label.strip() for label in labels]
    for label, count in Counter(texts).items():
        if count > 1:
            raise OptionError(f"The label {label!r} is given {count} times; give every label once.")
    return Question(name, tuple(labels), tuple((text,) for text in texts))


def check_text(what: str, text: str, tokenizer: Any, encode: Encode, edges: TokenEdges, canvas_length: int) -> None:
    """Refuse a text that no canvas takes, before it is cut into tokens, and one with special tokens: `OptionError`."""
    if len(text) > (most := canvas_length * MAX_TOKEN_BYTES):
        raise OptionError(
            f"The {what} {shown(text)} has {len(text)} characters, more than a canvas takes; give at most {most}."
        )
    if special := edges.special.intersection(encode(text)):
        token = tokenizer.convert_ids_to_tokens(min(special))
        raise OptionError(f"The {what} {text!r} holds the special token {token}; leave it out.")


def free_text_labels(question: Question, encode: Encode, edges: TokenEdges, canvas_length: int) -> list[LabelTokens]:
    """A question's labels in free text: each as it is, and with a space before it.

    Raises:
        OptionError: a label is longer than the canvas, or has the same tokens as another.
    """
    found = []
    for label, texts in enumerate(question.texts):
        for text in texts:
            joins_before, joins_behind = _column(_ENDS, text[0]), _column(_BEGINS, text[-1])
            bare = LabelTokens(label, encode(text), joins_before, joins_behind)
            if len(bare.tokens) > canvas_length:
                raise OptionError(
                    f"The label {text!r} has {len(bare.tokens)} tokens, more than a canvas of {canvas_length}; "
                    "shorten it."
                )
            found += [bare, LabelTokens(label, encode(f" {text}"), None, joins_behind)]
    return _with_longer(_by_tokens(found, question), edges)


def _by_tokens(labels: Sequence[LabelTokens], question: Question) -> dict[tuple[int, ...], LabelTokens]:
    """Each sequence of tokens once.

    Raises:
        OptionError: two labels have the same tokens.
    """
    known: dict[tuple[int, ...], LabelTokens] = {}
    for one in labels:
        other = known.setdefault(one.tokens, one)
        if other.label != one.label:
            first, second = (question.texts[label][0] for label in (other.label, one.label))
            raise OptionError(f"The labels {first!r} and {second!r} are the same tokens; leave one out.")
    return known


def _with_longer(known: dict[tuple[int, ...], LabelTokens], edges: TokenEdges) -> list[LabelTokens]:
    """For each label fill in the longer labels that it is a prefix of.

    A longer label is attached to its longest proper prefix only. It is left out if `joins_behind` counts it already,
    because it goes on within the same word.
    """
    for tokens in known:
        for end in reversed(range(1, len(tokens))):
            if shorter := known.get(tokens[:end]):
                if shorter.joins_behind is None or not edges.flags[tokens[end], shorter.joins_behind]:
                    shorter.longer.append(tokens[end:])
                break
    return list(known.values())


def template_canvases(
    answer: str, questions: Sequence[Question], encode: Encode, edges: TokenEdges, canvas_length: int
) -> tuple[list[FixedTokens], list[list[LabelTokens]]]:
    """The canvases that an answer template needs, and the labels of every question on them.

    The whole answer is tokenised with a label in each slot, because a space before a slot may belong to its token.

    Returns:
        canvases: one for every layout that some label needs.
        labels: those of each question.

    Raises:
        OptionError: slots and questions do not agree, slots touch, or the answer is longer than the canvas.
    """
    texts, order = _slots_of(answer, questions)
    usual = [_label_of_usual_length(question, encode) for question in questions]
    canvases: dict[FixedTokens, int] = {}  # with their indices
    found: list[list[LabelTokens]] = []
    for i, question in enumerate(questions):
        slot = order.index(i)
        labels = [(label, text) for label, group in enumerate(question.texts) for text in group]
        answers = [[text if j == i else usual[j] for j in order] for _, text in labels]
        tokenised = [_tokens_and_slots(texts, fillings, encode) for fillings in answers]
        # All labels get the widest slot. Otherwise a fixed token of one canvas would be a label's own on another.
        before = min(spans[slot][0] for _, spans in tokenised)
        behind = min(len(tokens) - spans[slot][1] for tokens, spans in tokenised)
        candidates = []
        for (label, text), (tokens, spans) in zip(labels, tokenised):
            start, end = spans[slot] = before, len(tokens) - behind
            _check_layout(answer, text, len(tokens), spans, canvas_length)
            canvas: list[int | None] = list(tokens)
            for first, last in spans:
                canvas[first:last] = [None] * (last - first)
            tail = tuple((at, token) for at, token in enumerate(canvas) if at >= end and token is not None)
            index = canvases.setdefault(tuple(canvas), len(canvases))
            joins_behind = None if behind else _column(_BEGINS, text[-1])
            candidates.append(
                LabelTokens(label, tokens[start:end], None, joins_behind, canvas=index, start=start, tail=tail)
            )
        different = _by_tokens(candidates, question)
        found.append(list(different.values()) if behind else _with_longer(different, edges))
    return list(canvases), found


def _slots_of(answer: str, questions: Sequence[Question]) -> tuple[list[str], list[int]]:
    """The texts around the slots of an answer template, and for each slot the index of its question."""
    if not isinstance(answer, str):
        raise OptionError(f"answer is {answer!r}; give a text with a slot such as 'It is {{}}.'.")
    try:
        texts, slots = split_template(answer)
    except ValueError as error:
        raise OptionError(f"The answer template {answer!r} is malformed ({error}); write {{{{ for a brace.") from None
    names = [question.name for question in questions]
    for name, formatting in slots:
        if formatting or name not in names:
            slot, allowed = "{" + name + formatting + "}", ", ".join("{" + one + "}" for one in names)
            raise OptionError(f"The answer template {answer!r} has a slot {slot}; its slots should be {allowed}.")
    found = [slot.name for slot in slots]
    for name in names:
        if (count := found.count(name)) != 1:
            slot = "{" + name + "}"
            raise OptionError(f"The answer template {answer!r} has {count} slots {slot}; give it one.")
    return texts, [names.index(name) for name in found]


def _check_layout(answer: str, text: str, count: int, spans: Sequence[tuple[int, int]], canvas_length: int) -> None:
    if count > canvas_length:
        raise OptionError(
            f"The answer {answer!r} has {count} tokens with {text!r}, more than a canvas of {canvas_length}; "
            "shorten it."
        )
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise OptionError(f"The answer template {answer!r} has slots that touch; put a space between them.")


def _label_of_usual_length(question: Question, encode: Encode) -> str:
    """The first label with as many tokens as most have."""
    texts = [text for group in question.texts for text in group]
    lengths = [len(encode(f" {text}")) for text in texts]
    return texts[lengths.index(Counter(lengths).most_common(1)[0][0])]


def _tokens_and_slots(
    texts: Sequence[str], fillings: Sequence[str], encode: Encode
) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """The tokens of a filled template, and the (start, end) of its slots.

    A slot has the tokens that differ from those of the text before it alone and of the text behind it alone.
    """
    pieces = [texts[0]]
    for filling, text in zip(fillings, texts[1:]):
        pieces += [filling, text]
    tokens, spans = encode("".join(pieces)), []
    for at in range(1, len(pieces), 2):
        before, behind = encode("".join(pieces[:at])), encode("".join(pieces[at + 1 :]))
        spans.append((_common_prefix(tokens, before), len(tokens) - _common_prefix(tokens[::-1], behind[::-1])))
    return tokens, spans


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((i for i, (one, other) in enumerate(zip(a, b)) if one != other), min(len(a), len(b)))
