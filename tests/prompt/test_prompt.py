"""Prompts in, answers out, with the demo's tokenizer and chat template."""

import json
import random

import pytest
from support import engine_of, feed, refusal

import mlx_dgemma
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.errors import PromptError
from mlx_dgemma.prompt.answer import Answer
from mlx_dgemma.prompt.messages import ROLES, messages_of
from mlx_dgemma.prompt.template import render

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
OSLO = '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>}<tool_call|>'
ROME = '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>}<tool_call|>'
THOUGHT = "<|channel>thought\nFirst this. Then that.\n<channel|>"
MARKERS = ("<|", "|>", "<eos>", "<pad>", "<bos>")


@pytest.fixture(scope="module")
def tokenizer(demo):
    return engine_of(demo).tokenizer


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def read(tokenizer, text, end=True, stop=(), max_tokens=1000):
    answer = Answer(tokenizer, (1, 16, 9), max_tokens, stop)
    feed(answer, ids(tokenizer, text) + [16] * end)
    return answer


# Answers.


def test_plain_text_ends_at_an_end_token(tokenizer):
    answer = Answer(tokenizer, (1, 16, 9), 100)
    assert feed(answer, [*ids(tokenizer, "Hello there."), 16, *ids(tokenizer, "more"), 16]) == "stop"
    assert (answer.text, answer.thinking, answer.tool_calls) == ("Hello there.", "", [])
    assert answer.tokens == ids(tokenizer, "Hello there.")


@pytest.mark.parametrize("end", [1, 16, 9])
def test_every_end_token_ends_the_text(tokenizer, end):
    answer = Answer(tokenizer, (1, 16, 9), 100)
    assert feed(answer, [*ids(tokenizer, "Hi"), end]) == "stop"
    assert answer.text == "Hi"


def test_a_text_goes_on_until_an_end_token_comes(tokenizer):
    answer = Answer(tokenizer, (16,), 100)
    assert feed(answer, ids(tokenizer, "one, ")) is None
    assert feed(answer, [1, *ids(tokenizer, "two")]) is None  # 1 is no end token here, and no text either
    assert feed(answer, [16]) == "stop"
    assert answer.text == "one, two"


@pytest.mark.parametrize("text", ["naïve café", "日本", "🙂 ok", "def f(a):\n    return a", "  two  spaces"])
def test_text_comes_back_as_it_was(tokenizer, text):
    assert read(tokenizer, text).text == tokenizer.decode(ids(tokenizer, text))
    assert read(tokenizer, text).text.strip() == text.strip()


def test_thinking_is_a_field_of_its_own(tokenizer):
    answer = read(tokenizer, THOUGHT + "The answer.")
    assert (answer.text, answer.thinking) == ("The answer.", "First this. Then that.")
    assert answer.finish_reason == "stop"


def test_several_thoughts_are_lines(tokenizer):
    answer = read(tokenizer, THOUGHT + "One." + "<|channel>thought\nMore.<channel|>" + "Two.")
    assert answer.thinking == "First this. Then that.\nMore."
    assert answer.text == "One.Two."


def test_an_empty_thought_is_none(tokenizer):
    answer = read(tokenizer, "<|channel>thought\n<channel|>Text.")
    assert (answer.thinking, answer.text) == ("", "Text.")


def test_a_thought_that_is_not_closed_is_kept(tokenizer):
    answer = read(tokenizer, "<|channel>thought\nFirst", end=False, max_tokens=8)
    assert answer.finish_reason is None
    answer.cut("length")
    assert (answer.text, answer.thinking, answer.finish_reason) == ("", "First", "length")


def test_tool_calls_are_fields(tokenizer):
    answer = read(tokenizer, OSLO)
    function = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    assert answer.tool_calls == [{"id": "call_0", "type": "function", "function": function}]
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")


def test_several_calls_keep_their_order(tokenizer):
    answer = read(tokenizer, THOUGHT + OSLO + ROME + "Done.")
    assert [call["function"]["arguments"]["city"] for call in answer.tool_calls] == ["Oslo", "Rome"]
    assert [call["id"] for call in answer.tool_calls] == ["call_0", "call_1"]
    assert (answer.text, answer.thinking) == ("Done.", "First this. Then that.")


@pytest.mark.parametrize(
    "broken",
    ["call:get_weather{city:", "get_weather{city:3}", "call:get_weather{city:3} and more", "nonsense"],
)
def test_a_broken_tool_call_is_kept_as_text_with_a_warning(tokenizer, broken):
    raw = tokenizer.decode(ids(tokenizer, broken))
    with pytest.warns(UserWarning) as caught:
        answer = read(tokenizer, f"Look: <|tool_call>{broken}<tool_call|>")
    assert [str(one.message) for one in caught] == [f"The tool call {raw!r} is broken; it was kept as text."]
    assert answer.text == "Look: " + raw
    assert (answer.tool_calls, answer.finish_reason) == ([], "stop")


def test_a_broken_call_does_not_harm_a_whole_one(tokenizer):
    with pytest.warns(UserWarning, match="is broken"):
        answer = read(tokenizer, OSLO + "<|tool_call>call:x<tool_call|>")
    assert len(answer.tool_calls) == 1
    assert answer.text.strip() == "call:x"
    assert answer.finish_reason == "tool_calls"


def test_a_call_cut_by_max_tokens_is_kept_as_text_with_a_warning(tokenizer):
    with pytest.warns(UserWarning, match="is broken; it was kept as text"):
        answer = read(tokenizer, "Hm. " + OSLO, max_tokens=len(ids(tokenizer, "Hm. " + OSLO)) - 1)
    assert answer.finish_reason == "length"
    assert answer.tool_calls == []
    assert answer.text.startswith("Hm. call:get_weather{city:")


def test_max_tokens_after_a_whole_call_is_length(tokenizer):
    answer = read(tokenizer, OSLO + "More and more", max_tokens=len(ids(tokenizer, OSLO)) + 1)
    assert len(answer.tool_calls) == 1
    assert answer.finish_reason == "length"


def test_max_tokens_counts_all_tokens_and_cuts_the_rest(tokenizer):
    tokens = ids(tokenizer, "one two three four")
    answer = Answer(tokenizer, (16,), 2)
    assert feed(answer, [*tokens, 16]) == "length"
    assert answer.tokens == tokens[:2]
    assert answer.text == tokenizer.decode(tokens[:2])


def test_padding_and_stray_markers_are_no_text(tokenizer):
    answer = read(tokenizer, "A<pad><channel|><tool_call|><|turn>B<|think|>")
    assert answer.text == "AB"


@pytest.mark.parametrize("seed", range(6))
def test_any_split_of_the_tokens_reads_the_same_and_shows_no_marker(tokenizer, seed):
    """What is taken piece by piece adds up, never changes, and holds no marker."""
    chance = random.Random(seed)
    pieces = [THOUGHT, OSLO, "Some text, ", "naïve 日本 🙂", "<pad>", ROME, " an END of it", "\n  x = 1\n", "<|turn>"]
    text = "".join(chance.choices(pieces, k=8))
    tokens = [*ids(tokenizer, text), 16]
    whole = Answer(tokenizer, (16,), 1000, ("END",))
    feed(whole, tokens)
    for _ in range(5):
        answer, text, thinking, at = Answer(tokenizer, (16,), 1000, ("END",)), "", "", 0
        while answer.finish_reason is None:
            step = chance.randint(1, 9)
            feed(answer, tokens[at : at + step])
            at += step
            more = answer.take()
            text, thinking = text + more[0], thinking + more[1]
            assert whole.text.startswith(text)
        assert (text, thinking) == (answer.text, answer.thinking) == (whole.text, whole.thinking)
        assert answer.tool_calls == whole.tool_calls
        assert answer.tokens == whole.tokens
        assert answer.finish_reason == whole.finish_reason
        assert not any(marker in text + thinking for marker in (*MARKERS, "END"))
    assert answer.take() == ("", "")


def test_text_that_may_begin_a_stop_string_waits(tokenizer):
    answer = Answer(tokenizer, (16,), 100, ("###",))
    feed(answer, ids(tokenizer, "a#"))
    assert answer.take()[0] == "a"
    feed(answer, ids(tokenizer, "#b"))
    assert answer.take()[0] == "##b"
    assert feed(answer, ids(tokenizer, "c###d")) == "stop"
    assert answer.take()[0] == "c"
    assert answer.text == "a##bc"


def test_what_waited_is_given_at_the_end(tokenizer):
    answer = Answer(tokenizer, (16,), 100, ("###",))
    feed(answer, ids(tokenizer, "a##"))
    assert answer.take()[0] == "a"
    feed(answer, [16])
    assert answer.take()[0] == "##"


def test_the_first_of_several_stop_strings_counts(tokenizer):
    assert read(tokenizer, "one two three", stop=("three", "two")).text == "one "
    assert read(tokenizer, "one two three", stop=("absent",)).text == "one two three"


def test_stop_strings_are_not_looked_for_in_thinking_and_calls(tokenizer):
    answer = read(tokenizer, THOUGHT + OSLO + "All this.", stop=("this", "Oslo"))
    assert answer.thinking == "First this. Then that."
    assert len(answer.tool_calls) == 1
    assert answer.text == "All "


# Messages.


def test_a_text_is_a_users_message():
    assert messages_of("Hi") == [{"role": "user", "content": "Hi"}]
    assert messages_of("Hi", system="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_messages_are_not_changed_in_place():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    given = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    before = json.dumps(given)
    messages_of(given, system="S")
    assert json.dumps(given) == before


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
def test_tool_call_arguments_come_as_json_text_or_as_an_object(arguments):
    call = {"id": "c7", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = messages_of(
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c7", "content": "sunny"},
        ]
    )
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert messages[1]["content"] == ""
    assert messages[2]["name"] == "get_weather"  # found by the call's id


def test_a_tool_message_keeps_its_own_name():
    assert messages_of([{"role": "tool", "name": "f", "content": "1"}])[0]["name"] == "f"


def test_parts_of_text_are_taken():
    parts = [{"type": "text", "text": "Hi"}]
    assert messages_of([{"role": "user", "content": parts}])[0]["content"] == parts


ROLE_LIST = "system, developer, user, assistant, tool"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "The prompt is empty; say what you want."),
        (" \n", "The prompt is empty; say what you want."),
        ([], "The prompt is []; give a text or a list of messages."),
        (None, "The prompt is None; give a text or a list of messages."),
        ({"role": "user"}, "The prompt is {'role': 'user'}; give a text or a list of messages."),
        ([{"role": "bot", "content": "x"}], f"Message 0 has the role 'bot'; it should be one of {ROLE_LIST}."),
        (["Hi"], f"Message 0 has the role None; it should be one of {ROLE_LIST}."),
        (
            [{"role": "user", "content": "Hi"}, {"role": "user", "content": " "}],
            "Message 1 is empty; say what you want.",
        ),
        (
            [{"role": "user", "content": 3}],
            "Message 0 has the content 3; it should be a text or a list of parts.",
        ),
        (
            [{"role": "user", "content": ["Hi"]}],
            "Message 0 has the content ['Hi']; it should be a text or a list of parts.",
        ),
        (
            [{"role": "assistant"}],
            "Message 0 has the content None; it should be a text or a list of parts.",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}],
            "Message 0 has a tool call that cannot be read (no name or no arguments): "
            "{'function': {'name': 'f', 'arguments': '3'}}.",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}],
            "Message 0 has a tool call that cannot be read ('name'): {'function': {'arguments': {}}}.",
        ),
    ],
)
def test_what_is_no_prompt_is_refused(prompt, message):
    with pytest.raises(PromptError) as caught:
        messages_of(prompt)
    assert str(caught.value) == message


def test_a_part_or_a_call_of_another_kind_is_refused():
    with pytest.raises(PromptError, match=r"^Message 0 has a part of type 'file'; "):
        messages_of([{"role": "user", "content": [{"type": "file"}]}])
    with pytest.raises(PromptError, match=r"^Message 0 has a tool call that cannot be read \(.*\): 'f'\.$"):
        messages_of([{"role": "assistant", "tool_calls": ["f"]}])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_two_system_messages_are_refused(role):
    with pytest.raises(PromptError) as caught:
        messages_of([{"role": role, "content": "A"}, {"role": "user", "content": "B"}], system="C")
    assert str(caught.value) == ("There are two system messages: one in the messages and one beside them; give one.")


def test_the_roles_are_openais():
    assert ROLES == ("system", "developer", "user", "assistant", "tool")


# Templates.


def rendered(tokenizer, prompt, system=None, **arguments):
    return tokenizer.decode(render(tokenizer, messages_of(prompt, system), **arguments))


def test_a_prompt_is_rendered_ready_for_the_answer(tokenizer):
    assert rendered(tokenizer, "Hi") == "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"


def test_thinking_is_off_unless_asked_for(tokenizer):
    plain, on = (rendered(tokenizer, "Hi", thinking=thinking) for thinking in (False, True))
    assert "<|think|>" not in plain
    assert on == "<bos><|turn>system\n<|think|>\n<turn|>\n" + plain.removeprefix("<bos>")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_or_developer_message_leads(tokenizer, role):
    expected = rendered(tokenizer, "Hi", system="Be brief.")
    assert expected.startswith("<bos><|turn>system\nBe brief.<turn|>\n")
    messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert rendered(tokenizer, messages) == expected


def test_tools_are_declared(tokenizer):
    text = rendered(tokenizer, "Hi", tools=[TOOL])
    assert "<|tool>declaration:get_weather{" in text
    assert rendered(tokenizer, "Hi", tools=[]) == rendered(tokenizer, "Hi")


def test_a_conversation_with_a_tool_is_rendered(tokenizer):
    call = {"id": "c7", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    text = rendered(
        tokenizer,
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": [call], "reasoning_content": "Ask."},
            {"role": "tool", "tool_call_id": "c7", "content": "sunny"},
        ],
    )
    assert text == (
        "<bos><|turn>user\nWeather?<turn|>\n<|turn>model\n<|channel>thought\nAsk.\n<channel|>"
        + OSLO
        + '<|tool_response>response:get_weather{value:<|"|>sunny<|"|>}<tool_response|>'
    )


class Bare:
    """A tokenizer whose template is missing or refuses."""

    def __init__(self, has_chat_template):
        self.has_chat_template = has_chat_template

    def apply_chat_template(self, messages, **_):
        raise RuntimeError("no two users in a row")


def test_a_checkpoint_without_template_says_so():
    with pytest.raises(PromptError) as caught:
        render(Bare(False), messages_of("Hi"))
    assert str(caught.value) == "This checkpoint has no chat template; add its chat_template.jinja to the folder."


def test_a_templates_own_refusal_is_told():
    with pytest.raises(PromptError) as caught:
        render(Bare(True), messages_of("Hi"))
    assert str(caught.value) == "The chat template refuses these messages: no two users in a row"


def test_a_late_system_message_is_refused():
    with pytest.raises(PromptError) as error:
        messages_of([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])
    assert str(error.value) == "Message 1 is a system message, and templates take only the first; put it there."


def test_calls_that_are_none_are_refused():
    def asked(calls):
        return [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": calls}]

    assert refusal(PromptError, messages_of, asked(5)) == (
        "Message 1 has the tool_calls 5; it should be a list of calls."
    )
    call = {"id": [1], "function": {"name": "f", "arguments": {}}}
    assert refusal(PromptError, messages_of, asked([call])) == (
        f"Message 1 has a tool call that cannot be read (its id is no text): {call!r}."
    )


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("generate", ["a\ud800b"]),
        ("infill", ["a\ud800", "b"]),
        ("edit", ["a\ud800", "b"]),
        ("fill", ["a\ud800 {x}", {"x": 3}]),
        ("choose", ["a", ["a\ud800", "b"]]),
    ],
)
def test_half_a_surrogate_pair_is_refused(name, arguments):
    told = refusal(PromptError, getattr(engine_of(DEMO), name), *arguments)
    assert told.endswith(" has half of a surrogate pair, '\\ud800', which is no character; leave it out.")


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "1e999"])
def test_a_call_that_nobody_can_be_sent_is_text(value):
    engine = engine_of(DEMO)
    answer, raw = Answer(engine.tokenizer, engine.options.end_tokens, 100), f"call:f{{a:{value}}}"
    with pytest.warns(UserWarning, match="is broken"):
        feed(answer, engine.tokenizer.encode(f"<|tool_call>{raw}<tool_call|>", add_special_tokens=False))
    assert (answer.text, answer.tool_calls) == (raw, [])


def test_a_thought_that_the_prompt_has_opened_is_one(monkeypatch):
    """As templates of releases do behind a tool's response."""
    engine = mlx_dgemma.load(dtype="float32")
    opened = engine.tokenizer.chat_template + '{% if enable_thinking %}<|channel>thought{{ "\\n" }}{% endif %}'
    monkeypatch.setattr(engine.tokenizer._tokenizer, "chat_template", opened)
    answer = engine.prepare("a", thinking=True).reader
    feed(answer, engine.tokenizer.encode("So.\n<channel|>Four.", add_special_tokens=False))
    answer.cut("stop")
    assert (answer.text, answer.thinking) == ("Four.", "So.")
    assert not engine.prepare("a").reader.thinks
