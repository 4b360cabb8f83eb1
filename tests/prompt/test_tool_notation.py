"""Tool calls in the notation of chat templates and in what models make of it."""

import json
import random
import re
import warnings

import pytest
from support import engine_of, feed
from tool_calls import QUOTE, damaged, random_call, words_of

from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.errors import PromptError
from mlx_dgemma.prompt.answer import Answer

START, END, Q = "<|tool_call>", "<tool_call|>", QUOTE
WEATHER = {"city": "Oslo"}
SAID = f"call:get_weather{{city:{Q}Oslo{Q}}}"
NAMES = "tool tool_call tool_response channel turn image audio".split()
MARKERS = [Q, "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|think|>", "<|image|>", "<|audio|>", "<|video|>"]
MARKERS += [form % name for name in NAMES for form in ("<|%s>", "<%s|>")]
MARKER = re.compile("|".join(map(re.escape, MARKERS)))


def declared(*names, properties=None):
    parameters = {"type": "object", "properties": properties or {}}
    return [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in names]


def read(text, tools=None):
    return engine_of(DEMO).read(text, tools)


def calls(text, tools=None):
    return [(one["function"]["name"], one["function"]["arguments"]) for one in read(text, tools).tool_calls]


def test_what_a_template_writes_comes_back():
    chance = random.Random(7)
    for _ in range(300):
        name, arguments, text = random_call(chance)
        answer = read(text)
        assert calls(text) == [(name, arguments)], text
        assert (answer.text, answer.notes) == ("", ())


def test_malformed_calls_lose_nothing_and_show_no_marker():
    chance = random.Random(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(200):
            text = damaged(chance, random_call(chance)[2])
            answer, words = read(f"Before. {text}"), MARKER.sub("", f"Before. {text}")
            assert not MARKER.search(answer.text) or MARKER.search(words), text
            if not answer.tool_calls:
                assert words_of(answer.text) == words_of(words), text


# What other programs' parsers are tested with, and what their users reported of this model's calls.
FOUND = [
    (f"{START}{SAID}{END}", ("get_weather", WEATHER)),
    (f"{START}call:set_volume{{level:42}}{END}", ("set_volume", {"level": 42})),
    (f"{START}call:mcp.calendar:list_events{{limit:5}}{END}", ("mcp.calendar:list_events", {"limit": 5})),
    (
        f"{START}call:edit-file{{path:{Q}test.txt{Q},edits:[{{newText:{Q}orange{Q},oldText:{Q}apple{Q}}}]}}{END}",
        ("edit-file", {"path": "test.txt", "edits": [{"newText": "orange", "oldText": "apple"}]}),
    ),
    (
        f"{START}call:click{{verb:{Q}click{Q},target:{{mark:1}}}}{END}",
        ("click", {"verb": "click", "target": {"mark": 1}}),
    ),
    ("call:get_weather{city:Austin}", ("get_weather", {"city": "Austin"})),
    ("get_weather{city:Austin}", ("get_weather", {"city": "Austin"})),
    ("mcp.calendar:list_events{limit:5}", ("mcp.calendar:list_events", {"limit": 5})),
    (f"{START}get_weather{{city:Austin}}{END}", ("get_weather", {"city": "Austin"})),
    (f"{START}:get_weather{{city:Austin}}{END}", ("get_weather", {"city": "Austin"})),
    (f"{START}call:terminal(command:{Q}ls -a{Q}){END}", ("terminal", {"command": "ls -a"})),
    (f"{START}call:terminal(command={Q}ls -a{Q}, n=2){END}", ("terminal", {"command": "ls -a", "n": 2})),
    (f"{START}call:terminal({{command: 'ls'}}){END}", ("terminal", {"command": "ls"})),
    ('call:ns:create{"content": "has } brace"}', ("ns:create", {"content": "has } brace"})),
    (f"{START}call:f{{ a : 1 ,\n\tb : [ 1, 2, ] , }}{END}", ("f", {"a": 1, "b": [1, 2]})),
    (f"{START}call:f{{\na:1\nb:{Q}x{Q}\n}}{END}", ("f", {"a": 1, "b": "x"})),
    (
        f"{START}call:f{{a:True,b:None,c:'it\\'s',d:\"q\\n\"}}{END}",
        ("f", {"a": True, "b": None, "c": "it's", "d": "q\n"}),
    ),
    (f"{START}call:f{{place:New York, NY,zip:02134}}{END}", ("f", {"place": "New York, NY", "zip": "02134"})),
    (f"{START}call:f{{a-b:1,a.b:2,$ref:3,a b:4}}{END}", ("f", {"a-b": 1, "a.b": 2, "$ref": 3, "a b": 4})),
    (f"{START}call:f{{{Q}a:b{Q}:1,\"c,d\":2,'e':3}}{END}", ("f", {"a:b": 1, "c,d": 2, "e": 3})),
    (f"{START}call:f{{xs:id:{Q}1{Q},url:http://a.b:80/c}}{END}", ("f", {"xs:id": "1", "url": "http://a.b:80/c"})),
    (f"{START}call:f{{say:{Q}the {Q} quote{Q},n:1}}{END}", ("f", {"say": f"the {Q} quote", "n": 1})),
    (f"{START}call:f{{say:{Q}ends in {END} here{Q}}}{END}", ("f", {"say": f"ends in {END} here"})),
    (f"{START}call:f{{a:{{b:1}}{END}", ("f", {"a": {"b": 1}})),
    (f"{START}{SAID}", ("get_weather", WEATHER)),
    (f"<|channel>thought\nI ask.\n<channel|>{SAID}", ("get_weather", WEATHER)),
    (f"<|channel>thought\nI ask.{START}{SAID}{END}<|tool_response>", ("get_weather", WEATHER)),
    (f"<|channel>thought\nI ask.\n{SAID}", ("get_weather", WEATHER)),
    (f"{SAID}{END}", ("get_weather", WEATHER)),
    (f"{START}I will do so. {SAID}{END}", ("get_weather", WEATHER)),
    (f'{START}call:f{{a:NaN,b:1e999,c:"\\ud800"}}{END}', ("f", {"a": "NaN", "b": "1e999", "c": "\\ud800"})),
]


@pytest.mark.parametrize(("text", "expected"), FOUND, ids=[text for text, _ in FOUND])
def test_calls_as_they_are_found(text, expected):
    assert calls(text) == [expected]
    assert not MARKER.search(read(text).text)


def test_several_calls_come_in_their_order():
    assert calls(f"{START}call:f{{a:1}}{END}\n{START}call:g{{}}{END}") == [("f", {"a": 1}), ("g", {})]
    assert calls(f"{START}call:f{{a:1}}call:g{{b:2}}{END}") == [("f", {"a": 1}), ("g", {"b": 2})]
    assert calls(f"{START}call:f{{a:1}}{START}call:g{{b:2}}{END}") == [("f", {"a": 1}), ("g", {"b": 2})]
    broken = f"{START}call:terminal(comm{END}{START}call:f{{a:1}}{END}"
    with pytest.warns(UserWarning, match="is broken"):
        assert calls(broken) == [("f", {"a": 1})]


@pytest.mark.parametrize(
    "text",
    [
        "Like call: prince",
        "body{color:red}",
        "I would write call:f{a:1} to do so.",
        f"The notation is `{SAID}`.",
        "call:me{maybe} is a song, call:f{ too",
    ],
)
def test_prose_is_no_call(text):
    answer = read(text)
    assert answer.tool_calls == []
    assert answer.text == text.replace(Q, '"')


def test_a_text_around_a_call_stays():
    tools = declared("get_weather")
    answer = read(f"I look it up.\n{SAID} Wait.", tools)
    assert (answer.text, len(answer.tool_calls)) == ("I look it up.\n Wait.", 1)
    answer = read(f"{START}{SAID} and more{END}")
    assert (answer.text, len(answer.tool_calls)) == (" and more", 1)


def test_names_and_keys_are_those_of_the_declared_tools():
    tools = declared("get_weather", "time", properties={"a:b": {}, "host": {}})
    assert calls(f"{START}call:google:get_weather{{}}{END}", tools) == [("get_weather", {})]
    assert calls(f"{START}call:time{END}", tools) == [("time", {})]
    assert calls(f"{START}call:time{{a:b:1,host:localhost:80}}{END}", tools) == [
        ("time", {"a:b": 1, "host": "localhost:80"})
    ]
    with pytest.warns(UserWarning) as caught:
        assert calls(f"{START}call:other{{a:1}}{END}", tools) == [("other", {"a": 1})]
    told = "The answer calls other, which is not declared; the tools are get_weather, time."
    assert {str(one.message) for one in caught} == {told}


def test_a_quote_that_is_spelt_in_tokens_is_text():
    """A marker is one token; the same characters as text are many."""
    tokenizer = engine_of(DEMO).tokenizer
    quote, told = tokenizer.convert_tokens_to_ids(Q), f"x{Q},b:{Q}y"
    answer = Answer(tokenizer, (16,), 1000)
    plain = [token for char in told for token in tokenizer.encode(char, add_special_tokens=False)]
    head, tail = (tokenizer.encode(part, add_special_tokens=False) for part in (f"{START}call:f{{a:", f"}}{END}"))
    feed(answer, [*head, quote, *plain, quote, *tail, 16])
    assert [one["function"]["arguments"] for one in answer.tool_calls] == [{"a": told}]


def test_a_call_that_is_too_deep_or_never_ends_is_text():
    for text in (f"{START}call:f{{a:" + "[" * 3000 + "]" * 3000 + "}" + END, f"{START}call:f{{a:{Q}x"):
        with pytest.warns(UserWarning, match="is broken"):
            answer = read(text)
        assert answer.tool_calls == [] and answer.text.startswith("call:f{a:")


def test_nothing_is_read_twice_although_it_comes_in_pieces():
    tokenizer = engine_of(DEMO).tokenizer
    tools = declared("get_weather")
    text = f"Well. call:me?\n{SAID}{END} call:get_weather{{city:{Q}Rome{Q}}}\nDone, ca"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    for size in (1, 3, 7, 1000):
        answer, taken = Answer(tokenizer, (16,), 1000, tools=tools), ""
        for at in range(0, len(tokens), size):
            feed(answer, tokens[at : at + size])
            taken += answer.take()[0]
        answer.cut("stop")
        assert taken + answer.take()[0] == answer.text == "Well. call:me?\n\nDone, ca"
        assert [one["function"]["arguments"]["city"] for one in answer.tool_calls] == ["Oslo", "Rome"]


def test_a_read_text_must_be_one():
    with pytest.raises(PromptError, match=r"^text is 3; it should be a text\.$"):
        read(3)
    with pytest.raises(PromptError, match=r"^The text has half of a surrogate pair, "):
        read("\udc00")
    json.dumps(read(f"{START}{SAID}{END}").tool_calls, allow_nan=False)
