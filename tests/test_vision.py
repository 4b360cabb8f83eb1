"""Pictures and video from a file to an answer: the tower, the prompt, prefill in chunks, sessions, batches."""

import base64
import io
import itertools
import json
import re
from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from PIL import Image, ImageDraw
from support import DATA, engine_of, gap, reference, small_config, small_model

import mlx_dgemma
from mlx_dgemma import cli
from mlx_dgemma.checkpoint import DEMO, Checkpoint, build
from mlx_dgemma.errors import CheckpointError, OptionError, PromptError
from mlx_dgemma.generate import chunks, prefill
from mlx_dgemma.images import digest, open_image, patchify
from mlx_dgemma.model import DiffusionGemma
from mlx_dgemma.prompt import messages_of
from mlx_dgemma.vision import VisionTower

BOUND = 1e-4
RED, BLUE, GREEN = (220, 40, 40), (50, 80, 220), (40, 170, 60)
COLOR = "What color is the shape?"
FEW = {"max_denoising_steps": 2, "max_tokens": 64}  # one block, settled or not
TOWER = "model.encoder.vision_tower"
NO_TOWER = "This checkpoint has no vision tower, so it cannot look at pictures; send text alone."


@pytest.fixture(scope="module")
def engine():
    return engine_of(DEMO)


def square(color, x=80, y=80, half=26, size=(160, 160)):
    picture = Image.new("RGB", size, (250, 250, 250))
    ImageDraw.Draw(picture).rectangle((x - half, y - half, x + half, y + half), fill=color)
    return picture


def strip(color, x=40):
    """35 soft tokens, half as many as a square picture has: these tests are about which pictures are seen."""
    return square(color, x, 10, 9, (180, 10))


def encoded(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def data_url(picture):
    return "data:image/png;base64," + base64.b64encode(encoded(picture)).decode()


def image(source=None):
    return {"type": "image"} if source is None else {"type": "image", "image": source}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(words):
    return {"role": "assistant", "content": words}


def refusal(kind, call, *arguments, **options):
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    return str(caught.value)


def row_of(engine, prompt, images=(), video=None, **options):
    """A prompt as it goes into the loop; nothing is computed."""
    return engine._row(messages_of(prompt, None, images, video), 0, engine.options.override(**options), False, None)


def layout(engine, prompt, images=(), video=None, **options):
    """The user's turn as text and pictures in order, a picture as (digest and budget, soft tokens)."""
    row = row_of(engine, prompt, images, video, **options)
    found = []
    for is_text, run in itertools.groupby(row.held, lambda one: isinstance(one, int)):
        held = list(run)
        found.append(engine.tokenizer.decode(held) if is_text else (held[0], len(held)))
        assert is_text or len(set(held)) == 1
    assert sum(token == engine.config.image_token_id for token in row.tokens) == sum(n for _, n in found[1::2])
    found[0] = found[0].removeprefix("<bos><|turn>user\n")
    found[-1] = found[-1].removesuffix("<turn|>\n<|turn>model\n")
    return found


def seen(picture, budget=70):
    picture = open_image(picture)
    return f"{digest(picture)}/{budget}", patchify([picture], budget).tokens[0]


# The reference, from the PNG to the logits.

REFERENCES = {"image": (70, ["image_0"]), "two_images": (70, ["two_images_0", "two_images_1"])}
REFERENCES["wide_image"] = (140, ["image_0"])  # 120 soft tokens, the sliding window is 96


@lru_cache(maxsize=3)
def looked(name):
    """(paths, soft tokens) of a reference's pictures."""
    budget, files = REFERENCES[name]
    paths = [DATA / f"{file}.png" for file in files]
    joined = patchify([open_image(path) for path in paths], budget)
    return paths, engine_of(DEMO).model.look((joined.patches, joined.positions))


@pytest.mark.parametrize("name", ["image", "two_images"])
def test_features_of_the_committed_pictures_equal_transformers(name):
    assert gap(looked(name)[1], reference(name)["features"]) < BOUND


@pytest.mark.parametrize("name", REFERENCES)
def test_the_prompt_is_the_references(engine, name):
    paths, _ = looked(name)
    expected = reference(name)["input_ids"][0].tolist()
    question, budget = "Describe the image.", REFERENCES[name][0]
    assert row_of(engine, question, paths, image_tokens=budget).tokens == expected
    messages = [user(*map(image, paths), text(question))]
    assert row_of(engine, messages, image_tokens=budget).tokens == expected


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 2048])
@pytest.mark.parametrize("name", REFERENCES)
def test_logits_behind_a_picture_equal_transformers_for_every_chunk(engine, name, chunk):
    """A chunk of 64 ends in the second picture unless it is kept whole; `wide_image` is longer than the window."""
    held, prefix = reference(name), engine.model.new_prefix()
    prefill(engine.model, prefix, np.array(held["input_ids"]), chunk, features=[looked(name)[1]])
    got = engine.model.logits(engine.model.denoise(held["canvas"], prefix))[:, ::4]
    assert gap(got, held["logits"]) < BOUND


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.06), ("float16", 0.01)])
def test_half_precision_towers_are_near_the_reference(dtype, bound):
    held = reference("image")
    model = mlx_dgemma.load(DEMO, dtype=dtype).model
    features = model.look((held["pixel_values"], held["image_position_ids"]))
    assert features.dtype == getattr(mx, dtype)
    assert 0 < gap(features.astype(mx.float32), held["features"]) < bound


# Chunks.


def test_chunks_cover_all_columns_and_cut_no_run_of_any_row():
    random = np.random.default_rng(0)
    for _ in range(400):
        rows, length, size = random.integers(1, 4), random.integers(1, 40), int(random.integers(1, 20))
        flips = random.random((rows, length)) < random.choice([0.05, 0.2, 0.5])
        held = (np.cumsum(flips, axis=1) + random.integers(0, 2, (rows, 1))) % 2 == 1
        cuts = list(chunks(held, size))
        assert [start for start, _ in cuts] == [0, *(end for _, end in cuts[:-1])]
        assert cuts[-1][1] == length and all(start < end for start, end in cuts)
        joined = [0, *(held[:, 1:] & held[:, :-1]).any(axis=0)]  # this column and the one before are one picture
        for start, end in cuts:
            assert end == length or not joined[end]
            if end - start > size:  # only where every border but the last would cut, and no further than needed
                assert all(joined[start + 1 : end])
            elif end < length:  # as long as it may be
                assert all(joined[end + 1 : start + size + 1])


@pytest.mark.parametrize(("length", "size"), [(1, 1), (10, 3), (12, 4), (5, 100)])
def test_chunks_without_pictures_are_plain(length, size):
    plain = [(start, min(start + size, length)) for start in range(0, length, size)]
    assert list(chunks(np.zeros((2, length), bool), size)) == plain


# The tower against Transformers, with the switches that the demo does not have.


@lru_cache(maxsize=2)
def tower(name):
    """(vision_config, tensors of a checkpoint, inputs and outputs)."""
    arrays, metadata = mx.load(str(DATA / "towers.safetensors"), return_metadata=True)
    own = {key.removeprefix(f"{name}/"): one for key, one in arrays.items() if key.startswith(f"{name}/")}
    weights = {key: one for key, one in own.items() if key.startswith("model.")}
    held = {key: one for key, one in own.items() if key not in weights}
    held["patches"] = held["patches"].astype(mx.float32) / 255
    return json.loads(metadata[name]), weights, held


def checkpoint(folder, vision, weights):
    """A checkpoint that sees: a random text stack, and the tower's tensors."""
    config = {**small_config(), "vision_config": vision, "image_token_id": 7}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(small_model().parameters())) | weights)
    return Checkpoint.open(folder)


@lru_cache(maxsize=2)
def tower_model(name, folder):
    return build(checkpoint(folder, *tower(name)[:2]))


@pytest.fixture(params=["clipped", "plain"])
def small(request, tmp_path_factory):
    """(model, inputs and outputs): three pictures of differing sizes, padded to the longest."""
    held = tower(request.param)[2]
    return tower_model(request.param, tmp_path_factory.getbasetemp()), held


def test_a_tower_of_either_kind_equals_transformers(small):
    """Clipped linears, fewer key heads and no standardization; or bounds that are stored and do not count."""
    model, held = small
    encoder = model.model.encoder
    features = encoder.vision_tower(held["patches"], held["positions"])
    assert gap(features, held["features"]) < BOUND
    assert gap(encoder.embed_vision(features), held["soft_tokens"]) < BOUND


def test_bounds_are_loaded_where_linears_clip_and_ignored_elsewhere(tmp_path):
    for name, clips in (("clipped", True), ("plain", False)):
        vision, weights, _ = tower(name)
        bound = f"{TOWER}.encoder.layers.1.mlp.up_proj.output_max"
        assert bound in weights
        parameters = dict(tree_flatten(build(checkpoint(tmp_path, vision, weights)).parameters()))
        assert (bound in parameters) is clips
        assert not clips or parameters[bound].item() == weights[bound].item()
        assert (f"{TOWER}.std_bias" in parameters) is not clips


@pytest.mark.parametrize(
    ("name", "lost"),
    [("clipped", f"{TOWER}.encoder.layers.0.self_attn.q_proj.input_min"), ("plain", f"{TOWER}.std_scale")],
)
def test_a_tower_that_lacks_a_tensor_is_refused(tmp_path, name, lost):
    vision, weights, _ = tower(name)
    held = checkpoint(tmp_path, vision, {key: one for key, one in weights.items() if key != lost})
    assert refusal(CheckpointError, build, held) == f"The checkpoint lacks {lost}; download it again."


def test_a_padded_batch_equals_each_picture_alone(small):
    model, held = small
    alone = []
    for patches, positions in zip(held["patches"], held["positions"]):
        real = int((positions[:, 0] >= 0).sum().item())
        alone.append(model.look((patches[None, :real], positions[None, :real])))
    together = model.look((held["patches"], held["positions"]))
    assert len({len(one) for one in alone}) > 1
    assert gap(together, mx.concatenate(alone)) < 1e-5
    junk = mx.where((held["positions"] < 0)[..., :1], 0.9, held["patches"])
    assert gap(model.look((junk, held["positions"])), together) < 1e-5  # what lies in the padding does not matter


def test_groups_and_chunks_of_queries_change_nothing(small, monkeypatch):
    model, held = small
    many = tuple(mx.concatenate([held[name], held[name][:2]]) for name in ("patches", "positions"))
    whole, sizes, real = model.look(many), [], VisionTower.__call__

    def spied(self, patches, positions):
        sizes.append(len(patches))
        return real(self, patches, positions)

    monkeypatch.setattr(VisionTower, "__call__", spied)
    for limit, groups in ((1, [1] * 5), (2 * many[0].shape[1], [2, 2, 1]), (10**6, [5])):
        monkeypatch.setattr("mlx_dgemma.model.LOOK_PATCHES", limit)
        for rows in (1, 7, 10**6):
            monkeypatch.setattr("mlx_dgemma.vision.ROWS", rows)
            sizes.clear()
            assert gap(model.look(many), whole) < 1e-5
            assert sizes == groups


def peak(model, patches):
    """Bytes that looking takes beside what is held already."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.look(patches))
    return mx.get_peak_memory() - before


def test_memory_does_not_grow_with_the_number_of_pictures(engine, monkeypatch):
    one = patchify([strip(RED)], 70)
    few, many = (tuple(mx.repeat(mx.array(a), n, axis=0) for a in (one.patches, one.positions)) for n in (2, 10))
    mx.eval(few, many)
    monkeypatch.setattr("mlx_dgemma.model.LOOK_PATCHES", 2 * one.patches.shape[1])
    assert peak(engine.model, many) < 1.2 * peak(engine.model, few)
    monkeypatch.setattr("mlx_dgemma.model.LOOK_PATCHES", 10**6)
    assert peak(engine.model, many) > 3 * peak(engine.model, few)  # what is measured is real


def test_memory_does_not_grow_with_the_square_of_patches(engine, monkeypatch):
    held = patchify([square(RED)], 140)
    pictures = mx.array(held.patches), mx.array(held.positions)
    mx.eval(pictures)
    whole = peak(engine.model, pictures)
    monkeypatch.setattr("mlx_dgemma.vision.ROWS", 128)
    assert peak(engine.model, pictures) < 0.6 * whole


# Sessions.


def ask(engine, session, messages, **options):
    """A turn, and that the answer is the one without the session."""
    options = {**FEW, "seed": 0, **options}
    kept = engine.generate(messages, session=session, **options)
    alone = engine.generate(messages, **options)
    assert kept.tokens == alone.tokens
    assert alone.stats.reused_tokens == 0
    assert kept.stats.images == alone.stats.images
    return kept


def test_ten_turns_about_one_picture_look_at_it_once(engine):
    session, messages, turns = engine.session(), [user(image(strip(RED)), text(COLOR))], []
    for number in range(10):
        turns.append(ask(engine, session, messages, max_denoising_steps=1).stats)
        messages += [assistant("Red."), user(text(f"{number}?"))]
    assert [stats.images for stats in turns] == [1] * 10
    assert [stats.images_encoded for stats in turns] == [1] + [0] * 9
    assert all(stats.reused_tokens > 40 for stats in turns[1:])


def test_a_second_picture_is_looked_at_when_it_comes(engine):
    session, messages, turns = engine.session(), [user(image(strip(RED)), text(COLOR))], []
    for part in ([], [image(encoded(strip(BLUE)))], [], [image(strip(RED))], []):
        turns.append(ask(engine, session, messages).stats)
        messages += [assistant("Yes."), user(*part, text("And now?"))]
    assert [(stats.images, stats.images_encoded) for stats in turns] == [(1, 1), (1, 0), (2, 1), (2, 0), (3, 0)]


@pytest.mark.parametrize("with_session", [True, False])
def test_the_same_picture_twice_is_looked_at_once(engine, with_session):
    """Also when the sources differ; each place shows it all the same."""
    session = engine.session() if with_session else None
    parts = image(strip(RED)), text("and"), image(encoded(strip(RED))), text("and"), image(strip(BLUE)), text(COLOR)
    stats = ask(engine, session, [user(*parts)]).stats
    assert (stats.images, stats.images_encoded) == (3, 2)


def test_another_picture_at_the_same_place_is_not_taken_for_the_first(engine):
    session = engine.session()
    answers = [ask(engine, session, [user(image(square(color, half=35)), text(COLOR))]) for color in (RED, BLUE, RED)]
    assert [one.text for one in answers] == ["The square is red.", "The square is blue.", "The square is red."]
    assert [one.stats.images_encoded for one in answers] == [1, 1, 0]
    assert {one.stats.reused_tokens for one in answers[1:]} == {len("<bos> <|turn> user \n <|image>".split(" "))}


def test_another_budget_is_another_picture(engine):
    session, messages = engine.session(), [user(image(strip(RED)), text(COLOR))]
    turns = [ask(engine, session, messages, image_tokens=budget).stats for budget in (70, 140, 70)]
    assert [stats.images_encoded for stats in turns] == [1, 1, 0]
    assert turns[1].prompt_tokens > turns[0].prompt_tokens == turns[2].prompt_tokens
    assert ask(engine, session, messages).stats.reused_tokens == turns[0].prompt_tokens  # 70 is the demo's own


def test_a_video_is_looked_at_once(engine):
    frames = [strip(RED, 40), strip(RED, 140)]
    session, messages = engine.session(), [user({"type": "video", "video": frames}, text("What happens?"))]
    first = ask(engine, session, messages).stats
    second = ask(engine, session, [*messages, assistant("It moves."), user(image(frames[1]), text(COLOR))]).stats
    assert (first.images, first.images_encoded, second.images, second.images_encoded) == (2, 2, 3, 0)


# Messages.


def test_a_part_may_carry_any_kind_of_source(engine, tmp_path):
    picture = strip(RED)
    path = tmp_path / "red.png"
    picture.save(path)
    sources = picture, path, str(path), encoded(picture), data_url(picture), np.asarray(picture)
    for part in (
        *map(image, sources),
        {"type": "image_url", "image_url": {"url": data_url(picture), "detail": "low"}},
        {"type": "image_url", "image_url": data_url(picture)},
    ):
        assert layout(engine, [user(part, text(COLOR))]) == ["<|image>", seen(picture), f"<image|>{COLOR}"]
    for source in sources:
        assert layout(engine, COLOR, [source]) == ["<|image>", seen(picture), f"<image|>{COLOR}"]


def test_pictures_video_and_text_keep_their_order(engine):
    """Parts without a source take `images` in order, past those that carry their own."""
    one, two, three, four = (strip(RED, x) for x in (20, 60, 100, 140))
    frames = [strip(BLUE, 20), strip(BLUE, 90), strip(BLUE, 160)]
    messages = [
        user(text("First"), image(), text("then"), {"type": "video"}, text("and"), image(two)),
        assistant("Fine."),
        user(image(), {"type": "image_url", "image_url": {"url": data_url(four)}}, text("What else?")),
    ]
    assert layout(engine, messages, [one, three], frames) == [
        "First<|image>",
        seen(one),
        "<image|>then00:00 <|image>",
        seen(frames[0]),
        "<image|> 00:01 <|image>",
        seen(frames[1]),
        "<image|> 00:02 <|image>",
        seen(frames[2]),
        "<image|>and<|image>",
        seen(two),
        "<image|><turn|>\n<|turn>model\nFine.<turn|>\n<|turn>user\n<|image>",
        seen(three),
        "<image|><|image>",
        seen(four),
        "<image|>What else?",
    ]
    assert "image" not in messages[0]["content"][1]  # the caller's messages stay as they are


def test_pictures_and_video_stand_before_a_text_prompt(engine):
    got = layout(engine, "Hi", [strip(RED), strip(BLUE)], [strip(GREEN)])
    red, blue, green = (seen(strip(color)) for color in (RED, BLUE, GREEN))
    assert got == ["<|image>", red, "<image|><|image>", blue, "<image|>00:00 <|image>", green, "<image|>Hi"]


def test_a_picture_takes_its_budget_and_a_frame_the_videos(engine):
    picture = square(RED)
    got = layout(engine, "Hi", [picture], [picture] * 4, image_tokens=140, max_frames=2, fps=0.5)
    assert (got[1], got[3], got[5]) == (seen(picture, 140), seen(picture), seen(picture))
    assert (got[1][1], got[3][1]) == (121, 64)
    assert (got[2], got[4]) == ("<image|>00:00 <|image>", "<image|> 00:04 <|image>")


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(("placeholders", "given"), [(2, 1), (0, 1), (1, 0), (3, 0)])
def test_placeholders_and_sources_must_agree(engine, kind, placeholders, given):
    messages = [user(*[{"type": kind}] * placeholders, text("Hi"))]
    sources = {"images": [strip(RED)] * given} if kind == "image" else {"video": [strip(RED)] if given else None}
    assert refusal(PromptError, engine.generate, messages, **sources) == (
        f"The messages have {placeholders} {kind} placeholders without a source, and {given} {kind}s are given; "
        "they must agree."
    )


@pytest.mark.parametrize("marker", ["<|image|>", "<|video|>"])
def test_a_marker_in_a_users_text_is_no_picture(engine, marker):
    told = "The prompt has {} {} placeholders, but {} sources are given for them; they must agree."
    assert refusal(PromptError, engine.generate, f"What is {marker}?") == told.format(1, marker, 0)
    assert refusal(PromptError, engine.generate, [user(text(marker[:5]), text(marker[5:]))]) == told.format(
        1, marker, 0
    )
    sources = {"images": [strip(RED)]} if marker == "<|image|>" else {"video": [strip(RED)]}
    assert refusal(PromptError, engine.generate, f"What is {marker}?", **sources) == told.format(2, marker, 1)
    assert refusal(PromptError, engine.generate, "Hi", system=marker) == told.format(1, marker, 0)


@pytest.mark.parametrize("kind", ["audio", "input_audio"])
def test_audio_is_refused(engine, kind):
    part = {"type": kind, kind: {"data": "", "format": "wav"}}
    assert refusal(PromptError, engine.generate, [user(part, text("Hi"))]) == (
        "Message 0 has audio, which is not a modality of DiffusionGemma; transcribe it first and send the text."
    )


def test_a_web_address_is_refused(engine):
    url = "https://example.com/cat.png"
    told = f"{url} is a web address, and nothing is fetched; download it and give the file."
    part = {"type": "image_url", "image_url": {"url": url}}
    assert refusal(PromptError, engine.generate, [user(part, text("Hi"))]) == told
    assert refusal(PromptError, engine.generate, "Hi", images=[url]) == told
    assert refusal(PromptError, engine.generate, "Hi", video=url) == told


@pytest.mark.parametrize("given", ["cat.png", b"cat", strip(RED), None])
def test_images_are_a_list(engine, given):
    assert refusal(PromptError, engine.generate, "Hi", images=given) == (
        f"images is of type {type(given).__name__}; give a list of pictures."
    )


def test_a_text_only_checkpoint_refuses_pictures(engine):
    blind = replace(engine, model=small_model())
    assert refusal(PromptError, blind.generate, "Hi", images=[strip(RED)]) == NO_TOWER
    assert refusal(PromptError, blind.generate, "Hi", video=[strip(RED)]) == NO_TOWER


def test_an_unknown_budget_is_refused(engine):
    assert refusal(OptionError, engine.generate, "Hi", images=[strip(RED)], image_tokens=100) == (
        "The image budget is 100; it should be one of 70, 140, 280, 560, 1120."
    )


def test_a_broken_picture_is_told_before_anything_is_computed(engine, monkeypatch):
    for name in ("look", "encode", "denoise"):
        monkeypatch.setattr(DiffusionGemma, name, lambda *_, **__: pytest.fail("the model ran"))
    whole = encoded(square(RED))
    broken = whole[: len(whole) // 2]
    told = rf"^The file of {len(broken)} bytes is cut short or damaged \(.+\)\.$"
    messages = [user(image(strip(BLUE)), image(broken), text(COLOR))]
    assert re.match(told, refusal(PromptError, engine.stream, COLOR, images=[strip(BLUE), broken]))
    assert re.match(told, refusal(PromptError, engine.stream, "Hi", video=[strip(BLUE), broken]))
    assert re.match(told, refusal(PromptError, engine.generate, messages, session=engine.session()))
    assert re.match(told, refusal(PromptError, engine.generate_batch, ["Hi", messages]))


# Batches.


@pytest.mark.parametrize("chunk", [2048, 40])
def test_a_batch_with_pictures_is_each_prompt_alone(engine, chunk):
    """Rows with no, one, two and repeated pictures, padded on the left, in one chunk and in several."""
    prompts = [
        [user(image(strip(RED)), text(COLOR))],
        "Spell the word cat.",
        [user(image(strip(BLUE)), text("and"), image(strip(GREEN)), text("Describe the image."))],
        [user(text(COLOR), {"type": "video", "video": [strip(RED), strip(GREEN)]})],
    ]
    options = {"prefill_chunk": chunk, **FEW}
    together = engine.generate_batch(prompts, seeds=[3, 4, 5, 6], **options)
    for prompt, seed, one in zip(prompts, (3, 4, 5, 6), together):
        alone = engine.generate(prompt, seed=seed, **options)
        assert one.tokens == alone.tokens
        assert (one.stats.images, one.stats.prompt_tokens) == (alone.stats.images, alone.stats.prompt_tokens)
        assert one.stats.images_encoded == alone.stats.images_encoded
    assert [one.stats.images for one in together] == [1, 0, 2, 2]


# The command line.


def invoke(*arguments, data=b""):
    return CliRunner().invoke(cli.main, ["generate", *map(str, arguments), "-m", str(DEMO), "--seed", "0"], input=data)


def run(*arguments, data=b""):
    done = invoke(*arguments, data=data)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture
def pictures(tmp_path):
    paths = tmp_path / "a.png", tmp_path / "b.jpg"
    square(RED, half=35).save(paths[0])
    square(BLUE, half=35).save(paths[1])
    return paths


@pytest.mark.parametrize(("direction", "places"), [("right", (40, 80, 120)), ("left", (120, 80, 40))])
def test_a_video_file_is_watched(tmp_path, direction, places):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 160, 160, "yuv420p", 4_000_000
        for x in places:
            for _ in range(4):
                container.mux(stream.encode(av.VideoFrame.from_image(square(RED, x))))
        container.mux(stream.encode())
    told = json.loads(run("--video", path, "What happens in the video?", "--json"))
    assert told["text"] == f"A red square moves {direction}."
    assert (told["stats"]["images"], told["stats"]["images_encoded"]) == (3, 3)


def test_several_pictures_on_the_command_line(engine, pictures):
    question, few = "Describe the image.", ("--max-denoising-steps", 2, "--max-tokens", 64)
    told = json.loads(run("--image", pictures[0], "--image", pictures[1], question, "--json", *few))
    same = engine.generate(question, images=list(pictures), seed=0, **FEW)
    assert (told["text"], told["stats"]["prompt_tokens"]) == (same.text, same.stats.prompt_tokens)
    assert (told["stats"]["images"], told["stats"]["images_encoded"]) == (2, 2)


def test_a_picture_from_stdin(pictures):
    data = pictures[1].read_bytes()
    assert run("--image", "-", COLOR, data=data) == "The square is blue.\n"
    for twice in (("--image", "-"), ("-f", "-")):
        done = invoke("--image", "-", *twice, COLOR, data=data)
        assert done.exit_code == 2
        assert done.stderr.splitlines()[-1] == "Error: - is given twice, but stdin can be read once."
    empty = invoke("--image", "-", COLOR)
    assert (empty.exit_code, empty.stderr) == (1, "Error: The file of 0 bytes is empty.\n")
