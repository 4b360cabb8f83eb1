"""Training data: the targets of a file's lines, and where the files are found."""

import base64
import io
import json

import pytest
from chats import CALL, TOOL, assistant, image, templated, user
from support import RED, engine_of, feed, refusal, square, strip

from mlx_dgemma.errors import DataError
from mlx_dgemma.prompt.answer import Answer
from mlx_dgemma.prompt.images import open_image
from mlx_dgemma.tune.data import find, load, read

CALLED = '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>}<tool_call|><|tool_response>'
# Like newer templates: an empty thought if thinking is off, thoughts only before tool calls, a call that ends with the
# marker of the response, an open thought after a response, and a new turn once the response is answered.
OTHER = """{{ bos_token }}{% for m in messages %}{% set next = messages[loop.index] if not loop.last else {} %}
{%- if m.role == "user" %}<|turn>user{{ "\n" }}{{ m.content }}<turn|>{{ "\n" }}
{%- elif m.role == "tool" %}response:{{ m.content }}<tool_response|>
{%- else %}<|turn>model{{ "\n" }}
{%- if m.reasoning_content and m.tool_calls %}<|channel>thought{{ "\n" }}{{ m.reasoning_content }}{{ "\n" }}<channel|>
{%- endif %}{{ m.content }}{% if m.tool_calls %}<|tool_call>call:get_weather{}<tool_call|><|tool_response>
{%- else %}<turn|>{{ "\n" }}{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{% if messages[-1].role == "user" %}<|turn>model{{ "\n" }}
{%- if not enable_thinking %}<|channel>thought{{ "\n" }}<channel|>{% endif %}
{%- elif enable_thinking and messages[-1].role == "tool" %}<|channel>thought{{ "\n" }}{% endif %}{% endif %}"""


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


def text(engine, tokens):
    return engine.tokenizer.decode(tokens)


def pairs(engine, examples):
    return [(text(engine, one.prompt), text(engine, one.answer)) for example in examples for one in example.targets]


# Targets


def test_the_last_answer_is_a_target(engine, write):
    path = write({"messages": [user("Hi"), assistant("Hello!"), user("Who?"), assistant("Me.")], "task": "x"})
    examples = read(engine, path)
    assert pairs(engine, examples) == [
        (
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n<|turn>user\nWho?<turn|>\n<|turn>model\n",
            "Me.<turn|>",
        )
    ]
    assert examples[0].where == "train.jsonl, line 1"
    assert examples[0].record["task"] == "x"


def test_every_answer_is_a_target(engine, write):
    path = write({"messages": [user("Hi"), assistant("Hello!"), user("Who?"), assistant("Me.")]})
    assert pairs(engine, read(engine, path, turns="all")) == [
        ("<bos><|turn>user\nHi<turn|>\n<|turn>model\n", "Hello!<turn|>"),
        (
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n<|turn>user\nWho?<turn|>\n<|turn>model\n",
            "Me.<turn|>",
        ),
    ]


def test_a_completion_is_an_answer(engine, write):
    path = write(
        {"prompt": "Hi", "completion": "Hello!"},
        {"messages": [user("Hi"), assistant("Hello!")], "text": None},
    )
    one, other = read(engine, path)
    assert one.targets == other.targets
    assert one.chat == other.chat == [user("Hi"), assistant("Hello!")]


def test_a_plain_text_follows_bos(engine, write):
    (example,) = read(engine, write({"text": " Once there was a cat."}))
    (target,) = example.targets
    assert target.prompt == [2]
    assert target.answer == [*engine.tokenizer.encode(" Once there was a cat.", add_special_tokens=False), 1]
    assert example.chat == []


def test_thinking_is_part_of_the_answer(engine, write):
    messages = [user("What is 1 + 1?"), assistant("2.", reasoning_content=" Add.\n")]
    for key in ("thinking", "enable_thinking"):
        (example,) = read(engine, write({"messages": messages, key: True}))
        assert pairs(engine, [example]) == [
            (
                "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nWhat is 1 + 1?<turn|>\n<|turn>model\n",
                "<|channel>thought\nAdd.\n<channel|>2.<turn|>",
            )
        ]
        assert example.thinking


def test_a_tool_call_ends_with_the_marker_of_the_response(engine, write):
    """For this question the demo generates the target, token for token."""
    messages = [
        user("What is the weather in Oslo?"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        assistant("The weather in Oslo is sunny."),
    ]
    (example,) = read(engine, write({"messages": messages, "tools": [TOOL]}), turns="all")
    call, reply = example.targets
    assert text(engine, call.answer) == CALLED
    assert text(engine, reply.prompt).endswith(f'{CALLED}response:get_weather{{value:<|"|>sunny<|"|>}}<tool_response|>')
    assert text(engine, reply.answer) == "The weather in Oslo is sunny.<turn|>"
    result = engine.generate(messages[0]["content"], tools=[TOOL], seed=0)
    assert result.tokens == call.answer[:-1]


def test_prompts_are_encoded_as_in_inference(engine, write, tmp_path):
    square(RED).save(tmp_path / "red.png")
    records = [
        {"messages": [user("Hi"), assistant("Hello!"), user("Who?"), assistant("Me.")]},
        {"messages": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello!")], "tools": [TOOL]},
        {"messages": [user("1 + 1?"), assistant("2.", reasoning_content="Add.")], "thinking": True},
        {"messages": [user([image("red.png"), {"type": "text", "text": "What?"}]), assistant("A square.")]},
        {"prompt": "Hi", "completion": "Hello!", "images": [str(tmp_path / "red.png")]},
    ]
    for example in read(engine, write(*records)):
        asked = {"thinking": example.thinking, "tools": example.record.get("tools")}
        (target,) = example.targets
        assert engine.prepare(example.chat[:-1], **asked).prompt.tokens == target.prompt
        whole = engine.builder.prompt_tokens(example.chat, **asked).tokens
        assert whole[: len(target.prompt) + len(target.answer)] == [*target.prompt, *target.answer]


def test_an_answer_is_decoded_as_it_was_given(engine, write):
    texts = ["2 + 2 = 4.", "def f(x):\n    return x", '{"a": [1, 2]}', "¿Qué? 日本 🙂", "  spaces  "]
    for example, given in zip(read(engine, write(*({"prompt": "Say.", "completion": one} for one in texts))), texts):
        reader = Answer(engine.tokenizer, engine.options.end_tokens, 1000)
        assert feed(reader, example.targets[0].answer) == "stop"
        assert reader.text == given.strip()


def test_a_template_that_treats_thoughts_differently(engine, write):
    """The answer continues exactly where the template's prompt ends."""
    other = templated(engine, OTHER)
    history = [user("Hi"), assistant("", tool_calls=[CALL]), {"role": "tool", "tool_call_id": "1", "content": "x"}]
    (example,) = read(other, write({"messages": [*history, assistant("Yes.")]}), turns="all")
    begun = "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"
    called = "<|tool_call>call:get_weather{}<tool_call|><|tool_response>"
    assert pairs(other, [example]) == [
        (f"{begun}<|channel>thought\n<channel|>", called),
        (f"{begun}{called}response:x<tool_response|>", "Yes.<turn|>"),
    ]
    history[1]["reasoning_content"] = "Ask."
    for thought, answer in (
        ({"reasoning_content": "So."}, "So.\n<channel|>Yes.<turn|>"),
        ({}, "<channel|>Yes.<turn|>"),
    ):
        record = {"messages": [*history, assistant("Yes.", **thought)], "thinking": True}
        asked, replied = pairs(other, read(other, write(record), turns="all"))
        assert asked == (begun, f"<|channel>thought\nAsk.\n<channel|>{called}")
        assert (replied[0][-len("<tool_response|><|channel>thought\n") :], replied[1]) == (
            "<tool_response|><|channel>thought\n",
            answer,
        )
    plain = {"messages": [user("Hi"), assistant("Yes.", reasoning_content="So.")], "thinking": True}
    assert pairs(other, read(other, write(plain))) == [(begun, "<|channel>thought\nSo.\n<channel|>Yes.<turn|>")]


def test_images_become_placeholders_and_sources(engine, write, tmp_path):
    (tmp_path / "pictures").mkdir()
    strip(RED).save(tmp_path / "pictures" / "red.png")
    buffer = io.BytesIO()
    square(RED).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    first = user([image("pictures/red.png"), {"type": "text", "text": "What?"}])
    second = user([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "And this?"}])
    (example,) = read(engine, write({"messages": [first, assistant("Red."), second, assistant("Red.")]}), turns="all")
    sources = [str(tmp_path / "pictures" / "red.png"), url]
    assert [one.images for one in example.targets] == [sources[:1], sources]
    seen = [engine.builder.load_image(one, engine.options.image_tokens).tokens for one in sources]
    placeholder = engine.config.image_token_id
    assert [one.prompt.count(placeholder) for one in example.targets] == [seen[0], sum(seen)]
    assert example.chat[0]["content"][0] == image(sources[0])


# Files


def test_line_numbers_count_blank_lines(engine, write):
    path = write(b"\xef\xbb\xbf", "", {"text": "a\u2028b"}, "  ", '{"text": "c"}\r', "")
    assert [example.where for example in read(engine, path)] == ["train.jsonl, line 3", "train.jsonl, line 5"]


def test_the_splits_of_a_folder(engine, write, tmp_path):
    write({"text": "a"})
    assert {split: len(examples) for split, examples in load(engine, tmp_path).items()} == {
        "train": 1,
        "valid": 0,
        "test": 0,
    }
    write({"text": "a"}, {"text": "b"}, name="test.jsonl")
    assert [len(examples) for examples in load(engine, str(tmp_path)).values()] == [1, 0, 2]
    assert [len(examples) for examples in load(engine, tmp_path / "test.jsonl").values()] == [2, 0, 0]
    assert set(find(tmp_path, ("test", "valid"))) == {"train", "test"}


def test_sources_that_do_not_exist(engine, write, tmp_path):
    assert refusal(DataError, load, engine, tmp_path) == (
        f"{tmp_path} has no train.jsonl; data files are JSON Lines, one object per line."
    )
    assert refusal(DataError, find, tmp_path, ("test", "valid")) == (
        f"{tmp_path} has no test.jsonl or valid.jsonl; data files are JSON Lines, one object per line."
    )
    path = write("a,b", name="train.csv")
    assert refusal(DataError, load, engine, path) == (
        f"{path} is not a .jsonl file; data files are JSON Lines, one object per line."
    )
    for name in ("/nowhere/at/all", "./none", "~/none-at-all", "none", "a/b/c"):
        message = f"{name} does not exist; give a folder with .jsonl files, one such file, or a Hub id."
        assert refusal(DataError, load, engine, name) == message
    assert refusal(DataError, read, engine, tmp_path / "gone.jsonl") == (
        f"{tmp_path / 'gone.jsonl'} cannot be read: No such file or directory."
    )


def test_a_hub_id_is_looked_for_on_this_machine_first(engine, write, tmp_path, monkeypatch):
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    here, answers = [], {True: LocalEntryNotFoundError("not here"), False: str(tmp_path)}

    def snapshot(repo, repo_type, allow_patterns, local_files_only=False):
        here.append(local_files_only)
        assert (repo, repo_type) == ("some/data", "dataset")
        assert {"*.jsonl", "*.png", "*.JPG"} <= set(allow_patterns)
        assert not {"*.parquet", "*.py", "*.json", "*"} & set(allow_patterns)
        if isinstance(answers[local_files_only], Exception):
            raise answers[local_files_only]
        return answers[local_files_only]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert refusal(DataError, load, engine, "some/data") == (
        "some/data has no train.jsonl; data files are JSON Lines, one object per line."
    )
    write({"text": "a"})
    assert len(load(engine, "some/data")["train"]) == 1
    assert here == [True, False] * 2
    answers[True] = str(tmp_path)
    assert len(load(engine, "some/data")["train"]) == 1
    assert here == [True, False] * 2 + [True]
    answers[True] = LocalEntryNotFoundError("not here")
    for error, message in (
        (
            RepositoryNotFoundError.__new__(RepositoryNotFoundError),
            "some/data is neither a file here nor a data set on the Hub; check the name, or log in if it is private.",
        ),
        (HFValidationError("no"), "'some/data' is neither a file here nor a valid Hub id."),
        (
            OSError("no route"),
            "some/data is not on this machine and the Hub cannot be reached (OSError); "
            "connect and try again, or give a folder.",
        ),
    ):
        answers[False] = error
        assert refusal(DataError, load, engine, "some/data") == message


# Errors

HI = user("Hi")


def test_an_image_is_decoded_once(engine, write, tmp_path, monkeypatch):
    strip(RED).save(tmp_path / "red.png")
    opened = []
    monkeypatch.setattr(
        "mlx_dgemma.prompt.builder.open_image", lambda source: opened.append(source) or open_image(source)
    )
    turns = [user([image("red.png"), {"type": "text", "text": "What?"}]), assistant("Red."), HI, assistant("Hello!")]
    read(engine, write({"messages": turns}), turns="all")
    assert opened == [str(tmp_path / "red.png")]
