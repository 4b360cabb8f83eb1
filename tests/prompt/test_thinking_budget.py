"""A thought that has spent its budget is ended, and the answer goes on."""

import re

import pytest
from support import engine_of, refusal

from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.errors import OptionError
from mlx_dgemma.prompt.answer import Answer

OPEN, CLOSE = 13, 14


@pytest.fixture(scope="module")
def engine():
    return engine_of(DEMO)


def closed(engine, budget, *blocks, thinks=False):
    """The blocks as they are to be committed."""
    answer = Answer(engine.tokenizer, (16,), 1000, thinks=thinks, thinking_budget=budget)
    found = []
    for block in blocks:
        tokens, log_probs = answer.close_thought(block, [-1.0] * len(block))
        assert len(tokens) == len(log_probs)
        answer.feed(tokens, log_probs)
        found.append(tokens)
    return found


def test_a_block_ends_where_the_budget_is_spent(engine):
    def encode(text):
        return engine.tokenizer.encode(text, add_special_tokens=False)

    heading, words, close = encode("<|channel>thought\n"), encode("a b c d e f"), encode("\n<channel|>")
    assert close[-1] == CLOSE and heading[0] == OPEN
    block = [*heading, *words]
    assert closed(engine, 3, block) == [[*heading, *words[:3], *close]]
    assert closed(engine, 0, block) == [[*heading, *close]]
    assert closed(engine, len(words), block) == [block]
    assert closed(engine, 8, block, words) == [block, [*words[: 8 - len(words)], *close]]  # over two blocks
    assert closed(engine, 2, words, thinks=True) == [[*words[:2], *close]]
    for enough in ([*block, CLOSE, *words], [*words, *words, *words], [*block, 16, *words]):
        assert closed(engine, len(words), enough) == [enough]
    again = [*block, CLOSE, *heading, *words]
    assert closed(engine, 8, again) == [[*block, CLOSE, *heading, *words[: 8 - len(words)], *close]]


def test_an_answer_goes_on_behind_the_thought_that_was_ended(engine):
    whole = engine.generate("What is 3 plus 4?", thinking=True, seed=0, max_tokens=40)
    assert len(engine.tokenizer.encode(whole.thinking)) > 5 and whole.notes == ()
    result = engine.generate("What is 3 plus 4?", thinking=True, seed=0, thinking_budget=5, max_tokens=40)
    tokens = result.tokens
    end = tokens.index(CLOSE)
    heading = engine.tokenizer.encode("<|channel>thought\n", add_special_tokens=False)
    assert end == len(heading) + 5 + 1 and tokens[: end - 1] == whole.tokens[: end - 1]  # and a line break
    assert len(tokens) > end + 3 and result.text  # something was said behind it
    assert result.log_probs[end - 1 : end + 1] == [0.0, 0.0] and len(result.log_probs) == len(tokens)
    assert result.notes == ("The thought was ended at its budget of 5 tokens.",)
    assert result.stats.blocks > whole.stats.blocks and result.stats.generated_tokens == len(tokens)


def test_the_budget_is_a_whole_number(engine):
    assert refusal(OptionError, engine.generate, "Hi", thinking_budget=-1) == (
        "thinking_budget is -1; it should be a whole number, at least 0."
    )


@pytest.mark.parametrize("form", [{}, {"regex": "[0-9]+ ok"}], ids=["free", "in a language"])
def test_a_thought_ends_at_its_budget_token_by_token_and_drafts_change_nothing(engine, form):
    """The penalty reads all tokens so far: those that end the thought are among them."""
    prompt, told = "What is 28 + 15?", {}
    options = {"thinking": True, "thinking_budget": 9, "temperature": 0.7, "repetition_penalty": 1.05, "seed": 2}
    for mode in ("causal", "speculative"):
        session = engine.session()
        told[mode] = found = engine.generate(prompt, mode=mode, session=session, max_tokens=30, **options, **form)
        assert found.notes == ("The thought was ended at its budget of 9 tokens.",)
        opened = engine.prepare(prompt, thinking=True, seed=0).prompt.tokens
        held = opened + found.tokens
        assert session.cache_key[: len(held)] == held[: session.prefix.offset]
        assert session.prefix.offset == len(session.cache_key) >= len(held) - 1
    assert told["causal"].tokens == told["speculative"].tokens and told["speculative"].stats.accepted_tokens
    free = engine.generate(prompt, mode="causal", max_tokens=20, **{**options, "thinking_budget": None}, **form)
    close = told["causal"].tokens.index(engine.tokenizer.think_end_tokens[0])
    assert told["causal"].tokens[: close - 1] == free.tokens[: close - 1] != told["causal"].tokens[: close + 1]
    assert free.tokens[close] != told["causal"].tokens[close]
    if form:
        assert re.fullmatch("[0-9]+ ok", told["causal"].text)
