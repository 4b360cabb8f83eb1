"""Prefixes of earlier requests: what is reused, what is kept, what a folder brings back; answers never change."""

import json
import os
import shutil
import time
import warnings
from dataclasses import replace
from functools import cache as cache_of_calls

import mlx.core as mx
import numpy as np
import pytest
from loop import tiny_engine, tiny_request
from support import BLUE, GREEN, RED, engine_of, random_tokens, refusal, strip

from mlx_dgemma.decoding.events import Finished
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.errors import OptionError
from mlx_dgemma.serving.prefix_cache import WORTH, PrefixCache, fingerprint
from mlx_dgemma.serving.scheduler import Scheduler

PLENTY = 2**30
STORY = "Once there was a cat named Leo. Leo had a red ball. Every day he played with it in the green meadow. "
ONCE = {"max_tokens": 64, "max_denoising_steps": 1}


def run(engine, cache, request):
    """Generate a request as a scheduler does; returns its result."""
    loop, result = Loop(engine.model), None
    loop.add(request, *cache.find(request.prompt.cache_key))
    while loop.requests:
        for _, event in loop.step():
            assert not isinstance(event, Exception), event
            result = event.result if isinstance(event, Finished) else result
    for session in (request.session.take_snapshot(), request.session):
        if session is not None:
            cache.put(session)
    return result


def ask(engine, cache, tokens, blocks=1):
    """(tokens reused, answer's tokens) of a tiny request; that the answer is the one without a cache."""
    result = run(engine, cache, tiny_request(tokens, blocks))
    assert (result.tokens, result.stats.denoising_steps) == alone(tuple(tokens), blocks)
    return result.stats.reused_tokens, result.tokens


@cache_of_calls
def alone(tokens, blocks=1):
    """(tokens, steps) of the same without a cache."""
    (*_, finished) = tiny_engine().run(tiny_request(tokens, blocks))
    return finished.result.tokens, finished.result.stats.denoising_steps


def some(seed, length):
    return random_tokens(seed, length).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model with a window of 5, as if from a checkpoint's folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(200)))
    return tiny_engine(folder)


@pytest.fixture
def cache(tiny):
    return PrefixCache(tiny, PLENTY)


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


# What is reused: the demo.


def chat(engine, cache, *texts, **options):
    """The answer to a chat, that it is the one without a cache."""
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts)]
    return same(engine, cache, messages, **options)


def same(engine, cache, prompt, **options):
    expected = engine.generate(prompt, seed=0, **options)
    result = run(engine, cache, engine.prepare(prompt, seed=0, **options))
    assert (result.tokens, result.stats.denoising_steps) == (expected.tokens, expected.stats.denoising_steps)
    return result


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
    cache._kept["a"] = session
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
    ask(tiny, cache, some(0, WORTH - 1))
    assert (len(cache), cache.nbytes) == (0, 0)
    ask(tiny, cache, some(0, WORTH))
    assert ask(tiny, cache, [*some(0, WORTH), 1])[0] == WORTH


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


@pytest.mark.parametrize(("shared", "branch"), [(0, 0), (WORTH, 0), (WORTH + 1, WORTH + 1)])
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
            told = []
            scheduler.submit(lambda tokens=tokens: tiny_request(tokens), told.append)
            end = time.monotonic() + 60
            while not (told and isinstance(told[-1], Finished)) and time.monotonic() < end:
                time.sleep(0.002)
            results.append((told[-1].result.stats.reused_tokens, told[-1].result.tokens))
        load = scheduler.load()
        scheduler.close()
    short, long = (alone((*some(0, 90), *more), 2)[0] for more in ((), (1, 2)))
    assert results == [(0, short), (90, long), (90, short), (92, long)]
    assert (load.counters["cached_tokens"], load.cache_entries) == (182, 2)
    assert load.cache_bytes > 0
    assert len(list((tmp_path / tiny.checkpoint.path.name).iterdir())) == 2


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
        assert cache.nbytes == sum(session.nbytes for session in cache._kept.values())
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


# What a folder brings back.


@pytest.fixture(scope="module")
def filled(tiny, tmp_path_factory):
    """Makes a folder as a process that answered so many prompts left it, and tells its files, the oldest first."""
    left = tmp_path_factory.mktemp("left")
    cache, names = PrefixCache(tiny, PLENTY, left), []
    for n in range(3):
        ask(tiny, cache, some(n, 80), blocks=3)
        assert not cache.save_one()
        names += [path.name for path in left.iterdir() if path.name not in names]

    def fill(folder, prompts=1):
        folder.mkdir(parents=True, exist_ok=True)
        for n, name in enumerate(names[:prompts]):
            shutil.copyfile(left / name, folder / name)
            os.utime(folder / name, (n, n))
        return [folder / name for name in names[:prompts]]

    return fill


def test_after_a_restart_the_first_request_is_a_hit(tiny, filled, tmp_path):
    filled(tmp_path / "some" / "where", 3)
    cache = PrefixCache(tiny, PLENTY, tmp_path / "some" / "where")
    assert (len(cache), cache.save_one()) == (3, False)
    for n in range(3):
        assert ask(tiny, cache, some(n, 80))[0] == 80  # to the mark
    _, answer = ask(tiny, cache, some(0, 80), blocks=3)
    cache = PrefixCache(tiny, PLENTY, tmp_path / "some" / "where")
    assert ask(tiny, cache, [*some(0, 80), *answer, 1])[0] == 80 + 8


def test_after_a_restart_the_demo_answers_as_before(engine, tmp_path):
    prompt, picture = "What color is the shape? " * 8, [strip(RED)]
    cache = PrefixCache(engine, PLENTY, tmp_path)
    first = same(engine, cache, prompt, images=picture, **ONCE)
    assert not cache.save_one()
    again = same(engine, PrefixCache(engine, PLENTY, tmp_path), prompt, images=picture, **ONCE)
    assert (again.stats.reused_tokens, again.stats.images_encoded) == (first.stats.prompt_tokens, 0)


def test_the_newest_files_come_back_within_the_budget(tiny, filled, tmp_path):
    filled(tmp_path, 3)
    size = PrefixCache(tiny, PLENTY, tmp_path).nbytes // 3
    cache = PrefixCache(tiny, 2 * size + 1, tmp_path)
    assert [cache.find(some(n, 80))[0] is not None for n in range(3)] == [False, True, True]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_holds_what_memory_holds(tiny, filled, tmp_path):
    (file,) = filled(tmp_path)
    cache = PrefixCache(tiny, PLENTY, tmp_path)
    cache = PrefixCache(tiny, cache.nbytes, tmp_path)
    ask(tiny, cache, some(1, 80), blocks=3)
    assert (len(cache), list(tmp_path.iterdir())) == (1, [])
    assert not cache.save_one()
    assert [path != file for path in tmp_path.iterdir()] == [True]


def ignored(tiny, folder):
    """The warnings of a start with a file that is broken; that it is gone, and that the other one is taken."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = PrefixCache(tiny, PLENTY, folder)
    assert len(cache) == len(list(folder.iterdir())) == 1
    assert [len(cache.find(some(n, 80))[0].cache_key) if n else cache.find(some(n, 80))[0] for n in range(2)] == [
        None,
        88,
    ]
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("part", [0, 1, 7, 8, 9, 0.01, 0.5, 0.999, -1])
def test_a_file_cut_short_is_ignored(tiny, filled, tmp_path, part):
    file, _ = filled(tmp_path, 2)
    content = file.read_bytes()
    (header,) = np.frombuffer(content[:8], np.uint64).tolist()
    length = part if isinstance(part, int) else int(part * len(content))
    cut = content[:length]
    file.write_bytes(cut)
    if len(cut) < 8:
        why = "unpack requires a buffer of 8 bytes"
    elif len(cut) < header:
        why = "its header is cut short"
    else:
        why = f"it has {len(cut)} bytes and should have {len(content)}"
    assert ignored(tiny, tmp_path) == [f"{file.name} in the prefix cache is broken ({why}); it is ignored."]


def header_of(value):
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"garbage, and more of it, which is long enough for a header",
        bytes(1000),
        b"\xff" * 1000,
        header_of([]),
        header_of(7),
        header_of({}),
        header_of({"a": 1}),
        header_of({"a": {"data_offsets": 3}}),
        header_of({"a": {"data_offsets": [0, "x"]}}),
        header_of({"__metadata__": {"key": "x"}}),
    ],
)
def test_garbage_is_ignored(tiny, filled, tmp_path, content):
    file, _ = filled(tmp_path, 2)
    file.write_bytes(content)
    for message in ignored(tiny, tmp_path):
        assert message.startswith(f"{file.name} in the prefix cache is broken (")
        assert message.endswith("); it is ignored.")


def test_files_of_another_adapter_are_not_taken(tiny, tmp_path):
    """A folder's sessions are for one model: neither without its adapter nor with another one."""
    adapter, other = (tmp_path / name for name in ("adapter", "other"))
    for folder, weights in ((adapter, b"a" * 200_000), (other, b"a" * 100_000 + b"b" + b"a" * 99_999)):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(weights)
    engines = [tiny, replace(tiny, adapter=adapter), replace(tiny, adapter=other)]
    cache = PrefixCache(engines[1], PLENTY, tmp_path / "kept")
    run(engines[1], cache, tiny_request(some(0, 80)))
    assert not cache.save_one()
    assert len(PrefixCache(engines[1], PLENTY, tmp_path / "kept")) == 1
    copied = shutil.copytree(adapter, tmp_path / "copy")
    assert len(PrefixCache(replace(tiny, adapter=copied), PLENTY, tmp_path / "kept")) == 1
    for engine in (engines[0], engines[2]):
        shutil.copytree(tmp_path / "kept", tmp_path / "again", dirs_exist_ok=True)
        assert len(PrefixCache(engine, PLENTY, tmp_path / "again")) == 0


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("key", "another", None),
        ("cache_key", "[1, 2]", "its tokens and its keys differ in number"),
        ("cache_key", "5", "object of type 'int' has no len()"),
        ("offset", "many", "invalid literal for int() with base 10: 'many'"),
        ("mark", None, "'mark'"),
    ],
)
def test_files_that_say_something_else_are_ignored(tiny, filled, tmp_path, name, value, why):
    """Silently where it is another checkpoint's."""
    file, _ = filled(tmp_path, 2)
    arrays, about = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)
    file.unlink()
    mx.save_safetensors(str(file), arrays, {k: v for k, v in {**about, name: value}.items() if v is not None})
    expected = [f"{file.name} in the prefix cache is broken ({why}); it is ignored."] if why else []
    assert ignored(tiny, tmp_path) == expected


def test_a_file_without_an_array_is_ignored(tiny, filled, tmp_path):
    file, _ = filled(tmp_path, 2)
    arrays, about = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)
    del arrays["1.values"]
    file.unlink()
    mx.save_safetensors(str(file), arrays, about)
    why = "'1.values'"
    assert ignored(tiny, tmp_path) == [f"{file.name} in the prefix cache is broken ({why}); it is ignored."]


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_another_checkpoint_takes_nothing(tiny, filled, tmp_path, changed):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy2(tiny.checkpoint.path / name, checkpoint / name)
    filled(tmp_path / "cache")
    other = tiny_engine(checkpoint)
    assert len(PrefixCache(other, PLENTY, tmp_path / "cache")) == 1  # where it lies does not matter
    with (checkpoint / changed).open("ab") as file:
        file.write(b" ")
    assert len(PrefixCache(other, PLENTY, tmp_path / "cache")) == 0
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_no_file_of_the_cache_is_left_alone(tiny, tmp_path):
    """Above all a checkpoint's weights, where the cache is put beside or into its folder."""
    checkpoint, other = tmp_path / "checkpoint", tmp_path / "other"
    shutil.copytree(tiny.checkpoint.path, checkpoint)
    engine = tiny_engine(checkpoint)
    assert refusal(OptionError, PrefixCache, engine, PLENTY, checkpoint) == (
        f"The cache folder {checkpoint} is the checkpoint's own; name another."
    )
    shutil.copytree(checkpoint, other)
    (other / "x.part.safetensors").write_bytes(b"a")
    before = sorted(file.name for file in other.iterdir())
    assert len(PrefixCache(engine, PLENTY, other)) == 0
    assert sorted(file.name for file in other.iterdir()) == before


def test_the_folder_is_its_owners_alone(tiny, tmp_path):
    """Its files hold prompts."""
    PrefixCache(tiny, PLENTY, tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_weights_written_anew_are_another_checkpoint(tiny, tmp_path):
    """Tuned weights can have the size, the beginning and the end of those before."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint.path, checkpoint)
    engine, file = tiny_engine(checkpoint), checkpoint / "model.safetensors"
    before, held = fingerprint(engine), bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)
    assert fingerprint(engine) != before


def test_what_was_being_written_when_a_process_ended_is_removed(tiny, filled, tmp_path):
    file, _ = filled(tmp_path, 2)
    file.rename(tmp_path / f"{file.stem}.part.safetensors")
    assert ignored(tiny, tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        assert refusal(OptionError, PrefixCache, tiny, PLENTY, folder) == (
            f"The cache folder {folder} cannot be used ({why}); name another."
        )


def test_a_folder_that_goes_away_is_told_once_and_memory_serves_on(tiny, tmp_path):
    folder = tmp_path / "cache"
    cache = PrefixCache(tiny, PLENTY, folder)
    ask(tiny, cache, some(0, 80))
    folder.rmdir()
    with pytest.warns(UserWarning, match=r"^The prefix cache cannot be written \(.+\); it stays in memory\.$"):
        assert not cache.save_one()
    assert [ask(tiny, cache, some(n, 80))[0] for n in (0, 1)] == [80, 0]
    assert not cache.save_one()
