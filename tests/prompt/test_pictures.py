"""Pictures and video from their sources to an answer: messages, sessions, batches, the command line."""

import base64
import io
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from support import BLUE, GREEN, RED, engine_of, prompt_of, refusal, small_model, square, strip

from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli import main
from mlx_dgemma.errors import OptionError, PromptError
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.prompt.images import digest, open_image, patchify

COLOR = "What color is the shape?"
FEW = {"max_denoising_steps": 1, "max_tokens": 64}  # one block, settled or not
NO_TOWER = "This checkpoint has no vision tower, so it cannot look at pictures; send text alone."


@pytest.fixture(scope="module")
def engine():
    return engine_of(DEMO)


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


def layout(engine, prompt, images=(), video=None, **options):
    """The user's turn as text and pictures in order, a picture as (digest and budget, soft tokens)."""
    row = prompt_of(engine, prompt, images, video, **options)
    found = []
    for is_text, run in itertools.groupby(row.cache_key, lambda one: isinstance(one, int)):
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


def test_many_turns_about_one_picture_look_at_it_once(engine):
    session, messages, turns = engine.session(), [user(image(strip(RED)), text(COLOR))], []
    for number in range(5):
        turns.append(ask(engine, session, messages).stats)
        messages += [assistant("Red."), user(text(f"{number}?"))]
    assert [stats.images for stats in turns] == [1] * 5
    assert [stats.images_encoded for stats in turns] == [1] + [0] * 4
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
    assert [one.stats.images_encoded for one in answers[:2]] == [1, 1]
    assert {one.stats.reused_tokens for one in answers[1:]} == {5}  # <bos> <|turn> user \n <|image>


def test_another_budget_is_another_picture(engine):
    session, messages = engine.session(), [user(image(strip(RED)), text(COLOR))]
    turns = [ask(engine, session, messages, image_tokens=budget).stats for budget in (70, 140, 70)]
    assert [stats.images_encoded for stats in turns[:2]] == [1, 1]
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
    tokens = set(engine.tokenizer.convert_tokens_to_ids(["<|image|>", "<|video|>"]))
    split = [user(text(marker[:5]), text(marker[5:]))]
    thirds = [user(text(marker[:1] + " "), text(marker[1:4]), text(marker[4:]))]
    for prompt, options in ((f"What is {marker}?", {}), (split, {}), (thirds, {}), ("Hi", {"system": marker})):
        assert not tokens & set(prompt_of(engine, prompt, **options).tokens)
    sources = {"images": [strip(RED)]} if marker == "<|image|>" else {"video": [strip(RED)]}
    with_picture = prompt_of(engine, f"What is {marker}?", **sources)
    assert len(with_picture.pictures) == 1 and with_picture.tokens.count(18) == with_picture.pictures[0].tokens


@pytest.mark.parametrize("kind", ["audio", "input_audio"])
def test_audio_is_refused_where_nothing_transcribes_it(engine, kind):
    part = {"type": kind, kind: {"data": "", "format": "wav"}}
    said = {**user(part, text("Hi")), "role": "assistant"}
    assert refusal(PromptError, engine.choose, [user(text("Hi")), said, user(text("Hi"))], ["a", "b"]) == (
        "Message 1 has audio, which is not a modality of DiffusionGemma; transcribe it first and send the text."
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
    blind = replace(engine, model=small_model(layers=("full_attention",)))
    assert refusal(PromptError, blind.generate, "Hi", images=[strip(RED)]) == NO_TOWER
    assert refusal(PromptError, blind.generate, "Hi", video=[strip(RED)]) == NO_TOWER


def test_an_unknown_budget_is_refused(engine):
    assert refusal(OptionError, engine.generate, "Hi", images=[strip(RED)], image_tokens=100) == (
        "image_tokens is 100; it should be one of 70, 140, 280, 560, 1120."
    )


def test_a_broken_picture_is_told_before_anything_is_computed(engine, monkeypatch):
    for name in ("encode_images", "encode", "denoise"):
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
    assert [one.stats.images for one in together] == [1, 0, 2, 2]
    assert [one.stats.images_encoded for one in together] == [1, 0, 2, 0]  # the last row's stood in others


# The command line.


def invoke(*arguments, data=b""):
    return CliRunner().invoke(
        main.main, ["generate", *map(str, arguments), "-m", str(DEMO), "--seed", "0", "--exact"], input=data
    )


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
