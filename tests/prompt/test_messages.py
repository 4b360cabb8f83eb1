"""Messages in, prompts out, with the demo's tokenizer and chat template."""

import json

import pytest
from support import engine_of, refusal, square

import mlx_dgemma
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.errors import PromptError
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


@pytest.fixture(scope="module")
def tokenizer(demo):
    return engine_of(demo).tokenizer


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
            [{"role": "system", "content": ""}, {"role": "user", "content": " "}],
            "Message 1 is empty; say what you want.",
        ),
        (
            [{"role": "user", "content": "Hi", "name": 3}],
            "Message 0 has the name 3; it should be a text.",
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


SHOWS_ALL = "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}<|turn>model"


def prompt_text(engine, messages, **options):
    return engine.tokenizer.decode(engine.builder.prompt_tokens(messages_of(messages, **options)).tokens)


def several(role):
    turns = [("system", "A"), (role, "B"), ("user", "x"), ("assistant", "y"), (role, "C"), ("user", "z")]
    return [{"role": one, "content": text} for one, text in turns]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_messages_that_a_template_drops_are_joined_into_the_first(demo, role):
    engine = engine_of(demo)
    text = prompt_text(engine, several(role))
    assert text.startswith("<bos><|turn>system\nA\n\nB\n\nC<turn|>\n<|turn>user\nx<turn|>")
    assert prompt_text(engine, several(role)[1:], system="A") == text
    late = [{"role": "user", "content": "x"}, {"role": role, "content": [{"type": "text", "text": "B"}]}]
    assert prompt_text(engine, late).startswith("<bos><|turn>system\nB<turn|>\n<|turn>user\nx<turn|>")


def test_a_template_that_shows_system_messages_anywhere_does_so(monkeypatch):
    engine = mlx_dgemma.load(dtype="float32")
    monkeypatch.setattr(engine.tokenizer._tokenizer, "chat_template", SHOWS_ALL)
    turns = "".join(f"<|turn>{one['role']}\n{one['content']}<turn|>\n" for one in several("developer"))
    assert prompt_text(engine, several("developer")) == turns + "<|turn>model"
    refuses = "{% if messages[1].role == 'developer' %}{{ raise_exception('no') }}{% endif %}" + SHOWS_ALL
    engine = mlx_dgemma.load(dtype="float32")
    monkeypatch.setattr(engine.tokenizer._tokenizer, "chat_template", refuses)
    assert prompt_text(engine, several("developer")[:3]).startswith("<|turn>system\nA\n\nB<turn|>\n<|turn>user")


def test_parts_names_and_empty_texts_stand_in_every_role(demo):
    engine = engine_of(demo)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}

    def conversation(parts, **more):
        def said(text):
            return [{"type": "text", "text": one} for one in text.split("\n")] if parts else text

        return [
            {"role": "system", "content": said("A\nB"), **more},
            {"role": "user", "content": "", **more},
            {"role": "assistant", "content": said("C\nD"), "tool_calls": [call], **more},
            {"role": "tool", "tool_call_id": "c", "content": said("E\nF")},
            {"role": "assistant", "content": None, **more},
            {"role": "user", "content": [], **more},
            {"role": "user", "content": "x", **more},
        ]

    text = prompt_text(engine, conversation(parts=True, name="anna"))
    assert text == prompt_text(engine, conversation(parts=False))
    assert "A\nB" in text and "C\nD" in text and 'value:<|"|>E\nF<|"|>' in text


def test_a_picture_in_a_tools_result_stands_in_it(demo):
    engine = engine_of(demo)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
    parts = [{"type": "text", "text": "Seen <|image|>:"}, {"type": "image", "image": square("red")}]
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": parts},
    ]
    prompt = engine.builder.prompt_tokens(messages_of(messages))
    assert prompt.tokens.count(18) == prompt.pictures[0].tokens == 64
    shown = "<|image>" + "<|image|>" * 64 + "<image|>"
    end = f'<|tool_response>response:f{{value:<|"|>Seen <|image|>:\n{shown}<|"|>}}<tool_response|>'
    assert engine.tokenizer.decode(prompt.tokens).endswith(end)


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
