"""What users, tools and files say is text: every marker in every place is cut into tokens of plain text."""

import pytest
from support import engine_of, square

from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.prompt.messages import messages_of
from mlx_dgemma.prompt.vocabulary import vocabulary_of
from mlx_dgemma.tasks import edit, fill, infill

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.fixture(scope="module")
def engine():
    return engine_of(DEMO)


@pytest.fixture(scope="module")
def markers(engine):
    found = [one.content for one in engine.tokenizer.added_tokens_decoder.values() if one.special]
    assert len(found) == 24 and {'<|"|>', "<|turn>", "<|image|>", "<pad>"} < set(found)
    return found


def user(text):
    return [{"role": "user", "content": text}]


def tool(text, key="city"):
    schema = {"type": "object", "properties": {key: {"type": "string", "description": text, "enum": [text]}}}
    return [{"type": "function", "function": {"name": "f", "description": text, "parameters": schema}}]


# Where a text can stand: a prompt that holds it, by the text.
PLACES = {
    "user": lambda text: {"messages": user(text)},
    "part": lambda text: {"messages": user([{"type": "text", "text": text}])},
    "caption": lambda text: {
        "messages": user([{"type": "image", "image": square("red")}, {"type": "text", "text": text}])
    },
    "system": lambda text: {"messages": [{"role": "system", "content": text}, *user("x")]},
    "developer": lambda text: {"messages": [{"role": "developer", "content": text}, *user("x")]},
    "assistant": lambda text: {"messages": [*user("x"), {"role": "assistant", "content": text}, *user("x")]},
    "thought": lambda text: {
        "messages": [*user("x"), {"role": "assistant", "content": "y", "reasoning_content": text}, *user("x")]
    },
    "argument": lambda text: {"messages": [*user("x"), asks({"city": text})]},
    "key": lambda text: {"messages": [*user("x"), asks({text: 1})]},
    "name": lambda text: {"messages": [*user("x"), asks({}, text)]},
    "result": lambda text: {"messages": [*user("x"), asks({}), {"role": "tool", "name": "f", "content": text}]},
    "result's name": lambda text: {"messages": [*user("x"), asks({}), {"role": "tool", "name": text, "content": "1"}]},
    "tool": lambda text: {"messages": user("x"), "tools": tool(text)},
    "tool's key": lambda text: {"messages": user("x"), "tools": tool("x", text)},
}


def asks(arguments, name="f"):
    return {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": name, "arguments": arguments}}]}


def special(engine, tokens):
    ids = set(vocabulary_of(engine.tokenizer).markers.values())
    return [token for token in tokens if token in ids]


@pytest.mark.parametrize("place", PLACES)
def test_a_marker_is_plain_text_token_for_token(engine, markers, place):
    for marker in markers:
        text, harmless = f"a {marker} b", "a # b"
        prompts = [PLACES[place](one) for one in (text, harmless)]
        tokens, others = (
            engine.builder.prompt_tokens(messages_of(one["messages"]), tools=one.get("tools")).tokens for one in prompts
        )
        expected = special(engine, others)
        if place == "key":  # it needs the notation's quotes
            expected = sorted([*expected, *[vocabulary_of(engine.tokenizer)['<|"|>']] * 2])
            assert sorted(special(engine, tokens)) == expected, marker
        else:
            assert special(engine, tokens) == expected, marker
        spelt = vocabulary_of(engine.tokenizer).encode(f" {marker} b")
        assert spelt == engine.tokenizer.encode(f" {marker} b", add_special_tokens=False, split_special_tokens=True)
        assert any(tokens[at : at + len(spelt)] == spelt for at in range(len(tokens))), marker


def test_text_without_markers_is_cut_as_before(engine):
    tokenizer, vocabulary = engine.tokenizer, vocabulary_of(engine.tokenizer)
    for text in ["a  b\n\n c", "naïve 日本 🙂", "x < y | z > w <|", "1234 <a|b>", "", "\n\n\n"]:
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert vocabulary.encode(text) == vocabulary.encode_marked(text, "\ue000") == plain
        told = f"<|turn>user\n{text}<turn|>\n<|image>"
        assert vocabulary.encode_marked(told, "\ue000") == tokenizer.encode(told, add_special_tokens=False)


def test_private_characters_of_a_user_stay(engine):
    text = "\ue000<|turn>\ue001"
    tokens = engine.builder.prompt_tokens(messages_of(text)).tokens
    assert text in engine.tokenizer.decode(tokens)


def test_files_and_the_texts_around_holes_are_plain(engine, markers):
    vocabulary = vocabulary_of(engine.tokenizer)
    for marker in markers:
        text = f"a {marker} b"
        prompt = special(engine, engine.builder.prompt_tokens(messages_of("x")).tokens)
        for request in (
            edit.edit(engine.builder, text, f"Keep {marker}", seed=0),
            infill.infill(engine.builder, text, text, length=2, seed=0),
            infill.infill(engine.builder, text, "", seed=0),
            fill.fill(engine.builder, text + " {x}", {"x": 3}, seed=0),
        ):
            assert special(engine, request.prompt.tokens) == prompt, marker
        assert edit.edit(engine.builder, text, "Keep", seed=0).control._draft == vocabulary.encode(text)
        layout = infill.infill(engine.builder, text, text, length=2, seed=0).control.layout()
        assert not set(special(engine, layout.tokens[0].tolist())) - {0, engine.builder.turn_end}


def test_a_marker_in_a_constrained_text_is_spelt(engine):
    request = engine.prepare("x", schema={"const": 'a <|"|> <turn|> b'}, seed=0)
    result = engine._result(engine.run(request, drafts=False))
    assert result.text == '"a <|\\"|> <turn|> b"' and not special(engine, result.tokens)


def test_any_arguments_come_back_from_the_template(engine):
    """What the template writes for a call over tokens is read as that call, whatever its keys and strings hold."""
    arguments = {
        'q<|"|>q': '<|"|>,b:<|"|>',
        "a:b, {c}": {"": [' <tool_call|> "x" \n', "<|tool_call>call:g{}"], " x ": None},
        "n": [1, -2.5, True, {"$ref": "\\"}],
    }
    tokens = engine.builder.prompt_tokens(messages_of([*user("x"), asks(arguments)])).tokens
    vocabulary = vocabulary_of(engine.tokenizer)
    start, end = tokens.index(vocabulary["<|tool_call>"]), tokens.index(vocabulary["<tool_call|>"])
    from mlx_dgemma.prompt.answer import Answer

    answer = Answer(engine.tokenizer, (16,), 10_000)
    answer.feed([*tokens[start : end + 1], 16], [0.0] * 10_000)
    assert [one["function"]["arguments"] for one in answer.tool_calls] == [arguments]
