"""Chat and completions, with OpenAI's own client: what they answer is what the engine does."""

import base64
import io
import itertools
import json
import math
import re
from functools import cache

import jsonschema
import pytest
from serving import MODEL, TIME, WEATHER, chat, said
from support import BLUE, engine_of, square

from mlx_dgemma import Draft
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.constraints.dfa import build_dfa
from mlx_dgemma.constraints.schema import translate
from mlx_dgemma.server.endpoints.completions import StopCutter
from mlx_dgemma.tasks import infill as infill_module

JSON_PROMPT = "Write JSON for: Anna is 31 years old and lives in Oslo."
COUNT = "Count from 1 to 30."
CONTINUED = {"max_denoising_steps": 4, "max_tokens": 20}
QUICK = {"max_denoising_steps": 1, "max_tokens": 100}
SHORT = {"max_denoising_steps": 2, "max_tokens": 24}


@cache
def expected(prompt, **options):
    return engine_of(DEMO).generate(prompt, **options)


# chat


def test_an_answer_is_the_engines(client):
    same = expected(JSON_PROMPT, seed=0)
    answer = chat(client, JSON_PROMPT, seed=0)
    choice = answer.choices[0]
    assert choice.message.content == same.text == '{"name": "Anna", "age": 31, "city": "Oslo"}'
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", MODEL, "chatcmpl-")
    usage, stats = answer.usage, answer.stats
    assert usage.prompt_tokens == same.stats.prompt_tokens
    assert usage.completion_tokens == len(same.tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == stats["reused_tokens"]
    assert usage.completion_tokens_details.reasoning_tokens == 0
    assert set(stats) == set(type(same.stats).__dataclass_fields__)
    assert (stats["seed"], stats["denoising_steps"]) == (0, same.stats.denoising_steps)


def test_a_seed_that_was_drawn_repeats_the_answer(client):
    story = "Tell a story about a cat named Mia."
    answer = chat(client, story, max_tokens=24, extra_body={"max_denoising_steps": 1})
    again = chat(
        client, story, max_completion_tokens=24, seed=answer.stats["seed"], extra_body={"max_denoising_steps": 1}
    )
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert {answer.choices[0].finish_reason, again.choices[0].finish_reason} <= {"stop", "length"}


def test_several_choices_are_several_seeds(client):
    story = "Tell a story about a cat named Mia."
    texts = [expected(story, seed=seed, **SHORT).text for seed in (5, 6, 7)]
    answer = chat(client, story, seed=5, n=3, extra_body=SHORT)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == texts
    assert len(set(texts)) > 1
    assert [one["seed"] for one in answer.stats] == [5, 6, 7]
    assert answer.usage.completion_tokens == sum(one["generated_tokens"] for one in answer.stats)
    assert answer.usage.prompt_tokens == answer.stats[0]["prompt_tokens"]


def test_a_stream_is_the_same_in_pieces(client):
    texts = [expected(COUNT, seed=seed, **QUICK).text for seed in (0, 1)]
    chunks = list(
        chat(client, COUNT, seed=0, n=2, stream=True, stream_options={"include_usage": True}, extra_body=QUICK)
    )
    *parts, last = chunks
    assert last.choices == [] and last.usage.completion_tokens > 100
    assert all(part.usage is None for part in parts)
    assert len({part.id for part in chunks}) == 1
    for i, text in enumerate(texts):
        mine = [part for part in parts if part.choices[0].index == i]
        assert mine[0].choices[0].delta.role == "assistant"
        pieces = [part.choices[0].delta.content or "" for part in mine]
        assert "".join(pieces) == text
        assert len([piece for piece in pieces if piece]) > 1
        assert [part.choices[0].finish_reason for part in mine] == [None] * (len(mine) - 1) + ["length"]
        assert mine[-1].stats["seed"] == i
    order = [part.choices[0].index for part in parts]
    assert order != sorted(order)  # both run at once


def test_without_being_asked_a_stream_tells_no_usage(client):
    assert all(part.usage is None and part.choices for part in chat(client, "Spell the word cat.", seed=0, stream=True))


def test_drafts_are_the_engines(client):
    events = list(engine_of(DEMO).stream(COUNT, seed=3, max_denoising_steps=2, max_tokens=70))
    drafts = [event for event in events if isinstance(event, Draft)]
    parts = chat(
        client, COUNT, seed=3, stream=True, extra_body={"drafts": True, "max_denoising_steps": 2, "max_tokens": 70}
    )
    told = [part.draft for part in parts if getattr(part, "draft", None)]
    assert [(one["index"], one["block"], one["step"]) for one in told] == [(0, d.block, d.step) for d in drafts]
    ends = engine_of(DEMO).options.end_tokens
    for one, draft in zip(told, drafts):
        assert "".join(token["text"] for token in one["tokens"]) == draft.text
        ids = draft.tokens.tolist()
        count = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        assert [token["accepted"] for token in one["tokens"]] == draft.accepted.tolist()[:count]
        for token, nats in zip(one["tokens"], draft.entropy.tolist()):
            assert token["confidence"] == pytest.approx(math.exp(-nats), abs=6e-4)


def test_stop_and_length(client):
    answer = chat(client, COUNT, seed=0, stop=["5,", "zebra"])
    assert answer.choices[0].message.content == "1, 2, 3, 4, "
    assert answer.choices[0].finish_reason == "stop"
    answer = chat(client, COUNT, seed=0, stop="5,", stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in answer) == "1, 2, 3, 4, "
    answer = chat(client, COUNT, seed=0, max_completion_tokens=5)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)


def test_temperature(client):
    own = engine_of(DEMO).options
    story = "Tell a story about a fox named Leo."
    for given, schedule in (
        ({"temperature": 0}, {"seed": 0}),
        ({"temperature": 0, "seed": 4}, {"seed": 4}),
        ({"temperature": 2, "seed": 4}, {"seed": 4, "t_min": own.t_min * 2, "t_max": own.t_max * 2}),
    ):
        told = chat(client, story, extra_body=SHORT, **given)
        same = expected(story, **SHORT, **schedule)
        assert told.choices[0].message.content == same.text
        assert told.stats["denoising_steps"] == same.stats.denoising_steps


def test_options_of_this_model(client):
    options = {"max_denoising_steps": 3, "entropy_bound": 0.5, "t_min": 0.2, "t_max": 0.9, "patience": 1}
    told = chat(client, JSON_PROMPT, seed=2, extra_body=options)
    same = expected(JSON_PROMPT, seed=2, **options)
    assert told.choices[0].message.content == same.text
    assert told.stats["denoising_steps"] == same.stats.denoising_steps


def test_token_by_token(client):
    """Streamed by token, sampled as alone, several at once; the next turn reuses the prefix in any mode."""
    drawing = {"mode": "causal", "min_p": 0.02, "top_k": 40, "repetition_penalty": 1.05}
    same = expected("Spell the word frog.", seed=5, temperature=0.7, top_p=0.95, **drawing)
    stream = chat(client, "Spell the word frog.", seed=5, temperature=0.7, top_p=0.95, stream=True, extra_body=drawing)
    parts = [part.choices[0].delta.content for part in stream if part.choices and part.choices[0].delta.content]
    assert "".join(parts) == same.text and len(parts) > 3
    drafted = chat(client, JSON_PROMPT, temperature=0, n=2, extra_body={"mode": "speculative"})
    assert {one.message.content for one in drafted.choices} == {
        expected(JSON_PROMPT, mode="causal", temperature=0).text
    }


@pytest.mark.parametrize(
    "asked", [{"reasoning_effort": "low"}, {"thinking": True}, {"chat_template_kwargs": {"enable_thinking": True}}]
)
def test_thinking(client, asked):
    same = expected("What is 23 + 45?", seed=1, thinking=True)
    answer = chat(client, "What is 23 + 45?", seed=1, extra_body=asked)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("23 + 45 = 68.", same.thinking)
    assert same.thinking.startswith("Ones: 3 + 5 = 8.")
    text = len(engine_of(DEMO).tokenizer.encode(same.text, add_special_tokens=False))
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(same.tokens) - text
    parts = list(chat(client, "What is 23 + 45?", seed=1, stream=True, extra_body=asked))
    deltas = [part.choices[0].delta for part in parts]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == same.thinking
    assert "".join(delta.content or "" for delta in deltas) == same.text


def test_not_thinking(client):
    for asked in ({"reasoning_effort": "none"}, {}):
        message = (
            chat(client, "What is 23 + 45?", seed=1, extra_body={**asked, "max_denoising_steps": 1}).choices[0].message
        )
        assert not hasattr(message, "reasoning_content")


def test_log_probabilities(client):
    for prompt, options in (("Spell the word frog.", {}), ("What is 23 + 45?", {"thinking": True})):
        same = expected(prompt, seed=1, **options)
        answer = chat(client, prompt, seed=1, logprobs=True, extra_body=options)
        content = answer.choices[0].logprobs.content
        assert "".join(one.token for one in content) == same.text
        assert b"".join(bytes(one.bytes) for one in content) == same.text.encode()
        assert [one.logprob for one in content] == pytest.approx(same.log_probs[-len(content) :], abs=1e-4)
    same = expected("Spell the word bear.", seed=1, regex="[bear ]+")
    content = chat(client, "Spell the word bear.", seed=1, logprobs=True, extra_body={"regex": "[bear ]+"}).choices[0]
    content = content.logprobs.content
    assert "".join(one.token for one in content) == same.text
    assert [one.logprob for one in content] == pytest.approx(same.log_probs[-len(content) :], abs=1e-4)
    *_, last = chat(client, "Spell the word frog.", seed=1, logprobs=True, stream=True)
    assert "".join(one.token for one in last.choices[0].logprobs.content) == "f r o g"


# answers of a form


def test_a_json_schema(client):
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
    schema["required"] = ["name", "age"]
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
    answer = chat(client, JSON_PROMPT, seed=0, response_format=form)
    assert answer.choices[0].message.content == engine_of(DEMO).generate(JSON_PROMPT, seed=0, schema=schema).text
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)


def test_a_json_object(client):
    answer = chat(client, "Spell the word cat.", seed=0, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)
    table, accepting, _ = build_dfa(translate({"type": "object"}).expression)

    def is_written(value):
        state = 0
        for byte in json.dumps(value).encode():
            state = table[state, byte]
        return accepting[state]

    for fits in ({}, {"a": [1, "b", None, True, {"c": {"d": 1.5}}]}, {"a": {"b": {"c": {}}}}):
        assert is_written(fits)
    for other in ([], 1, {"a": {"b": {"c": {"d": {"e": {}}}}}}):
        assert not is_written(other)


def test_a_regular_expression(client):
    answer = chat(client, "What is 23 + 45?", seed=0, extra_body={"regex": r"\d{1,3}"})
    assert re.fullmatch(r"\d{1,3}", answer.choices[0].message.content)


# tools


def test_a_conversation_with_a_tool(client):
    messages = said("What is the weather in Oslo?")
    answer = chat(client, messages, seed=1, tools=[WEATHER])
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    messages += [choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "rainy"}]
    answer = chat(client, messages, seed=1, tools=[WEATHER])
    assert answer.choices[0].message.content == "The weather in Oslo is rainy."
    assert answer.choices[0].finish_reason == "stop"
    messages[-1]["content"] = [{"type": "text", "text": "rainy"}]
    again = chat(client, messages, seed=1, tools=[WEATHER])
    assert again.usage.prompt_tokens == answer.usage.prompt_tokens


def test_a_streamed_call_is_whole(client):
    parts = list(chat(client, "What is the weather in Oslo?", seed=1, tools=[WEATHER], stream=True))
    calls = [part.choices[0].delta.tool_calls for part in parts if part.choices[0].delta.tool_calls]
    assert len(calls) == 1 and parts[-2].choices[0].delta.tool_calls == calls[0]
    assert (calls[0][0].index, calls[0][0].function.name) == (0, "get_weather")
    assert json.loads(calls[0][0].function.arguments) == {"city": "Oslo"}
    assert parts[-1].choices[0].finish_reason == "tool_calls"
    assert not any(part.choices[0].delta.content for part in parts)


def test_a_function_that_is_named_is_called(client):
    named = {"type": "function", "function": {"name": "get_time"}}
    for stream in (False, True):
        answer = chat(client, "Spell the word cat.", seed=0, tools=[WEATHER, TIME], tool_choice=named, stream=stream)
        if stream:
            parts = list(answer)
            assert not any(part.choices[0].delta.content for part in parts)
            call, reason = parts[-2].choices[0].delta.tool_calls[0], parts[-1].choices[0].finish_reason
        else:
            (call,) = answer.choices[0].message.tool_calls
            assert answer.choices[0].message.content is None
            reason = answer.choices[0].finish_reason
        assert (reason, call.function.name) == ("tool_calls", "get_time")
        jsonschema.validate(json.loads(call.function.arguments), TIME["function"]["parameters"])


def test_some_function_is_called_where_one_must_be(client):
    answer = chat(client, "Spell the word cat.", seed=0, tools=[WEATHER, TIME], tool_choice="required",
                  parallel_tool_calls=False)  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    declared = {one["function"]["name"]: one["function"]["parameters"] for one in (WEATHER, TIME)}
    jsonschema.validate(json.loads(call.function.arguments), declared[call.function.name])


def test_tools_that_are_not_to_be_called_are_not_shown(client):
    for options in ({"tools": [WEATHER], "tool_choice": "none"}, {}):
        answer = chat(client, "Spell the word cat.", seed=0, **options)
        assert answer.usage.prompt_tokens == expected("Spell the word cat.", seed=0).stats.prompt_tokens


# pictures


def data_of(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_a_picture(client):
    options = {"image_tokens": 70, "exact": True}
    picture = square(BLUE, half=35)
    parts = [{"type": "image_url", "image_url": {"url": data_of(picture), "detail": "auto"}}]
    parts.append({"type": "text", "text": "What color is the shape?"})
    answer = chat(client, [{"role": "user", "content": parts}], seed=0, extra_body=options)
    same = engine_of(DEMO).generate("What color is the shape?", images=[picture], seed=0, **options)
    assert answer.choices[0].message.content == same.text == "The square is blue."
    assert answer.usage.prompt_tokens == same.stats.prompt_tokens


# completions


def test_a_text_is_continued(client):
    prefix = "Hello"
    same = engine_of(DEMO).infill(prefix, "", seed=2, **CONTINUED)
    answer = client.completions.create(model=MODEL, prompt=prefix, seed=2, extra_body=CONTINUED)
    assert (answer.object, answer.choices[0].text) == ("text_completion", same.text)
    assert answer.choices[0].finish_reason == same.finish_reason
    assert answer.usage.completion_tokens == len(same.tokens)
    parts = list(client.completions.create(model=MODEL, prompt=[prefix], seed=2, extra_body=CONTINUED, stream=True))
    assert "".join(part.choices[0].text for part in parts) == same.text
    assert parts[-1].choices[0].finish_reason == same.finish_reason


def test_a_hole_is_filled(client, monkeypatch):
    monkeypatch.setattr(infill_module, "LONGEST", 4)  # lengths that are tried, for speed
    prefix, suffix, options = "The cat saw a ", " in the garden.", {"seed": 0, "max_denoising_steps": 8}
    same = engine_of(DEMO).infill(prefix, suffix, **options)
    asked = {"prompt": prefix, "suffix": suffix, "max_tokens": 64, "model": MODEL, "extra_body": options}
    answer = client.completions.create(**asked)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (same.text, "stop")
    assert same.text
    cut = client.completions.create(**asked, stop=same.text[0])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("", "stop")


def test_a_continuation_stops(client):
    whole = engine_of(DEMO).infill("Hello", "", seed=2, **CONTINUED).text
    stop = whole[4:6]
    assert 0 < whole.find(stop) < len(whole) - 2
    for stream in (False, True):
        answer = client.completions.create(
            model=MODEL, prompt="Hello", stop=[stop, "\x00"], stream=stream, seed=2, extra_body=CONTINUED
        )
        choices = [part.choices[0] for part in answer] if stream else [answer.choices[0]]
        assert "".join(choice.text for choice in choices) == whole[: whole.find(stop)]
        assert choices[-1].finish_reason == "stop"


def test_a_stop_string_in_pieces():
    text, stops = "aab abc aabc", ["abc", "zz"]
    for cuts in itertools.combinations(range(1, len(text)), 3):
        cut, told = StopCutter(stops), ""
        for start, end in itertools.pairwise((0, *cuts, len(text))):
            told += cut.add(text[start:end])
            assert "aab ".startswith(told)
        assert (told + cut.add("", last=True), cut.stopped) == ("aab ", True)
    for whole in ("", "a", "ab", "abz"):
        cut = StopCutter(stops)
        assert "".join([*map(cut.add, whole), cut.add("", last=True)]) == whole
        assert not cut.stopped
