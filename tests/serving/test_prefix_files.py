"""The prefix cache's folder: what a restart brings back, and which files are ignored."""

import json
import os
import shutil
import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from kills import instants
from loop import tiny_engine, tiny_request
from prefixes import ONCE, PLENTY, ask, run, same, some
from support import RED, refusal, strip

from mlx_dgemma.checkpoint.float16 import compute_in_float16
from mlx_dgemma.errors import OptionError
from mlx_dgemma.serving.prefix_cache import PrefixCache
from mlx_dgemma.serving.prefix_store import LOCK, OWNER, PrefixStore, fingerprint


def files_in(folder):
    """The cache's files in the subfolders of all models."""
    return sorted(folder.glob("*/*.safetensors"))


@pytest.fixture(scope="module")
def filled(tiny, tmp_path_factory):
    """Makes a folder as a process that answered so many prompts left it, and tells its files, the oldest first."""
    left = tmp_path_factory.mktemp("left")
    cache, names = PrefixCache(tiny, PLENTY, left), []
    for n in range(3):
        ask(tiny, cache, some(n, 80), blocks=3)
        assert not cache.save_one()
        names += [path for path in files_in(left) if path not in names]

    def fill(folder, prompts=1):
        made = [folder / path.relative_to(left) for path in names[:prompts]]
        made[0].parent.mkdir(parents=True, exist_ok=True)
        for n, path in enumerate(made):
            shutil.copyfile(names[n], path)
            os.utime(path, (n, n))
        return made

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
    assert len(files_in(tmp_path)) == 3  # what exceeds this budget may fit another server's


def test_a_folder_keeps_what_was_used_last_within_its_budget(tiny, filled, tmp_path):
    first, second = filled(tmp_path, 2)
    size = PrefixCache(tiny, PLENTY, tmp_path).nbytes // 2
    cache = PrefixCache(tiny, 2 * size + 20_000, tmp_path)  # room for the headers of two files, not for a third
    assert cache.find(some(0, 80))[0] is not None
    ask(tiny, cache, some(2, 80), blocks=3)
    assert len(files_in(tmp_path)) == 2  # until the third is written
    assert not cache.save_one()
    assert (len(files_in(tmp_path)), first.exists(), second.exists()) == (2, True, False)


def test_servers_never_remove_each_others_files(tiny, filled, tmp_path):
    """Neither one of another dtype, nor one with a smaller budget, nor a second one of the same model."""
    PrefixCache(tiny, PLENTY, tmp_path)
    before = filled(tmp_path, 2)
    other = replace(tiny, adapter=tmp_path / "some" / "adapter")
    other.adapter.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other.adapter / name).write_text("{}")
    caches = [PrefixCache(tiny, PLENTY, tmp_path) for _ in range(2)]
    ask(tiny, caches[0], some(3, 80))
    assert not caches[0].save_one()
    for engine, budget in ((tiny, 1), (tiny, caches[0].nbytes // 2), (other, PLENTY)):
        late = PrefixCache(engine, budget, tmp_path)
        ask(engine, late, some(4 + budget % 7, 80))
        late.save_one()
    ask(tiny, caches[1], some(12, 80))
    assert not caches[1].save_one()
    assert all(path.exists() for path in before)
    assert len({path.parent for path in files_in(tmp_path)}) == 2
    assert len(PrefixCache(tiny, PLENTY, tmp_path)) == len(files_in(before[0].parent.parent)) - 1
    owner = json.loads((before[0].parent / OWNER).read_text())
    assert (owner["budget"], owner["model"], owner["dtype"]) == (
        PLENTY,
        str(tiny.checkpoint.path),
        str(tiny.model.dtype),
    )


def ignored(tiny, folder):
    """The warnings of a start with a file that is broken; that it is gone, and that the other one is taken."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = PrefixCache(tiny, PLENTY, folder)
    assert len(cache) == len(files_in(folder)) == 1
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
        ("cache_key", "[1, 2]", "its tokens and its keys differ in number"),
        ("cache_key", "5", "object of type 'int' has no len()"),
        ("offset", "many", "invalid literal for int() with base 10: 'many'"),
        ("mark", None, "'mark'"),
    ],
)
def test_files_that_say_something_else_are_ignored(tiny, filled, tmp_path, name, value, why):
    file, _ = filled(tmp_path, 2)
    arrays, about = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)
    file.unlink()
    mx.save_safetensors(str(file), arrays, {k: v for k, v in {**about, name: value}.items() if v is not None})
    assert ignored(tiny, tmp_path) == [f"{file.name} in the prefix cache is broken ({why}); it is ignored."]


def test_a_file_of_another_model_is_neither_taken_nor_removed(tiny, filled, tmp_path):
    (file,) = filled(tmp_path)
    file.write_bytes(file.read_bytes().replace(fingerprint(tiny).encode(), b"0" * 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(PrefixCache(tiny, PLENTY, tmp_path)) == 0
    assert file.exists()


def test_what_nobody_uses_any_more_goes(tiny, filled, tmp_path):
    """The subfolder of another model, unless a server holds it or it was used of late."""
    filled(tmp_path)
    (own,) = tmp_path.iterdir()
    (own / OWNER).write_text("{}")
    os.utime(own / OWNER, (0, 0))
    server = PrefixStore(tmp_path, tiny, PLENTY)
    held, old, late, strange = (tmp_path / (letter * 32) for letter in "abcd")
    for other in (held, old, late, strange):
        shutil.copytree(own, other)
    (late / OWNER).touch()
    (strange / "notes.txt").touch()
    (tmp_path / "notes").mkdir()
    server._folder = held  # as if of another model
    (own / LOCK).unlink()
    (held / LOCK).unlink()
    server._hold()
    assert len(PrefixCache(tiny, PLENTY, tmp_path)) == 1
    assert {one.name for one in tmp_path.iterdir()} == {one.name for one in (own, held, late, strange)} | {"notes"}
    assert [one.name for one in strange.iterdir()] == ["notes.txt"]
    del server
    PrefixCache(tiny, PLENTY, tmp_path)
    assert not held.exists()


def test_a_file_that_another_server_removes_meanwhile_is_no_matter(tiny, filled, tmp_path, monkeypatch):
    file, _ = filled(tmp_path, 2)
    load = mx.load

    def late(path, **rest):
        if path == str(file):
            file.unlink()
        return load(path, **rest)

    monkeypatch.setattr(mx, "load", late)
    assert ignored(tiny, tmp_path) == []


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
    assert len(files_in(tmp_path / "cache")) == 1


def test_what_is_no_file_of_the_cache_is_left_alone(tiny, tmp_path):
    """Above all a checkpoint's weights, where the cache is put beside or into its folder."""
    checkpoint, other = tmp_path / "checkpoint", tmp_path / "other"
    shutil.copytree(tiny.checkpoint.path, checkpoint)
    engine = tiny_engine(checkpoint)
    assert refusal(OptionError, PrefixCache, engine, PLENTY, checkpoint) == (
        f"The cache folder {checkpoint} is the checkpoint's own; name another."
    )
    shutil.copytree(checkpoint, other)
    before = {file: file.read_bytes() for file in other.iterdir()}
    assert len(PrefixCache(engine, PLENTY, other)) == 0
    assert {file: file.read_bytes() for file in other.iterdir() if file.is_file()} == before


def test_the_folder_is_its_owners_alone(tiny, tmp_path):
    """Its files hold prompts."""
    cache = PrefixCache(tiny, PLENTY, tmp_path / "cache")
    ask(tiny, cache, some(0, 80))
    assert not cache.save_one()
    (file,) = files_in(tmp_path / "cache")
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "cache", file.parent, file)] == [0o700, 0o700, 0o600]


def test_weights_written_anew_are_another_checkpoint(tiny, tmp_path):
    """Tuned weights can have the size, the beginning and the end of those before."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint.path, checkpoint)
    engine, file = tiny_engine(checkpoint), checkpoint / "model.safetensors"
    before, held = fingerprint(engine), bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)
    assert fingerprint(engine) != before


def test_products_in_float16_have_keys_of_their_own(tiny, tmp_path):
    shutil.copytree(tiny.checkpoint.path, tmp_path / "checkpoint")
    engine = tiny_engine(tmp_path / "checkpoint")
    before = fingerprint(engine)
    compute_in_float16(engine.model)
    assert fingerprint(engine) != before


def test_another_mlx_has_keys_of_its_own(tiny, monkeypatch):
    before = fingerprint(tiny)
    monkeypatch.setattr("mlx_dgemma.serving.prefix_store.version", lambda name: f"{name} of tomorrow")
    assert fingerprint(tiny) != before


def test_a_file_has_its_name_once_it_is_whole(tiny, tmp_path, monkeypatch):
    cache, save, seen = PrefixCache(tiny, PLENTY, tmp_path), mx.save_safetensors, []

    def saved(path, *rest):
        save(path, *rest)
        seen.append((path, sorted(one.name for one in tmp_path.glob("*/*"))))

    ask(tiny, cache, some(0, 80))
    monkeypatch.setattr(mx, "save_safetensors", saved)
    cache.save_one()
    ((path, during),) = seen
    (file,) = files_in(tmp_path)
    assert file.name not in during and str(file) != path


def test_the_file_of_a_beginning_goes_when_a_longer_one_holds_it(tiny, tmp_path):
    cache = PrefixCache(tiny, PLENTY, tmp_path)
    ask(tiny, cache, some(0, 80))
    cache.save_one()
    (before,) = files_in(tmp_path)
    ask(tiny, cache, some(0, 80), blocks=3)
    assert before.exists()  # until the longer one is there
    while cache.save_one():
        pass
    assert len(cache) == len(files_in(tmp_path)) == 1
    assert not before.exists()


def test_a_kill_while_files_are_written_loses_none_that_was_there(tiny, tmp_path):
    place = tmp_path / "place"
    cache = PrefixCache(tiny, PLENTY, place)
    ask(tiny, cache, some(0, 80))
    cache.save_one()

    def work():
        ask(tiny, cache, some(0, 80), blocks=3)
        assert not cache.save_one()

    left = instants(place, tmp_path / "seen", work)
    for folder in left:
        again = PrefixCache(tiny, PLENTY, folder)
        assert ask(tiny, again, some(0, 80))[0] == 80
        while again.save_one():
            pass
        assert {path.suffix for path in folder.glob("*/*") if path.name != LOCK} == {".safetensors", ".json"}
        assert not list(folder.glob("*/.*"))
    assert len(left) > 3


def test_a_folder_that_cannot_be_made_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        assert refusal(OptionError, PrefixCache, tiny, PLENTY, folder) == (
            f"The cache folder {folder} cannot be used ({why}); name another."
        )


def test_a_folder_that_cannot_be_written_is_told_once_and_tried_again(tiny, tmp_path):
    folder = tmp_path / "cache"
    cache = PrefixCache(tiny, PLENTY, folder)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    ask(tiny, cache, some(0, 80))
    with pytest.warns(UserWarning, match=r"^The prefix cache stays in memory for now: .* cannot be written \(.+\);"):
        assert not cache.save_one()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [ask(tiny, cache, some(n, 80))[0] for n in (0, 1)] == [80, 0]
        assert not cache.save_one()
        folder.unlink()
        assert not cache.save_one()
        assert ask(tiny, cache, some(2, 80))[0] == 0
        while cache.save_one():
            pass
    assert len(files_in(folder)) == 3


def test_quantized_prefixes_have_small_files_of_their_own(engine, tmp_path, monkeypatch):
    """No server reads prefixes of other bits; its own come back as they were."""
    prompt, sizes, folders = "What color is a frog? " * 40, [], set()
    for bits in (None, 8, 4):
        monkeypatch.setattr(engine.model, "kv_bits", bits)
        cache = PrefixCache(engine, PLENTY, tmp_path)
        assert len(cache) == 0
        first = same(engine, cache, prompt, **ONCE)
        assert not cache.save_one()
        again = same(engine, PrefixCache(engine, PLENTY, tmp_path), prompt, **ONCE)
        assert again.stats.reused_tokens == first.stats.prompt_tokens
        (file,) = [path for path in files_in(tmp_path) if path.parent not in folders]
        folders.add(file.parent)
        held = mx.load(str(file))
        sizes.append(sum(array.nbytes for name, array in held.items() if name.startswith("5.")))
    # Of 64 numbers, in float32: keys and values; codes, and a scale and a bias for 64 of them or for 32.
    assert [size / sizes[0] for size in sizes] == pytest.approx([1, (64 + 8) / 512, (32 + 16) / 512])
