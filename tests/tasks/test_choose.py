"""Choices: probabilities of labels against the naive way, with and without a template."""

import warnings
from functools import lru_cache

import mlx.core as mx
import numpy as np
import pytest
from support import RED, engine_of, prompt_of, square

from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.model import head, rng
from mlx_dgemma.tasks import choose, labels

LARGER = "Which is larger, 51 or 23?"
JSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
FORM = '{{"name": "Anna", "age": {age}, "city": "{city}"}}'
COLOR = "What color is the shape?"


@pytest.fixture(scope="module")
def engine():
    return engine_of(DEMO)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def canvas_of(engine, seed=0):
    return np.array(rng.noise(64, 2048, mx.random.key(seed)[None]))[0]


def whole(engine, prompt, canvas, **media):
    """[C, V] probabilities of every token at every position, from whole logits."""
    prefix = choose.encoded(engine.model, prompt_of(engine, prompt, **media))
    logits = np.array(engine.model.logits(engine.model.denoise(mx.array(canvas)[None], prefix)))[0].astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def kind(char):
    return "digit" if char.isdigit() else "letter" if char.lower() != char.upper() else None


@lru_cache
def words(wanted, end):
    """Tokens that begin (end = 0) or end (-1) with a digit or a letter."""
    texts = [engine_of(DEMO).tokenizer.convert_ids_to_tokens(token) for token in range(2048)]
    return [t for t, text in enumerate(texts) if t > 23 and not text.startswith("<0x") and kind(text[end]) == wanted]


def word_mass(row, char, end):
    return sum(row[token] for token in words(kind(char), end)) if kind(char) else 0


def naive_at(engine, p, i, labels):
    """Probability of each label at position i of free text, by loops."""
    encode = engine.tokenizer.encode
    variants = [
        (n, encode(space + label, add_special_tokens=False), not space)
        for n, label in enumerate(labels)
        for space in ("", " ")
    ]
    found = [0.0] * len(labels)
    for n, tokens, bare in variants:
        if i + len(tokens) > len(p):
            continue
        value = np.prod([p[i + k, token] for k, token in enumerate(tokens)])
        end = i + len(tokens)
        on = word_mass(p[end], labels[n][-1], 0) if end < len(p) else 0
        for _, other, _ in variants:  # labels here never nest twice
            rest = other[len(tokens) :]
            if rest and other[: len(tokens)] == tokens and end + len(rest) <= len(p):
                first = engine.tokenizer.convert_ids_to_tokens(rest[0])[0]
                if kind(labels[n][-1]) is None or kind(first) != kind(labels[n][-1]):
                    on += np.prod([p[end + k, token] for k, token in enumerate(rest)])
        value *= 1 - on
        if bare and i:
            value *= 1 - word_mass(p[i - 1], labels[n][0], -1)
        found[n] += value
    return np.array(found)


def naive(engine, prompt, labels, seed=0, **media):
    """(probabilities where labels first are a tenth as probable as anywhere, that position, [C, N])."""
    p = whole(engine, prompt, canvas_of(engine, seed), **media)
    rows = np.array([naive_at(engine, p, i, labels) for i in range(len(p))])
    mass = rows.sum(-1)
    at = next(i for i, one in enumerate(mass) if one >= mass.max() / 10)
    return rows[at] / mass[at], at, rows


def close(found, wanted):
    assert list(found.values()) == pytest.approx(list(wanted), abs=1e-5)


# Free text


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        (LARGER, ["51", "23"]),
        (LARGER, ["5", "51", "2", "23", "is"]),
        (LARGER, ["51", "51 is", "23"]),
        ("What is the capital of France?", ["Paris", "Rome", "Par", "The capital", "PARIS"]),
        (JSON, ["Oslo", "Anna", "31"]),
    ],
)
@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.usefixtures("quiet")
def test_a_reading_is_what_loops_over_whole_logits_give(engine, prompt, labels, seed):
    found = engine.choose(prompt, labels, seed=seed)
    assert list(found) == labels
    close(found, naive(engine, prompt, labels, seed)[0])
    assert sum(found.values()) == pytest.approx(1)


def test_the_same_prompt_gives_the_same_numbers(engine):
    first = engine.choose(LARGER, ["51", "23"])
    assert engine.choose(LARGER, ("51", "23")) == first == engine.choose(LARGER, ["51", "23"], seed=0)
    assert engine.choose([{"role": "user", "content": LARGER}], ["51", "23"]) == first
    assert engine.choose(LARGER, ["51", "23"], seed=1) != first


def test_answers_are_found_where_they_stand(engine):
    assert engine.choose(LARGER, ["23", "51"])["51"] > 0.99
    assert engine.choose("What is the capital of France?", ["Rome", "Paris"])["Paris"] > 0.99  # "The capital of ..."
    loud = engine.choose("What is the capital of France?", ["ROME", "PARIS"], system="Answer in uppercase.")
    assert loud["PARIS"] > 0.99


@pytest.mark.usefixtures("quiet")
def test_a_label_that_begins_another_does_not_take_its_share(engine):
    assert engine.choose(LARGER, ["5", "51"])["51"] > 0.99
    assert engine.choose(JSON, ["3", "31", "317"])["31"] > 0.99
    assert engine.choose(LARGER, ["51", "51 is larger"])["51 is larger"] > 0.99
    assert engine.choose(LARGER, ["51 i", "51 is"])["51 is"] > 0.99
    found = engine.choose("What is the capital of France?", ["aris", "Paris", "Par"])
    assert found["Paris"] > 0.99


def test_space_around_a_label_changes_nothing(engine):
    plain = engine.choose("What is the capital of France?", ["Paris", "Rome"])
    spaced = engine.choose("What is the capital of France?", [" Paris", "Rome\n"])
    assert list(spaced.values()) == list(plain.values())
    assert list(spaced) == [" Paris", "Rome\n"]


def test_a_range_has_numbers_as_keys(engine):
    found = engine.choose(JSON, range(29, 34, 2))
    assert list(found) == [29, 31, 33]
    assert found[31] > 0.99


@pytest.mark.usefixtures("quiet")
def test_bool_sums_up_its_spellings(engine):
    found = engine.choose(LARGER, bool)
    texts = [text for group in labels.BOOL_TEXTS.values() for text in group]
    each = naive(engine, LARGER, texts)[0]
    assert list(found) == [True, False]
    close(found, [each[:4].sum(), each[4:].sum()])


def test_labels_that_are_no_answer_are_told(engine):
    said = r"^The model answers with none of the labels \(0\.0%\); give an answer template or other labels\.$"
    with pytest.warns(UserWarning, match=said):
        found = engine.choose(LARGER, ["red", "blue"])
    assert sum(found.values()) == pytest.approx(1)
    with pytest.warns(UserWarning, match=r"none of the labels of color \(0\.0%\); give other labels\.$"):
        engine.choose(LARGER, {"color": ["red", "blue"]}, answer="{color} is larger")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.choose(LARGER, ["51", "23"])


def test_calibration_divides_by_what_labels_get_unasked(engine):
    labels = ["51", "23"]
    _, at, rows = naive(engine, LARGER, labels)
    prior = naive(engine, "N/A", labels)[2][at]
    wanted = rows[at] / prior
    close(engine.choose(LARGER, labels, calibrate=True), wanted / wanted.sum())


def test_calibration_keeps_the_system_message_and_no_picture(engine):
    choice = choose.choose(
        engine.model, engine.builder, COLOR, ["red", "blue"], images=[square(RED)], system="Be brief.", calibrate=True
    )
    assert (choice.canvases, choice.images) == (2, 1)
    assert choice.probabilities["red"] > 0.9


def test_pictures_and_frames_are_looked_at(engine):
    found = engine.choose(COLOR, ["red", "blue", "green"], images=[square(RED)], image_tokens=70)
    assert found["red"] > 0.99
    moves = [square(RED, x) for x in (40, 80, 120)]
    assert engine.choose("What happens in the video?", ["left", "right"], video=moves)["right"] > 0.99


# Templates


def naive_template(engine, prompt, answer, labels):
    """Weights of labels in the slot of `answer`, each on a canvas of its own, with the fixed text behind it."""
    encode, found = engine.tokenizer.encode, []
    before, behind = answer.split("{}")
    for label in labels:
        tokens = encode(before + label + behind, add_special_tokens=False)
        first, last = (len(encode(part, add_special_tokens=False)) for part in (before, behind))
        canvas = canvas_of(engine)
        start, end = first, len(tokens) - last
        pinned = [i for i in range(len(tokens)) if not start <= i < end]
        canvas[pinned] = np.array(tokens)[pinned]
        p = whole(engine, prompt, canvas)
        found.append(np.prod([p[i, token] for i, token in enumerate(tokens) if i >= start]))
    return np.array(found) / sum(found)


@pytest.mark.parametrize(
    ("prompt", "answer", "labels"),
    [
        (LARGER, "{} is larger than 23.", ["51", "5", "23", "2"]),
        ("What is the capital of France?", "The capital of France is{}.", ["Paris", "Rome"]),
        (JSON, '{"name": "Anna", "age": {}, "city": "Oslo"}', ["3", "31", "317", "29"]),
    ],
)
@pytest.mark.usefixtures("quiet")
def test_a_slot_is_what_whole_logits_give(engine, prompt, answer, labels):
    template = answer.replace("{", "{{").replace("}", "}}").replace("{{}}", "{}")
    close(engine.choose(prompt, labels, answer=template), naive_template(engine, prompt, answer, labels))


def test_a_space_before_a_slot_belongs_to_the_label(engine):
    encode = engine.tokenizer.encode
    question = labels.questions_of(["Paris", "Rome"])
    plan = choose.plan_of(engine.tokenizer, engine.config, question, "The capital of France is {}.")
    wanted = [encode(" Paris", add_special_tokens=False), encode(" Rome", add_special_tokens=False)]
    assert [list(one.tokens) for one in plan.labels[0]] == wanted
    assert [list(one) for one in plan.fixed] == [
        [*encode("The capital of France is", add_special_tokens=False), None, *encode(".", add_special_tokens=False)]
    ]


def test_labels_of_several_lengths_have_a_canvas_each(engine):
    choice = choose.choose(
        engine.model, engine.builder, JSON, ["3", "31", "317", "29"], answer='{{"name": "Anna", "age": {}, '
    )
    assert choice.canvases == 3
    assert choice.probabilities["31"] > 0.99
    short = engine.choose("Which is larger, 5 or 51?", ["5", "51"], answer="{} is larger")
    assert short["51"] > 0.99


def test_a_template_may_end_in_its_slot(engine):
    found = engine.choose(JSON, ["3", "31", "317"], answer='{{"name": "Anna", "age": {}')
    assert found["31"] > 0.99


def test_more_canvases_than_fit_together_change_nothing(engine, monkeypatch):
    labels, answer = ["3", "31", "317", "29"], '{{"name": "Anna", "age": {}, '
    together = engine.choose(JSON, labels, answer=answer)
    monkeypatch.setattr(choose, "MAX_ROWS", 2)
    close(engine.choose(JSON, labels, answer=answer), together.values())


def test_several_questions_share_a_canvas(engine):
    asked = {"age": range(29, 34), "city": ["Oslo", "Rome"]}
    choice = choose.choose(engine.model, engine.builder, JSON, asked, answer=FORM)
    found = choice.probabilities
    assert choice.canvases == 1
    assert list(found) == ["age", "city"]
    assert found["age"][31] > 0.99
    assert found["city"]["Oslo"] > 0.99
    assert all(sum(one.values()) == pytest.approx(1) for one in found.values())
    swapped = engine.choose(JSON, {"city": asked["city"], "age": asked["age"]}, answer=FORM)
    close(swapped["age"], found["age"].values())


def test_a_question_of_other_lengths_adds_canvases_of_its_own(engine):
    asked = {"age": ["3", "31", "29"], "city": ["Oslo", "Rome"]}
    choice = choose.choose(engine.model, engine.builder, JSON, asked, answer=FORM)
    assert choice.canvases == 2
    assert choice.probabilities["age"]["31"] > 0.99
    assert choice.probabilities["city"]["Oslo"] > 0.99


def test_one_named_question_needs_no_template(engine):
    assert engine.choose(LARGER, {"larger": ["51", "23"]}) == {"larger": engine.choose(LARGER, ["51", "23"])}


# The pass over the vocabulary


@pytest.mark.parametrize("nbytes", [1, 4 * 64 * 1000, head.CHUNK_BYTES])
def test_the_reading_does_not_depend_on_its_chunks(engine, nbytes):
    model = engine.model
    hidden = mx.random.normal((2, 5, 192), key=mx.random.key(0)) * 3
    marks = np.random.default_rng(0).integers(0, 2, (2048, 3)).astype(np.float32)
    log_p, mass = choose.read_probabilities(model, hidden, [0, 3, 1000, 2047], marks, nbytes)
    logits = np.array(model.logits(hidden)).astype(np.float64)
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    np.testing.assert_allclose(np.exp(log_p), p[..., [0, 3, 1000, 2047]], atol=1e-6)
    np.testing.assert_allclose(mass, p @ marks, atol=1e-6)
