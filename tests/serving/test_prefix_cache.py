"""The prefix cache: what is reused and what is kept; answers never change."""

import numpy as np
import pytest
from listeners import Listener
from loop import tiny_engine, tiny_request
from prefixes import ONCE, PLENTY, alone, ask, run, same, some
from support import BLUE, GREEN, RED, strip

from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.serving.prefix_cache import MIN_REUSE_TOKENS, PrefixCache
from mlx_dgemma.serving.scheduler import Scheduler

STORY = "Once there was a cat named Leo. Leo had a red ball. Every day he played with it in the green meadow. "


# What is reused: the demo.


def chat(engine, cache, *texts, **options):
    """The answer to a chat, that it is the one without a cache."""
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts)]
    return same(engine, cache, messages, **options)


def test_a_second_turn_encodes_only_what_is_new(engine, monkeypatch):
    cache, encode, lengths = PrefixCache(engine, PLENTY), engine.model.encode, []
    first = chat(engine, cache, STORY * 4 + "Spell the word frog.", **ONCE)
    assert first.stats.reused_tokens == 0
    monkeypatch.setattr(
        type(engine.model),
        "encode",
        lambda self, t, *rest, **named: lengths.append(t.shape[1]) or encode(t, *rest, **named),
    )
    second = chat(engine, cache, STORY * 4 + "Spell the word frog.", first.text, "Spell the word cat.", **ONCE)
    stats = second.stats
    assert stats.reused_tokens == first.stats.prompt_tokens > 96 < stats.prompt_tokens
    assert lengths == [stats.prompt_tokens, stats.prompt_tokens - stats.reused_tokens]  # without a cache, and with it


def test_the_same_picture_is_reused_and_another_of_its_size_is_not(engine):
    """Behind the same long text, 35 soft tokens each, whose placeholders are equal."""
    cache = PrefixCache(engine, PLENTY)

    def turn(color, *words):
        text, *rest = ({"type": "text", "text": one} for one in (STORY * 4, "What color is it?"))
        parts = [text, {"type": "image", "image": strip(color)}, *rest]
        said = zip(("user", "assistant", "user"), (parts, *words))
        prompt = [{"role": role, "content": content} for role, content in said]
        before = [type(one) for one in engine.prepare(prompt).prompt.cache_key].index(str)
        return before, same(engine, cache, prompt, **ONCE).stats

    before, first = turn(RED)
    _, again = turn(RED, "Red.", "What shape is it?")
    assert (again.reused_tokens, again.images_encoded) == (first.prompt_tokens, 0)
    _, other = turn(BLUE)
    assert (other.reused_tokens, other.images_encoded) == (0, 1)
    _, third = turn(GREEN)
    assert (third.reused_tokens, third.images_encoded) == (before, 1)  # a copy was kept there
    assert before > engine.config.text.sliding_window


def test_a_copy_is_never_kept_within_a_picture(engine):
    """Not even where two pictures' placeholders begin alike."""
    cache = PrefixCache(engine, PLENTY)
    picture = ["red/70"] * 35
    session = engine.session()
    session.cache_key = [2] * 100 + picture + [3]
    cache._sessions["a"] = session
    assert cache.find([2] * 100 + picture[:20] + ["another"] * 15) == (None, 100)
    assert cache.find([2] * 100 + ["another"] * 35) == (None, 100)
    assert cache.find([2] * 100 + picture + [4] * 9) == (None, 135)


# What is reused: a random model whose window is 5, so that every prompt is longer.


def test_a_tenth_turn_reuses_the_ninth(tiny, cache):
    tokens, reused = some(0, 80), []
    for turn in range(10):
        known = len(tokens)
        reused.append(ask(tiny, cache, tokens)[0])
        tokens = tokens + some(turn + 1, 7)
        assert reused == [0, *(80 + 7 * n for n in range(turn))], known
    assert reused[-1] == 80 + 7 * 8


def test_committed_blocks_are_reused_and_other_answers_go_back_to_the_prompt(tiny, cache):
    prompt = some(0, 80)
    _, answer = ask(tiny, cache, prompt, blocks=3)  # the last block is not encoded
    assert ask(tiny, cache, [*prompt, *answer, 5, 6])[0] == 88
    cache = PrefixCache(tiny, PLENTY)
    ask(tiny, cache, prompt, blocks=3)
    assert ask(tiny, cache, [*prompt, *[(t + 1) % 39 for t in answer], 5])[0] == 80


def test_the_same_prompt_again_encodes_nothing(tiny, cache):
    assert [ask(tiny, cache, some(0, 80), blocks=3)[0] for _ in range(3)] == [0, 80, 80]
    assert len(cache) == 1


def test_the_longest_beginning_is_taken(tiny, cache):
    tokens = some(0, 200)
    for prompt in (tokens[:120], tokens[:80], tokens[:70] + some(9, 60), some(1, 150)):
        ask(tiny, cache, prompt)
    assert ask(tiny, cache, [*tokens[:150], 1, 2])[0] == 120
    assert ask(tiny, cache, [*tokens[:100], 3])[0] == 80
    assert ask(tiny, cache, [*tokens[:75], 4])[0] == 70  # a copy was kept there


def test_short_beginnings_are_encoded_again(tiny, cache):
    ask(tiny, cache, some(0, MIN_REUSE_TOKENS - 1))
    assert (len(cache), cache.nbytes) == (0, 0)
    ask(tiny, cache, some(0, MIN_REUSE_TOKENS))
    assert ask(tiny, cache, [*some(0, MIN_REUSE_TOKENS), 1])[0] == MIN_REUSE_TOKENS


def test_where_prompts_part_a_copy_is_kept_for_the_third(tiny, cache):
    shared = some(0, 100)
    ends = [[n, *some(n, 9)] for n in range(4)]
    assert ask(tiny, cache, shared + ends[0])[0] == 0
    assert cache.find(shared + ends[1]) == (None, 100)
    assert ask(tiny, cache, shared + ends[1])[0] == 0
    assert len(cache) == 3
    assert ask(tiny, cache, shared + ends[2])[0] == 100
    session, branch = cache.find(shared + ends[3])
    assert (len(session.cache_key), branch) == (100, 0)
    assert session.cache_key == shared


def test_copies_are_kept_beyond_what_is_reused(tiny, cache):
    tokens = some(0, 200)
    ask(tiny, cache, tokens[:80])
    ask(tiny, cache, [*tokens[:180], 1])
    session, branch = cache.find([*tokens[:170], 2, 3])
    assert (len(session.cache_key), branch) == (80, 170)
    assert ask(tiny, cache, [*tokens[:170], 2, 3])[0] == 80
    assert ask(tiny, cache, [*tokens[:175], 4])[0] == 170
    assert ask(tiny, cache, [*tokens[:170], 2, 3, 4])[0] == 172


@pytest.mark.parametrize(
    ("shared", "branch"), [(0, 0), (MIN_REUSE_TOKENS, 0), (MIN_REUSE_TOKENS + 1, MIN_REUSE_TOKENS + 1)]
)
def test_a_copy_must_be_worth_it(tiny, cache, shared, branch):
    ask(tiny, cache, [*some(0, shared), 1, *some(1, 90)])
    assert cache.find([*some(0, shared), 2, *some(2, 90)]) == (None, branch)


def test_an_interrupted_prompt_serves_those_that_begin_with_its_part(tiny, cache):
    tokens, loop = some(0, 150), Loop(tiny.model)
    request = tiny_request(tokens, prefill_chunk=100)
    loop.add(request)
    list(loop.step())
    loop.remove(request)
    cache.put(request.session)
    assert ask(tiny, cache, tokens)[0] == 100


def test_a_scheduler_reuses_what_it_keeps(tiny, tmp_path):
    results = []
    for _ in range(2):  # a process and the next one
        scheduler = Scheduler(tiny_engine(tiny.checkpoint.path), cache_bytes=PLENTY, cache_dir=tmp_path)
        for tokens in (some(0, 90), [*some(0, 90), 1, 2]):
            listener = Listener()
            scheduler.submit(lambda tokens=tokens: tiny_request(tokens), listener)
            result = listener.last.result
            results.append((result.stats.reused_tokens, result.tokens))
        load = scheduler.load()
        scheduler.close()
    short, long = (alone((*some(0, 90), *more), 2)[0] for more in ((), (1, 2)))
    assert results == [(0, short), (90, long), (90, short), (92, long)]
    assert (load.counters["cached_tokens"], load.cache_entries) == (182, 2)
    assert load.cache_bytes > 0
    assert len(list(tmp_path.glob(f"{tiny.checkpoint.path.name}/*/*.safetensors"))) == 2


# What is kept.


def test_the_least_recently_used_goes_first(tiny, cache):
    ask(tiny, cache, some(0, 80))
    size = cache.nbytes
    cache = PrefixCache(tiny, 3 * size)
    for n in (0, 1, 2):
        ask(tiny, cache, some(n, 80))
    assert cache.find(some(0, 80))[0] is not None  # used
    ask(tiny, cache, some(3, 80))
    assert [cache.find(some(n, 80))[0] is not None for n in range(4)] == [True, False, True, True]
    assert (len(cache), cache.nbytes) == (3, 3 * size)


def test_the_budget_is_never_exceeded(tiny):
    random, cache = np.random.default_rng(0), PrefixCache(tiny, 300_000)
    seen = set()
    for turn in range(12):
        run(tiny, cache, tiny_request(some(int(random.integers(2)), int(random.integers(60, 300))) + [turn % 39] * 3))
        assert cache.nbytes <= 300_000
        assert cache.nbytes == sum(session.nbytes for session in cache._sessions.values())
        seen.add(len(cache))
    assert max(seen) > 2


def test_what_is_larger_than_the_budget_drives_nothing_out(tiny, cache):
    ask(tiny, cache, some(0, 80))
    cache = PrefixCache(tiny, cache.nbytes)
    ask(tiny, cache, some(0, 80))
    assert ask(tiny, cache, some(1, 300))[0] == 0
    assert ask(tiny, cache, some(0, 80))[0] == 80
    assert len(cache) == 1


def test_a_budget_of_nothing_keeps_nothing(tiny, tmp_path):
    cache = PrefixCache(tiny, 0, tmp_path)
    assert [ask(tiny, cache, some(0, 80))[0] for _ in range(2)] == [0, 0]
    assert (len(cache), cache.nbytes, cache.save_one(), list(tmp_path.iterdir())) == (0, 0, False, [])
