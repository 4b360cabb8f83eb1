"""Languages over tokens: transitions, distances and the cache against naive ones."""

import pickle
import re

import numpy as np
import pytest
from pieces import ENDS, SMALL, Pieces, language_of, marginals, random_log_p
from support import refusal

from mlx_dgemma.constraints import walks
from mlx_dgemma.constraints.language import Language, accepts_every_line
from mlx_dgemma.constraints.patterns import python_regex_to_plain
from mlx_dgemma.constraints.search import best_text, exact_text
from mlx_dgemma.constraints.tokens import TokenBytes
from mlx_dgemma.errors import OptionError

WALKED = ["a|ab", r'\{"name": "[^"\n]{1,3}", "age": \d+\}', "(?:é|日本)+ ?x", ".*the end", "", "(?:ab)*c?"]


def plain_walk(language, token_bytes, tokens):
    """Every (token, state, state behind it), byte by byte."""
    table, found = language.table, set()
    for token in tokens:
        spelt = token_bytes.to_bytes([token])
        for source in range(len(table) - 1) if spelt else ():
            state = source
            for byte in spelt:
                state = table[state, byte]
            if state != len(table) - 1:
                found.add((int(token), source, int(state)))
    return found


def as_triples(tokens, transitions):
    columns = np.asarray(tokens)[transitions.index], transitions.source, transitions.target
    return list(zip(*(column.tolist() for column in columns)))


@pytest.mark.parametrize("pattern", WALKED)
def test_walks_equal_a_walk_byte_by_byte(pattern, token_bytes):
    language, tokens = language_of(pattern, token_bytes), np.arange(len(token_bytes.length))
    found = as_triples(tokens, language.transitions_of(tokens))
    assert set(found) == plain_walk(language, token_bytes, tokens)
    assert len(set(found)) == len(found)
    assert language.transitions_of(tokens[:0]).index.tolist() == []
    assert language.transitions_of(np.array([1, 2])).index.tolist() == []  # special tokens


@pytest.mark.parametrize("pattern", WALKED)
def test_distances_are_those_of_a_search_over_anchors(pattern, token_bytes):
    language = language_of(pattern, token_bytes)
    into = {}
    for token, source, target in plain_walk(language, token_bytes, language.always_scored_tokens):
        into.setdefault(target, []).append((source, token))
    distance, edge, onward = dict.fromkeys(np.flatnonzero(language.accepting).tolist(), 0), True, {}
    while edge:
        level = max(distance.values())
        edge = [(s, token, target) for target, d in distance.items() if d == level for s, token in into.get(target, ())]
        edge = [one for one in edge if one[0] not in distance]
        for source, token, target in edge:
            distance[source], onward[source] = level + 1, (token, target)
    expected = [distance.get(state, np.inf) for state in range(len(language.distance))]
    assert language.distance.tolist() == expected
    for state in distance:  # and from there the text can be finished in so many tokens
        tokens, at = [], state
        while not language.accepting[at]:
            token, at = onward[at]
            tokens.append(token)
        assert len(tokens) == language.distance[state]
        assert language.accepting[language.state_after(tokens, state)]
    assert np.isinf(language.distance[-1])
    assert np.isfinite(language.distance[0])


def test_the_shortest_text_is_spelt_with_long_tokens(tokenizer, token_bytes):
    text = '{"name": "'
    least = len(tokenizer.encode(text, add_special_tokens=False))
    assert language_of(re.escape(text), token_bytes).distance[0] <= least < len(text)
    assert language_of("", token_bytes).distance[0] == 0
    assert language_of("日", token_bytes).distance[0] == 3  # bytes


def test_states_after_tokens(tokenizer, token_bytes):
    language = language_of("(?:ab)*c?", token_bytes)
    tokens = tokenizer.encode("ababc", add_special_tokens=False)
    assert language.accepting[language.state_after(tokens)]
    assert language.state_after(tokens[1:], language.state_after(tokens[:1])) == language.state_after(tokens)
    assert language.state_after([*tokens, *tokens]) == len(language.distance) - 1  # dead
    assert language.state_after([]) == 0


def test_what_cannot_be_spelt_is_refused():
    assert refusal(OptionError, Language, python_regex_to_plain("z+"), SMALL) == (
        "The constraint has no text that this tokenizer can spell; change it."
    )
    assert refusal(OptionError, Language, python_regex_to_plain("az|é"), SMALL, "The regex 'az|é'") == (
        "The regex 'az|é' has no text that this tokenizer can spell; change it."
    )
    assert language_of("z|a").distance[0] == 1


def test_characters_without_a_token_are_spelt_in_bytes():
    """Behind free text too, where nothing leads from a narrow state into them."""
    pieces = Pieces("<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "é", special=1)
    token_bytes = TokenBytes(pieces, 258)
    assert Language(python_regex_to_plain("é"), token_bytes).distance[0] == 1
    assert Language(python_regex_to_plain("日é"), token_bytes).distance[0] == 4
    assert 1 <= Language(python_regex_to_plain("[^x]*é"), token_bytes).distance[0] <= 2


@pytest.mark.parametrize(
    ("pattern", "covers"),
    [
        (".*", True),
        ("(?s).*", True),
        (r"[^\n]*", True),
        (r"[^\n]*\n?", True),
        (".*|x", True),
        ("(?:.|ab)*", True),
        (".{0,3}.*", True),
        (r"[\s\S]*", True),
        ("x.*", False),
        (".+", False),
        (".*x", False),
        (".{0,9}", False),
        ("[^é]*", False),
        ("[^\U0001f600]*", False),
        (r"(?a)[\x00-\x7f]*", False),
        ("", False),
        (r"\w*", False),
    ],
)
def test_languages_of_every_line(pattern, covers, token_bytes):
    assert accepts_every_line(language_of(pattern, token_bytes)) is covers


@pytest.mark.parametrize("limit", ["MAX_MAPS", "MAX_MOVES"])
@pytest.mark.parametrize("known", [0, 2, 4, 6])
def test_what_is_forgotten_is_learned_again(monkeypatch, known, limit):
    expected, got, forgotten = [], [], []
    forget = walks.Walks._forget
    monkeypatch.setattr(walks.Walks, "_forget", lambda self: (forgotten.append(self), forget(self)))
    for results, value in ((expected, getattr(walks, limit)), (got, known)):
        monkeypatch.setattr(walks, limit, value)
        forgotten.clear()
        language = Language(python_regex_to_plain("[ab ]{2,}|(?:a|b)c ?a*"), SMALL)
        for seed in range(40):
            random = np.random.default_rng(seed)
            log_p = random_log_p(random, 4)
            likely = np.argsort(random.random(log_p.shape), axis=1)[:, :3]
            seen = marginals(language, log_p, likely)
            results.append(best_text(language, seen, 0, ENDS, 9).tolist())
            tokens, score = exact_text(language, seen, 1, 4)
            results.append((tokens.tolist(), score))
    assert got == expected
    assert len(forgotten) > 1  # the first time is the beginning


def test_bounded_patterns_over_small_alphabets_keep_few_tokens(token_bytes, monkeypatch):
    """Words are left to the likely tokens where they would fit into very many states; characters always stay."""
    monkeypatch.setattr("mlx_dgemma.constraints.language.MAX_SCORED_MOVES", 1000)
    language = Language("[a-z ]{1,40}", token_bytes)
    assert len(language.always_scored_tokens) == 27
    assert language.distance[0] == 1
    assert np.isfinite(language.distance[:-1]).all()


def test_a_language_does_not_grow_with_use(token_bytes):
    """Whatever tokens are likely: what it knows of them is not kept."""
    language = Language('"[a-z ]{0,400}"', token_bytes)
    sizes, random = [], np.random.default_rng(0)
    for _ in range(4):
        tokens = random.integers(0, len(token_bytes.length), (32, 64))
        language.likely_moves(tokens, np.log(random.uniform(0.01, 1, tokens.shape)))
        sizes.append(len(pickle.dumps(language)))
    assert len(set(sizes)) == 1
