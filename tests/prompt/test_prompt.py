"""Tokens in, answers out, with the demo's tokenizer."""

import random

import pytest
from support import engine_of, feed

import mlx_dgemma
from mlx_dgemma.errors import PromptError
from mlx_dgemma.prompt.answer import Answer

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


@pytest.mark.parametrize("broken", ["call:get_weather{city:", 'call:f{a:<|"|>Oslo', "nonsense"])
def test_a_broken_tool_call_is_kept_as_text_with_a_warning(tokenizer, broken):
    told = broken.replace('<|"|>', '"')
    with pytest.warns(UserWarning) as caught:
        answer = read(tokenizer, f"Look: <|tool_call>{broken}<tool_call|>")
    assert [str(one.message) for one in caught] == [f"The tool call {told!r} is broken; it was kept as text."]
    assert answer.notes == [str(one.message) for one in caught]
    assert answer.text == "Look: " + told
    assert (answer.tool_calls, answer.finish_reason) == ([], "stop")


def test_a_broken_call_does_not_harm_a_whole_one(tokenizer):
    with pytest.warns(UserWarning, match="is broken"):
        answer = read(tokenizer, OSLO + "<|tool_call>call:x<tool_call|>")
    assert len(answer.tool_calls) == 1
    assert answer.text.strip() == "call:x"
    assert answer.finish_reason == "tool_calls"


def test_a_call_cut_by_max_tokens_is_kept_as_text_with_a_warning(tokenizer):
    for missing in (2, 3):  # the brace, and the quote
        with pytest.warns(UserWarning, match="is broken; it was kept as text"):
            answer = read(tokenizer, "Hm. " + OSLO, max_tokens=len(ids(tokenizer, "Hm. " + OSLO)) - missing)
        assert answer.finish_reason == "length"
        assert answer.tool_calls == []
        assert answer.text == 'Hm. call:get_weather{city:"Oslo' + '"' * (missing == 2)


def test_a_call_that_only_lacks_its_marker_is_one(tokenizer):
    answer = read(tokenizer, "Hm. " + OSLO, max_tokens=len(ids(tokenizer, "Hm. " + OSLO)) - 1)
    assert (answer.text, len(answer.tool_calls), answer.finish_reason) == ("Hm. ", 1, "length")


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


def test_the_final_channel_is_text(tokenizer):
    answer = read(tokenizer, THOUGHT + "<|channel>final\nFour.<channel|>")
    assert (answer.text, answer.thinking) == ("Four.", "First this. Then that.")
    assert read(tokenizer, "<|channel>final\nFo", end=False, max_tokens=7).text == "Fo"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_of_a_character_that_is_cut_nothing_shows(tokenizer, cut):
    emoji = [token for token in ids(tokenizer, "🙂") if tokenizer.convert_ids_to_tokens(token).startswith("<0x")]
    assert len(emoji) == 4
    for behind in ([], [0], [*ids(tokenizer, "<|turn>")]):
        answer = Answer(tokenizer, (16,), 1000)
        feed(answer, [*ids(tokenizer, "ok "), *emoji[:cut], *behind, 16])
        assert answer.text == "ok "
        assert answer.preview([*ids(tokenizer, "ok "), *emoji[:cut]]) == "ok "
    assert read(tokenizer, "a \ufffd b").text == "a \ufffd b"  # the character itself is one


@pytest.mark.parametrize(
    ("tokens", "reason"), [([0] * 9, "length"), ([0, 0, 16], "stop"), ([0, 15, 14, 0, 16], "stop")]
)
def test_an_answer_of_nothing_but_padding_is_told(tokenizer, tokens, reason):
    answer = Answer(tokenizer, (16,), 9)
    with pytest.warns(UserWarning, match=r"^The answer has no text: its \d tokens are padding and markers; "):
        assert feed(answer, tokens) == reason
    assert (answer.text, len(answer.notes)) == ("", 1)


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


@pytest.mark.parametrize("where", ["message", "part", "tool"])
def test_texts_of_too_many_tokens_are_refused_before_the_template_copies_them(demo, monkeypatch, where):
    builder, room = engine_of(demo).builder, 4096 - 64
    words = [one.replace("▁", " ") for one in builder.tokenizer.get_vocab() if one.startswith("▁") and len(one) > 6]
    word = min(words, key=lambda one: len(ids(builder.tokenizer, one * 9)) / len(one))
    rendered = []
    monkeypatch.setattr("mlx_dgemma.prompt.builder.SMALL", 0)
    monkeypatch.setattr("mlx_dgemma.prompt.builder.render", lambda *given: rendered.append(given) or [1])

    def ask(text):
        content = [{"type": "text", "text": text}] if where == "part" else "Hi." if where == "tool" else text
        tools = [{"type": "function", "function": {"name": "f", "description": text}}] if where == "tool" else None
        builder.request([{"role": "user", "content": content}], 0, builder.options, tools=tools)

    with pytest.raises(PromptError, match=f"has more than {room} tokens, but the context leaves room for {room} "):
        ask("a b " * (room + 100))
    assert not rendered
    ask(word * (5 * room // len(word)))  # as many characters, and fewer tokens
    assert rendered
