"""Data for fine-tuning and marking: what is learnt of a file's lines, and every line that is refused."""

import base64
import copy
import io
import json
import warnings
from dataclasses import replace

import pytest
from support import RED, engine_of, refusal, square, strip

from mlx_dgemma.errors import DataError, OptionError
from mlx_dgemma.prompt.answer import Answer
from mlx_dgemma.prompt.images import open_image
from mlx_dgemma.tune.data import find, load, read

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
CALLED = '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>}<tool_call|><|tool_response>'
# As newer templates do it: an empty thought where thinking is off, thoughts only before calls, a call that ends with
# the response's mark, a thought opened behind a response, and a turn begun anew there once it is answered.
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
    """Write records, or lines as they are, to a file; returns its path."""

    def writer(*records, name="train.jsonl"):
        lines = [one if isinstance(one, (str, bytes)) else json.dumps(one) for one in records]
        (tmp_path / name).write_bytes(b"\n".join(one if isinstance(one, bytes) else one.encode() for one in lines))
        return tmp_path / name

    return writer


def templated(engine, template):
    """The same engine with another chat template."""
    wrapper = copy.copy(engine.tokenizer)
    object.__setattr__(wrapper, "_tokenizer", copy.copy(wrapper._tokenizer))
    wrapper._tokenizer.chat_template = template
    return replace(engine, tokenizer=wrapper)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def image(source):
    return {"type": "image", "image": str(source)}


def text(engine, tokens):
    return engine.tokenizer.decode(tokens)


def pairs(engine, examples):
    return [(text(engine, one.prompt), text(engine, one.answer)) for example in examples for one in example.targets]


# What is learnt


def test_the_last_answer_is_learnt(engine, write):
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


def test_every_answer_is_learnt(engine, write):
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


def test_a_plain_text_stands_behind_bos(engine, write):
    (example,) = read(engine, write({"text": " Once there was a cat."}))
    (target,) = example.targets
    assert target.prompt == [2]
    assert target.answer == [*engine.tokenizer.encode(" Once there was a cat.", add_special_tokens=False), 1]
    assert example.chat == []


def test_thinking_is_learnt(engine, write):
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


def test_a_tool_call_ends_with_the_responses_mark(engine, write):
    """The demo's own: what it generates for this question is the answer, token for token."""
    messages = [
        user("What is the weather in Oslo?"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        assistant("The weather in Oslo is sunny."),
    ]
    (example,) = read(engine, write({"messages": messages, "tools": [TOOL]}), turns="all")
    call, told = example.targets
    assert text(engine, call.answer) == CALLED
    assert text(engine, told.prompt).endswith(f'{CALLED}response:get_weather{{value:<|"|>sunny<|"|>}}<tool_response|>')
    assert text(engine, told.answer) == "The weather in Oslo is sunny.<turn|>"
    result = engine.generate(messages[0]["content"], tools=[TOOL], seed=0)
    assert result.tokens == call.answer[:-1]


def test_prompts_are_what_inference_encodes(engine, write, tmp_path):
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
        assert engine.prepare(example.chat[:-1], **asked).row.tokens == target.prompt
        whole = engine.tokens_of(example.chat, **asked)[0]
        assert whole[: len(target.prompt) + len(target.answer)] == [*target.prompt, *target.answer]


def test_an_answer_is_read_back_as_it_was_given(engine, write):
    told = ["2 + 2 = 4.", "def f(x):\n    return x", '{"a": [1, 2]}', "¿Qué? 日本 🙂", "  spaces  "]
    for example, given in zip(read(engine, write(*({"prompt": "Say.", "completion": one} for one in told))), told):
        reader = Answer(engine.tokenizer, engine.options.end_tokens, 1000)
        assert reader.feed(example.targets[0].answer) == "stop"
        assert reader.text == given.strip()


def test_a_template_with_habits_of_its_own(engine, write):
    """The prompt is the template's, and the answer goes on from where it stops."""
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
        asked, told = pairs(other, read(other, write(record), turns="all"))
        assert asked == (begun, f"<|channel>thought\nAsk.\n<channel|>{called}")
        assert (told[0][-len("<tool_response|><|channel>thought\n") :], told[1]) == (
            "<tool_response|><|channel>thought\n",
            answer,
        )
    plain = {"messages": [user("Hi"), assistant("Yes.", reasoning_content="So.")], "thinking": True}
    assert pairs(other, read(other, write(plain))) == [(begun, "<|channel>thought\nSo.\n<channel|>Yes.<turn|>")]


def test_pictures_are_placeholders_and_sources(engine, write, tmp_path):
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
    seen = [engine.load_image(one, engine.options.image_tokens).tokens for one in sources]
    placeholder = engine.config.image_token_id
    assert [one.prompt.count(placeholder) for one in example.targets] == [seen[0], sum(seen)]
    assert example.chat[0]["content"][0] == image(sources[0])


# Files


def test_lines_are_counted_with_the_blank_ones(engine, write):
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


def test_sources_that_are_none(engine, write, tmp_path):
    assert refusal(DataError, load, engine, tmp_path) == (
        f"{tmp_path} has no train.jsonl; data are read as JSONL, one object a line."
    )
    assert refusal(DataError, find, tmp_path, ("test", "valid")) == (
        f"{tmp_path} has no test.jsonl or valid.jsonl; data are read as JSONL, one object a line."
    )
    path = write("a,b", name="train.csv")
    assert refusal(DataError, load, engine, path) == (
        f"{path} is no .jsonl file; data are read as JSONL, one object a line."
    )
    for name in ("/nowhere/at/all", "./none", "~/none-at-all", "none", "a/b/c"):
        told = f"{name} does not exist; give a folder with JSONL files, one such file, or a Hub id."
        assert refusal(DataError, load, engine, name) == told
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
        "some/data has no train.jsonl; data are read as JSONL, one object a line."
    )
    write({"text": "a"})
    assert len(load(engine, "some/data")["train"]) == 1
    assert here == [True, False] * 2
    answers[True] = str(tmp_path)
    assert len(load(engine, "some/data")["train"]) == 1
    assert here == [True, False] * 2 + [True]
    answers[True] = LocalEntryNotFoundError("not here")
    for error, told in (
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
        assert refusal(DataError, load, engine, "some/data") == told


# Refusals

HI = user("Hi")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": "a" "b"}', "train.jsonl, line 3, column 14: This is no JSON (Expecting ',' delimiter); mend it."),
        (b'{"text": "\xff"}', "This is not UTF-8: byte 10 is 0xff; convert the file, for example with iconv."),
        (r'{"text": "\ud800"}', "This holds half of a surrogate pair; write whole characters."),
        ('["text"]', "This is of type list; it should be an object."),
        ({"question": "a"}, "This has none of messages and prompt/completion and text; it should have one of them."),
        ({"prompt": "a"}, "This has none of messages and prompt/completion and text; it should have one of them."),
        ({"text": "a", "messages": []}, "This has all of messages and text; it should have one of them."),
        ({"text": 1}, "text is of type int; it should be a text."),
        ({"text": " "}, "The text is empty; there is nothing to learn."),
        ({"text": "a<turn|>"}, "The text holds <turn|>, which ends an answer; leave it out."),
        (
            {"text": "a", "thinking": True},
            "This is a plain text, which takes no thinking, tools or images; write it as messages.",
        ),
        ({"prompt": 1, "completion": "a"}, "prompt is of type int; it should be a text."),
        ({"prompt": "a", "completion": ["b"]}, "completion is of type list; it should be a text."),
        ({"prompt": " ", "completion": "b"}, "The prompt is empty; say what you want."),
        ({"prompt": "a", "completion": " "}, "Message 1 is an empty answer; say something or call a tool."),
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
            'Tool 0 is no function declaration; it should be {"type": "function", "function": {"name": ..., '
            '"parameters": {...}}}.',
        ),
        (
            {"prompt": "a", "completion": "b", "images": ["a.png", "b.png"], "messages": None, "text": None},
            "{folder}/a.png does not exist.",
        ),
    ],
)
def test_lines_that_are_refused(engine, write, line, told):
    path = write({"text": "fine"}, "", line)
    told = told.replace("{folder}", str(path.parent))
    assert refusal(DataError, read, engine, path) == (
        told if told.startswith("train") else f"train.jsonl, line 3: {told}"
    )


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("Hi", "messages is 'Hi'; it should be a list of messages."),
        ([], "messages is []; it should be a list of messages."),
        (["Hi"], "Message 0 is of type str; it should be an object."),
        (
            [{"role": "bot", "content": "a"}],
            "Message 0 has the role 'bot'; it should be one of system, developer, user, assistant, tool.",
        ),
        ([HI, {"role": 1, "content": "a"}], "Message 1 has role of type int; it should be a text."),
        ([user(1)], "Message 0 has content of type int; it should be a text or a list of parts."),
        ([HI, assistant("a", tool_calls={})], "Message 1 has tool_calls of type dict; it should be a list."),
        ([HI, assistant("a", tool_calls=[1])], "Message 1 has a tool call that cannot be read: 1."),
        ([HI, assistant("a", weight=0)], "Message 1 has the key weight, which has no effect there; leave it out."),
        (
            [{**HI, "reasoning_content": "Hm."}],
            "Message 0 has the key reasoning_content, which has no effect there; leave it out.",
        ),
        (
            [HI, assistant("a", reasoning_content="Hm.")],
            'Message 1 has thinking, which is not switched on; add "thinking": true or leave reasoning_content out.',
        ),
        (
            [assistant("a")],
            "Message 0 has the role assistant and stands first; there it should be system, developer or user.",
        ),
        ([HI, HI, assistant("a")], "Message 1 has the role user and stands after user; there it should be assistant."),
        (
            [HI, assistant("a"), assistant("b")],
            "Message 2 has the role assistant and stands after assistant; there it should be user.",
        ),
        (
            [HI, {"role": "system", "content": "a"}],
            "Message 1 is a system message, and templates take only the first; put it there.",
        ),
        (
            [{"role": "system", "content": "a"}, assistant("a")],
            "Message 1 has the role assistant and stands after system; there it should be user.",
        ),
        (
            [HI, {"role": "tool", "content": "a", "name": "f"}, assistant("b")],
            "Message 1 has the role tool and stands after user; there it should be assistant.",
        ),
        (
            [HI, assistant("", tool_calls=[CALL]), HI, assistant("a")],
            "Message 2 has the role user and stands after a tool call; there it should be tool.",
        ),
        (
            [HI, assistant("", tool_calls=[CALL]), {"role": "tool", "content": "a"}, HI],
            "Message 2 answers no tool call that was made; give the call's id as tool_call_id.",
        ),
        (
            [HI, assistant("", tool_calls=[CALL]), {"role": "tool", "content": "a", "tool_call_id": "1"}, HI],
            "Message 3 has the role user and stands after tool; there it should be tool or assistant.",
        ),
        ([HI], "The last message has the role user; it should be the assistant's, which is the answer."),
        (
            [HI, assistant("a"), HI],
            "The last message has the role user; it should be the assistant's, which is the answer.",
        ),
        ([HI, assistant("")], "Message 1 is an empty answer; say something or call a tool."),
        ([HI, assistant(None)], "Message 1 has the content None; it should be a text or a list of parts."),
        ([HI, assistant("a<turn|>b")], "Message 1 holds <turn|>, which ends an answer; leave it out."),
        (
            [HI, assistant("<|channel>thought\nHm.<channel|>b")],
            "Message 1 holds <|channel>thought; give its thinking as reasoning_content.",
        ),
        (
            [HI, assistant([{"type": "image", "image": "a.png"}])],
            "Message 1 has a picture, but the assistant answers in text alone; take it out.",
        ),
        (
            [user([{"type": "video", "video": "a.mp4"}]), assistant("a")],
            "Message 0 has a video, and videos are not read from data; give frames as images.",
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
def test_messages_that_are_refused(engine, write, messages, told):
    path = write({"messages": messages})
    told = told.replace("{folder}", str(path.parent))
    assert refusal(DataError, read, engine, path) == f"train.jsonl, line 1: {told}"


def test_files_without_samples(engine, write):
    for lines in ([], ["", " "]):
        assert refusal(DataError, read, engine, write(*lines)) == (
            "train.jsonl holds no samples; write one JSON object a line."
        )


def test_deep_nesting_is_refused(engine, write):
    told = refusal(DataError, read, engine, write("[" * 100_000))
    assert told.startswith("train.jsonl, line 1: This cannot be read (")
    assert told.endswith("); mend it.")


def test_templates_that_tell_no_answer(engine, write):
    path = write({"prompt": "Hi", "completion": "Hello!"})
    for template, told in (
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<turn|>{% endfor %}",
            "Message 1 cannot be told from its prompt, which the chat template writes differently before an answer; "
            "use another template.",
        ),
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            "Message 1 is not ended by the chat template with one of <eos>, <turn|>, <|tool_response>; "
            "use another template.",
        ),
        ("{{ raise_exception('No.') }}", "The chat template refuses these messages: No."),
    ):
        assert refusal(DataError, read, templated(engine, template), path) == f"train.jsonl, line 1: {told}"


def test_a_call_that_no_mark_ends(engine, write):
    template = "{% for m in messages if m.role != 'tool' %}{{ m.content or 'call' }}{% endfor %}"
    path = write({"messages": [HI, assistant("", tool_calls=[CALL])]})
    assert refusal(DataError, read, templated(engine, template), path) == (
        "train.jsonl, line 1: Message 1 is not ended by the chat template with one of <eos>, <turn|>, "
        "<|tool_response>; use another template."
    )


# Length


def test_long_samples_are_refused_or_left_out(engine, write):
    """An answer takes whole canvases, 64 tokens each of the demo's."""
    path = write(
        {"prompt": "Hi", "completion": "Hello!"},
        {"messages": [HI, assistant("cat " * 63), HI, assistant("cat " * 64)]},
    )
    lengths = [len(one.prompt) for example in read(engine, path, turns="all") for one in example.targets]
    total = lengths[2] + 128
    assert len(read(engine, path, turns="all", max_length=total)) == 2
    told = (
        f"This takes {total} tokens, {lengths[2]} of prompt and 128 of answer in whole canvases, "
        f"but max_length is {total - 1}; shorten it or leave it out."
    )
    assert refusal(DataError, read, engine, path, max_length=total - 1) == f"train.jsonl, line 2: {told}"
    with pytest.warns(UserWarning) as caught:
        kept = read(engine, path, max_length=total - 1, skip_long=True)
    assert [example.where for example in kept] == ["train.jsonl, line 1"]
    assert [str(one.message) for one in caught] == ["train.jsonl: 1 of 2 samples are too long and were left out."]
    assert refusal(DataError, read, engine, path, max_length=64, skip_long=True) == (
        "train.jsonl holds 2 samples, and every one is too long; shorten them."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(engine, path, skip_long=True)["train"]) == 2


def test_the_context_is_a_limit_of_its_own(engine, write):
    size, room = engine.config.canvas_length, engine.config.text.max_position_embeddings
    words = (room - 1) // size * size - 1  # with eos the last canvas that there is room for behind bos
    assert len(engine.tokenizer.encode(" cat" * words, add_special_tokens=False)) == words
    assert len(read(engine, write({"text": " cat" * words}), max_length=2 * room)) == 1
    assert refusal(DataError, read, engine, write({"text": " cat" * (words + 1)}), max_length=2 * room) == (
        f"train.jsonl, line 1: This takes {1 + room} tokens, 1 of prompt and {room} of answer in whole canvases, "
        f"but the context has room for {room}; shorten it or leave it out."
    )


def test_options_outside_their_bounds(engine, write):
    path = write({"text": "a"})
    assert refusal(OptionError, read, engine, path, turns="first") == "turns is 'first'; it should be one of last, all."
    for value in (0, -1, 1.5, True, "8"):
        assert refusal(OptionError, read, engine, path, max_length=value) == (
            f"max_length is {value!r}; it should be a whole number, at least 1."
        )


def test_a_picture_is_decoded_once(engine, write, tmp_path, monkeypatch):
    strip(RED).save(tmp_path / "red.png")
    opened = []
    monkeypatch.setattr("mlx_dgemma.engine.open_image", lambda source: opened.append(source) or open_image(source))
    turns = [user([image("red.png"), {"type": "text", "text": "What?"}]), assistant("Red."), HI, assistant("Hello!")]
    read(engine, write({"messages": turns}), turns="all")
    assert opened == [str(tmp_path / "red.png")]
