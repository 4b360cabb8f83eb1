"""A thought that has spent its budget is ended, and the answer goes on."""

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
    whole = engine.generate("What is 3 plus 4?", thinking=True, seed=0)
    assert len(engine.tokenizer.encode(whole.thinking)) > 5 and whole.notes == ()
    result = engine.generate("What is 3 plus 4?", thinking=True, seed=0, thinking_budget=5, max_tokens=40)
    tokens = result.tokens
    end = tokens.index(CLOSE)
    assert engine.tokenizer.decode(tokens[:end]).startswith("<|channel>thought\nOnes: 3")
    assert len(tokens) > end + 3 and result.text  # something was said behind it
    assert result.log_probs[end - 1 : end + 1] == [0.0, 0.0] and len(result.log_probs) == len(tokens)
    assert result.notes == ("The thought was ended at its budget of 5 tokens.",)
    assert result.stats.blocks > whole.stats.blocks and result.stats.generated_tokens == len(tokens)


def test_the_budget_is_a_whole_number(engine):
    assert refusal(OptionError, engine.generate, "Hi", thinking_budget=-1) == (
        "thinking_budget is -1; it should be a whole number, at least 0."
    )
