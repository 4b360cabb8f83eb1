"""The bodies of Ollama's API. Each stands for a chat, or for a text to continue or to fill."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, create_model
from pydantic_core import core_schema

from ...decoding.options import GenerationOptions
from ...prompt.messages import Message
from .bodies import Chat, Flag, JsonSchema, PlainFormat, SchemaFormat, String
from .editing import Completion
from .fields import Body, Harmless, Many, Rule, doc, only, reject
from .messages import Tools, parse_data_url

LATEST = ":latest"  # the tag that Ollama's clients put behind a name without one
RUNS = Harmless("how the model is run, not what it says")
OFF = Harmless("a part of mirostat, which is off")
NO_MIROSTAT = only(0, why="mirostat is unknown here: leave it out, or give 0")
NEUTRAL = only(1, why="this cut is unknown here: leave it out, or give 1")
NO_TEMPLATE = only("", why="the checkpoint's own template is used: leave it out, or send raw true")
NO_CONTEXT = only([], why="nothing is kept here: send the whole conversation to /api/chat")
NO_LENGTH = "it should be a whole number, at least 1, or -1 for the server's own limit"
THINK = "it should be true, false, low, medium or high"
FORM = 'it should be "json" or a JSON Schema'


def _either(kind: type, schema: core_schema.CoreSchema, words: Sequence[str], why: str) -> Rule:
    """A value of the type, or one of the words."""

    def check(value: Any) -> Any:
        if type(value) is not kind and not (isinstance(value, str) and value in words):
            raise ValueError
        return value

    described = core_schema.union_schema([schema, core_schema.literal_schema(list(words))])
    return Rule(why, core_schema.no_info_plain_validator_function(check, json_schema_input_schema=described))


def _length(value: int) -> int:
    if value not in (-2, -1) and value < 1:
        raise ValueError
    return value


def _picture(text: str) -> bytes:
    return parse_data_url(text if text[:5].lower() == "data:" else f"data:image/png;base64,{text}")


Picture = Annotated[str, AfterValidator(_picture), doc("Base64.", contentEncoding="base64")]
Form = Annotated[Any, _either(dict, core_schema.dict_schema(), ("json", ""), FORM)]
Thinking = Annotated[Any, _either(bool, core_schema.bool_schema(), ("low", "medium", "high"), THINK)]
LENGTH = core_schema.no_info_after_validator_function(_length, core_schema.int_schema(strict=True))
Length = Annotated[int | None, Rule(NO_LENGTH, LENGTH)]
SHARED = {f.name for f in fields(GenerationOptions)} | {"presence_penalty", "frequency_penalty"}
APART = ("max_tokens", "top_k", "repetition_penalty")  # shared, but under another name or with other values


class OllamaOnly(Body):
    """The options that a chat has not, or under another name."""

    num_predict: Length = None
    seed: Annotated[int | None, doc("The same seed gives the same answer; below 0: a random one.")] = None
    top_k: Annotated[int | None, doc("Token by token: draw among so many of the most probable tokens.")] = None
    repeat_penalty: Annotated[float | None, doc("Token by token: above 1, fewer repeats.")] = None
    repeat_last_n: Annotated[int | None, doc("0 switches repeat_penalty off.")] = None
    num_ctx: Annotated[int | None, Harmless("the whole context is always there")] = None
    num_keep: Annotated[int | None, Harmless("no message is left out of a long chat")] = None
    num_batch: Annotated[int | None, RUNS] = None
    num_gpu: Annotated[int | None, RUNS] = None
    num_thread: Annotated[int | None, RUNS] = None
    main_gpu: Annotated[int | None, RUNS] = None
    num_gqa: Annotated[int | None, RUNS] = None
    numa: Annotated[Flag, RUNS] = None
    low_vram: Annotated[Flag, RUNS] = None
    f16_kv: Annotated[Flag, RUNS] = None
    use_mmap: Annotated[Flag, RUNS] = None
    use_mlock: Annotated[Flag, RUNS] = None
    penalize_newline: Annotated[Flag, Harmless("new lines are tokens like others")] = None
    mirostat: Annotated[int | None, NO_MIROSTAT] = None
    mirostat_tau: Annotated[float | None, OFF] = None
    mirostat_eta: Annotated[float | None, OFF] = None
    tfs_z: Annotated[float | None, NEUTRAL] = None
    typical_p: Annotated[float | None, NEUTRAL] = None


if TYPE_CHECKING:
    Options = OllamaOnly
else:  # with the options that a chat has under the same name
    Options = create_model(
        "OllamaOptions",
        __base__=OllamaOnly,
        **{
            name: (field.annotation, field)
            for name, field in Chat.model_fields.items()
            if name in SHARED and name not in APART
        },
    )


class OllamaBody(Body):
    """What both endpoints take."""

    model: String = None
    stream: Annotated[Flag, doc("Lines of JSON, unless it is false.")] = None
    format: Annotated[Form, doc("json: any object; a JSON Schema: an answer that is valid for it.")] = None
    think: Thinking = None
    keep_alive: Annotated[Any, Harmless("the model stays loaded while the server runs")] = None
    logprobs: Flag = None
    top_logprobs: Annotated[int | None, Harmless("only the chosen token's is known")] = None
    truncate: Annotated[Flag, Harmless("a prompt that does not fit is refused")] = None
    shift: Annotated[Flag, Harmless("an answer ends where the context ends")] = None
    options: Options | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return self.stream is not False

    def shared(self) -> dict[str, Any]:
        """The fields that every body of OpenAI's has."""
        options = self.options or Options()
        names = [name for name in Chat.model_fields if name in options.model_fields_set and name in SHARED]
        given = {name: getattr(options, name) for name in names if name not in APART}
        if options.num_predict is not None and options.num_predict > 0:
            given["max_tokens"] = options.num_predict
        if options.seed is not None and options.seed >= 0:
            given["seed"] = options.seed
        if options.top_k is not None and options.top_k > 0:
            given["top_k"] = options.top_k
        if options.repeat_penalty not in (None, 1) and options.repeat_last_n != 0:
            given["repetition_penalty"] = options.repeat_penalty
        return {**given, "model": self.model and self.model.removesuffix(LATEST), "stream": self.streams}

    def chat(self, **more: Any) -> Chat:
        """The chat to answer, without its messages."""
        form: Any = PlainFormat(type="json_object") if self.format == "json" else None
        if isinstance(self.format, dict):
            form = SchemaFormat(type="json_schema", json_schema=JsonSchema.model_validate({"schema": self.format}))
        effort = self.think if isinstance(self.think, str) else None
        return OllamaAsChat.model_construct(
            messages=[],
            response_format=form,
            thinking=None if effort else self.think,
            reasoning_effort=effort,
            logprobs=self.logprobs,
            **more,
            **self.shared(),
        )


class OllamaAsChat(Chat):
    """A chat in the names of Ollama's fields."""

    NAMES: ClassVar[dict[str, str]] = {"response_format": "format", "reasoning_effort": "think"}


class OllamaFunction(Body):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    index: Any = None
    description: Any = None


class OllamaCall(Body):
    function: OllamaFunction
    id: String = None
    type: Literal["function"] = "function"


class OllamaMessage(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: String = None
    images: Many[Picture] | None = None
    tool_calls: Many[OllamaCall] | None = None
    tool_name: Annotated[String, doc("Whose result it is; without one, results are in the order of the calls.")] = None
    tool_call_id: String = None
    name: String = None


class OllamaChat(OllamaBody):
    """A body of /api/chat."""

    messages: Many[OllamaMessage] = Field(default_factory=list)
    tools: Tools | None = None


class OllamaGenerate(OllamaBody):
    """A body of /api/generate."""

    prompt: str = ""
    suffix: Annotated[String, doc("The text behind a hole that is filled.")] = None
    system: String = None
    images: Many[Picture] | None = None
    raw: Annotated[Flag, doc("Continue the prompt as it is, without the template.")] = None
    template: Annotated[String, NO_TEMPLATE] = None
    context: Annotated[list[int] | None, NO_CONTEXT] = None

    def completion(self) -> Completion:
        """The text to continue or to fill.

        Raises:
            ApiError: a field that only a chat has.
        """
        for name in ("system", "images", "format", "think", "logprobs"):
            if value := getattr(self, name):
                why = "a text is continued without it: leave it out, or raw and suffix"
                reject(name, len(value) if name == "images" else value, why)
        return Completion.model_construct(prompt=self.prompt, suffix=self.suffix or None, **self.shared())


class OllamaShow(Body):
    """A body of /api/show."""

    model: String = None
    name: String = None
    verbose: Annotated[Flag, Harmless("all is told")] = None
    system: Annotated[String, only("", why="nothing is changed here: leave it out")] = None
    template: Annotated[String, NO_TEMPLATE] = None
    options: Annotated[dict[str, Any] | None, Harmless("nothing is generated")] = None


def ollamas_name(path: str) -> str:
    """Ollama's path of a field of a chat."""
    path = {"max_tokens": "num_predict", "repetition_penalty": "repeat_penalty"}.get(path, path)
    return f"options.{path}" if path in Options.model_fields else path


def ollama_messages(body: OllamaChat) -> list[Message]:
    """Messages as `Engine.prepare` takes them. A tool's result is matched with its call by name, else by order.

    Raises:
        ApiError: a result without a call, or pictures where no one can show any.
    """
    found: list[Message] = []
    waiting = _Waiting([])
    for i, given in enumerate(body.messages):
        if given.images and given.role not in ("user", "tool"):
            reject(f"messages[{i}].images", given.images, "pictures belong to a message of the user or a tool")
        message: Message = {"role": given.role, "content": _content(given.content, given.images)}
        if given.thinking and given.role == "assistant":
            message["reasoning_content"] = given.thinking
        if given.tool_calls:
            message["tool_calls"] = calls = [_call(call, f"call_{i}_{k}") for k, call in enumerate(given.tool_calls)]
            waiting = _Waiting([(call["id"], call["function"]["name"]) for call in calls])
        if given.role == "tool":
            asked = given.tool_call_id or given.tool_name or given.name
            call_id = waiting.take(asked)
            if call_id is None:
                why = "no call before it waits for this result: send the assistant's message with its tool_calls"
                reject(f"messages[{i}].tool_name", asked, why)
            message["tool_call_id"] = call_id
        found.append(message)
    return found


class _Waiting:
    """Calls without a result.

    Args:
        calls: (id, name) of each, in their order.
    """

    def __init__(self, calls: Sequence[tuple[str, str]]):
        self._calls = dict(enumerate(calls))
        self._called: dict[str, deque[int]] = defaultdict(deque)  # numbers of calls by id and by name
        for number, call in enumerate(calls):
            for word in {*call}:
                self._called[word].append(number)

    def take(self, asked: str | None) -> str | None:
        """The id of the first call with this id or name, or of any, which waits no more; None if there is none."""
        numbers = deque(self._calls) if asked is None else self._called.get(asked, deque())
        while numbers:
            if (call := self._calls.pop(numbers.popleft(), None)) is not None:
                return call[0]
        return None


def prompt_messages(body: OllamaGenerate) -> list[Message]:
    """The messages of a prompt."""
    system: list[Message] = [{"role": "system", "content": body.system}] if body.system else []
    return [*system, {"role": "user", "content": _content(body.prompt, body.images)}]


def _content(text: str, images: Sequence[Any] | None) -> Any:
    if not images:
        return text
    return [*({"type": "image", "image": one} for one in images), *([{"type": "text", "text": text}] if text else [])]


def _call(call: OllamaCall, otherwise: str) -> Message:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id or otherwise, "type": "function", "function": function}
