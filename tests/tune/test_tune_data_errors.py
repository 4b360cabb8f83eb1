"""Training data: every line, message and sample that is refused."""

import json
import warnings

import pytest
from chats import CALL, assistant, image, templated, user
from support import engine_of, refusal

from mlx_dgemma.errors import DataError, OptionError
from mlx_dgemma.tune.data import load, read


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


@pytest.fixture
def write(tmp_path):
    """A function that writes records, or raw lines, to a file and returns its path."""

    def writer(*records, name="train.jsonl"):
        lines = [one if isinstance(one, (str, bytes)) else json.dumps(one) for one in records]
        (tmp_path / name).write_bytes(b"\n".join(one if isinstance(one, bytes) else one.encode() for one in lines))
        return tmp_path / name

    return writer


# Errors

HI = user("Hi")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text":"a" "b"}', "train.jsonl, line 3, column 13: This is not JSON (Expecting ',' delimiter); correct it."),
        (b'{"text": "\xff"}', "This is not UTF-8: byte 10 is 0xff; convert the file, for example with iconv."),
        (r'{"text": "\ud800"}', "This contains an unpaired surrogate; write whole characters."),
        ('["text"]', "This is of type list; it should be an object."),
        ({"question": "a"}, "This has none of messages and prompt/completion and text; it should have one of them."),
        ({"prompt": "a"}, "This has none of messages and prompt/completion and text; it should have one of them."),
        ({"text": "a", "messages": []}, "This has all of messages and text; it should have one of them."),
        ({"text": 1}, "text is of type int; it should be a string."),
        ({"text": " "}, "The text is empty; there is nothing to train on."),
        ({"text": "a<turn|>"}, "The text contains <turn|>, which ends an answer; remove it."),
        (
            {"text": "a", "thinking": True},
            "This is a plain text, which cannot have thinking, tools or images; write it as messages.",
        ),
        ({"prompt": 1, "completion": "a"}, "prompt is of type int; it should be a string."),
        ({"prompt": "a", "completion": ["b"]}, "completion is of type list; it should be a string."),
        ({"prompt": " ", "completion": "b"}, "The prompt is empty; say what you want."),
        ({"prompt": "a", "completion": " "}, "Message 1 is an empty answer; give it text or a tool call."),
        ({"prompt": "a", "completion": "b", "thinking": 1}, "thinking is 1; it should be true or false."),
        (
            {"prompt": "a", "completion": "b", "thinking": True, "enable_thinking": False},
            "thinking and enable_thinking contradict each other; leave one out.",
        ),
        (
            {"prompt": "a", "completion": "b", "tools": {}},
            "tools is of type dict; it should be a list of function declarations.",
        ),
        (
            {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]},
            'Tool 0 is not a function declaration; it should be {"type": "function", "function": {"name": ..., '
            '"parameters": {...}}}.',
        ),
        (
            {"prompt": "a", "completion": "b", "images": ["a.png", "b.png"], "messages": None, "text": None},
            "{folder}/a.png does not exist.",
        ),
    ],
)
def test_lines_that_are_refused(engine, write, line, message):
    path = write({"text": "fine"}, "", line)
    message = message.replace("{folder}", str(path.parent))
    assert refusal(DataError, read, engine, path) == (
        message if message.startswith("train") else f"train.jsonl, line 3: {message}"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "messages is 'Hi'; it should be a list of messages."),
        ([], "messages is []; it should be a list of messages."),
        (["Hi"], "Message 0 is of type str; it should be an object."),
        (
            [{"role": "bot", "content": "a"}],
            "Message 0 has the role 'bot'; it should be one of system, developer, user, assistant, tool.",
        ),
        ([HI, {"role": 1, "content": "a"}], "Message 1 has role of type int; it should be a string."),
        ([user(1)], "Message 0 has content of type int; it should be a string or a list of parts."),
        ([HI, assistant("a", tool_calls={})], "Message 1 has tool_calls of type dict; it should be a list."),
        ([HI, assistant("a", tool_calls=[1])], "Message 1 has a tool call that cannot be read: 1."),
        ([HI, assistant("a", weight=0)], "Message 1 has the key weight, which has no effect there; leave it out."),
        (
            [{**HI, "reasoning_content": "Hm."}],
            "Message 0 has the key reasoning_content, which has no effect there; leave it out.",
        ),
        (
            [HI, assistant("a", reasoning_content="Hm.")],
            'Message 1 has reasoning_content, but thinking is not switched on; add "thinking": true or remove '
            "reasoning_content.",
        ),
        (
            [assistant("a")],
            "Message 0 has the role assistant and is the first one; its role should be system, developer or user.",
        ),
        ([HI, HI, assistant("a")], "Message 1 has the role user and follows user; its role should be assistant."),
        (
            [HI, assistant("a"), assistant("b")],
            "Message 2 has the role assistant and follows assistant; its role should be user.",
        ),
        (
            [HI, {"role": "system", "content": "a"}],
            "Message 1 has the role system and follows user; its role should be assistant.",
        ),
        (
            [{"role": "system", "content": "a"}, assistant("a")],
            "Message 1 has the role assistant and follows system; its role should be user.",
        ),
        (
            [HI, {"role": "tool", "content": "a", "name": "f"}, assistant("b")],
            "Message 1 has the role tool and follows user; its role should be assistant.",
        ),
        (
            [HI, assistant("", tool_calls=[CALL]), HI, assistant("a")],
            "Message 2 has the role user and follows a tool call; its role should be tool.",
        ),
        (
            [HI, assistant("", tool_calls=[CALL]), {"role": "tool", "content": "a"}, HI],
            "Message 2 does not belong to a tool call; give the call's id as tool_call_id.",
        ),
        (
            [HI, assistant("", tool_calls=[CALL]), {"role": "tool", "content": "a", "tool_call_id": "1"}, HI],
            "Message 3 has the role user and follows tool; its role should be tool or assistant.",
        ),
        ([HI], "The last message has the role user; it should be assistant, to be the answer."),
        (
            [HI, assistant("a"), HI],
            "The last message has the role user; it should be assistant, to be the answer.",
        ),
        ([HI, assistant("")], "Message 1 is an empty answer; give it text or a tool call."),
        ([HI, assistant(None)], "Message 1 is an empty answer; give it text or a tool call."),
        ([HI, assistant("a<turn|>b")], "Message 1 contains <turn|>, which ends an answer; remove it."),
        (
            [HI, assistant("<|channel>thought\nHm.<channel|>b")],
            "Message 1 contains <|channel>thought; give its thinking as reasoning_content.",
        ),
        (
            [HI, assistant([{"type": "image", "image": "a.png"}])],
            "Message 1 has an image, but the assistant can only answer with text; remove it.",
        ),
        (
            [user([{"type": "video", "video": "a.mp4"}]), assistant("a")],
            "Message 0 has a video, but videos are not supported here; give its frames as images.",
        ),
        (
            [user([{"type": "audio", "audio": "a.wav"}]), assistant("a")],
            "Message 0 has audio, which is not a modality of DiffusionGemma; transcribe it first and send the text.",
        ),
        ([user([image("none.png")]), assistant("a")], "{folder}/none.png does not exist."),
        (
            [user([{"type": "image", "image": 3}]), assistant("a")],
            "An image is of type int; give a path or a data: URL.",
        ),
        (
            [user([image("http://a.b/c.png")]), assistant("a")],
            "http://a.b/c.png is a web address, and nothing is fetched; download it and give the file.",
        ),
        (
            [user([{"type": "image"}]), assistant("a")],
            "The messages have 1 image placeholders without a source, and 0 images are given; they must agree.",
        ),
    ],
)
def test_messages_that_are_refused(engine, write, messages, message):
    path = write({"messages": messages})
    message = message.replace("{folder}", str(path.parent))
    assert refusal(DataError, read, engine, path) == f"train.jsonl, line 1: {message}"


def test_files_without_samples(engine, write):
    for lines in ([], ["", " "]):
        assert refusal(DataError, read, engine, write(*lines)) == (
            "train.jsonl contains no samples; write one JSON object per line."
        )


def test_deep_nesting_is_refused(engine, write):
    message = refusal(DataError, read, engine, write("[" * 100_000))
    assert message.startswith("train.jsonl, line 1: This cannot be read (")
    assert message.endswith("); correct it.")


def test_templates_that_do_not_fit_are_refused(engine, write):
    path = write({"prompt": "Hi", "completion": "Hello!"})
    for template, message in (
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<turn|>{% endfor %}",
            "Message 1 cannot be separated from its prompt, because the chat template writes the prompt differently "
            "before an answer; use another template.",
        ),
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            "The chat template does not end message 1 with one of <eos>, <turn|>, <|tool_response>; "
            "use another template.",
        ),
        ("{{ raise_exception('No.') }}", "The chat template refuses these messages: No."),
    ):
        assert refusal(DataError, read, templated(engine, template), path) == f"train.jsonl, line 1: {message}"


def test_a_tool_call_without_an_end_marker_is_refused(engine, write):
    template = "{% for m in messages if m.role != 'tool' %}{{ m.content or 'call' }}{% endfor %}"
    path = write({"messages": [HI, assistant("", tool_calls=[CALL])]})
    assert refusal(DataError, read, templated(engine, template), path) == (
        "train.jsonl, line 1: The chat template does not end message 1 with one of <eos>, <turn|>, "
        "<|tool_response>; use another template."
    )


# Length


def test_long_samples_are_refused_or_left_out(engine, write):
    """Answers are rounded up to whole canvases, which have 64 tokens in the demo."""
    path = write(
        {"prompt": "Hi", "completion": "Hello!"},
        {"messages": [HI, assistant("cat " * 63), HI, assistant("cat " * 64)]},
    )
    lengths = [len(one.prompt) for example in read(engine, path, turns="all") for one in example.targets]
    total = lengths[2] + 128
    assert len(read(engine, path, turns="all", max_length=total)) == 2
    message = (
        f"This has {total} tokens, {lengths[2]} of the prompt and 128 of the answer in whole canvases, "
        f"but max_length is {total - 1}; shorten it or leave it out."
    )
    assert refusal(DataError, read, engine, path, max_length=total - 1) == f"train.jsonl, line 2: {message}"
    with pytest.warns(UserWarning) as caught:
        kept = read(engine, path, max_length=total - 1, skip_long=True)
    assert [example.where for example in kept] == ["train.jsonl, line 1"]
    assert [str(one.message) for one in caught] == ["train.jsonl: 1 of 2 samples are too long and were left out."]
    assert refusal(DataError, read, engine, path, max_length=64, skip_long=True) == (
        "All 2 samples of train.jsonl are too long; shorten them."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(engine, path, skip_long=True)["train"]) == 2


def test_the_context_length_is_a_limit_too(engine, write):
    size, room = engine.config.canvas_length, engine.config.text.max_position_embeddings
    words = (room - 1) // size * size - 1  # with eos the last canvas that there is room for behind bos
    assert len(engine.tokenizer.encode(" cat" * words, add_special_tokens=False)) == words
    assert len(read(engine, write({"text": " cat" * words}), max_length=2 * room)) == 1
    assert refusal(DataError, read, engine, write({"text": " cat" * (words + 1)}), max_length=2 * room) == (
        f"train.jsonl, line 1: This has {1 + room} tokens, 1 of the prompt and {room} of the answer in whole canvases, "
        f"but the context length is {room}; shorten it or leave it out."
    )


def test_options_outside_their_bounds(engine, write):
    path = write({"text": "a"})
    assert refusal(OptionError, read, engine, path, turns="first") == "turns is 'first'; it should be one of last, all."
    for value in (0, -1, 1.5, True, "8"):
        assert refusal(OptionError, read, engine, path, max_length=value) == (
            f"max_length is {value!r}; it should be a whole number, at least 1."
        )
