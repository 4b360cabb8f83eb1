"""What the endpoints take: every field with its type, bounds and description, from which the API's is made."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from ...decoding.options import MIN_TEMPERATURE
from ...model.patches import BUDGETS
from .fields import Body, Harmless, Many, Rule, doc, number, only, whole
from .messages import ChatMessage, Function, Tools

MAX_CHOICES = 8  # answers to one request
MAX_STEPS = 1000  # denoising steps of a canvas: each takes a random key, and the row stays occupied
MAX_STOPS = 64
MAX_STOP_LENGTH = 1000  # characters
MAX_TOP_LOGPROBS = 20
MAX_STATED = 1000  # texts to choose from
MAX_REGEX_LENGTH = 20_000  # characters; a million take seconds to parse
TOOL_CHOICE = "it should be auto, none, required, or name a function"
STOPS = f"it should be a string of 1 to {MAX_STOP_LENGTH:,} characters, or a list of up to {MAX_STOPS}"
ONE_BUDGET = f"it should be one of {', '.join(map(str, BUDGETS))}"
NO_BIASES = "biases are unknown to this model: leave it out"
NO_PENALTIES = Harmless("the model knows no such penalty", (0,))
NO_REPEATS = Harmless("a canvas knows no penalty", (1,), canvases=True)
KEPT = "a canvas is answered with the most probable token of every place, which no cut leaves out"
NOT_CUT = (Harmless(KEPT, (1,), canvases=True), Harmless(KEPT, (0,), canvases=True))
LABEL = Harmless("a label of the client's")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Flag = bool | None
String = str | None
Whole = Annotated[int | None, whole(0)]
Nats = Annotated[float | None, number(0, 1e9)]
TokenLimit = Annotated[int | None, whole(1, unset=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(Body):
    include_usage: Flag = None
    include_obfuscation: Annotated[Flag, Harmless("no padding is sent", (False,))] = None


class Shared(Body):
    """What every endpoint takes.

    Attributes:
        NAMES: the endpoint's own paths of the fields that `Chat` has under other ones.
    """

    NAMES: ClassVar[dict[str, str]] = {}

    model: String = None
    stream: Flag = None
    stream_options: StreamOptions | None = None
    drafts: Annotated[Flag, doc("Send the canvas after each denoising step; requires `stream`.")] = None
    user: Annotated[String, LABEL] = None
    safety_identifier: Annotated[String, LABEL] = None
    prompt_cache_key: Annotated[String, LABEL] = None
    prompt_cache_retention: Annotated[String, Harmless("prefixes are kept while there is room")] = None
    cache_prompt: Annotated[Flag, Harmless("prefixes are kept without being asked", (True,))] = None
    keep_alive: Annotated[Any, Harmless("the model stays loaded")] = None
    metadata: Annotated[dict[str, Any] | None, LABEL] = None
    client_metadata: Annotated[dict[str, Any] | None, LABEL] = None
    store: Annotated[Flag, Harmless("nothing is stored", (False,))] = None
    service_tier: Annotated[String, Harmless("there are no tiers", ("auto", "default"))] = None
    seed: Annotated[
        int | None,
        whole(0, 2**64 - 1, unset=True),
        doc("The same seed gives the same answer; -1 draws one."),
    ] = None
    temperature: Annotated[float | None, number(0, 2), doc("Of canvases it multiplies t_min, t_max; 0: seed 0.")] = None
    top_p: Annotated[float | None, number(0.001, 1), NOT_CUT[0]] = None
    stop: Annotated[StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None, Rule(STOPS)] = None
    mode: Annotated[
        Literal["diffusion", "causal", "speculative", "auto"] | None,
        doc("How text comes."),
    ] = None
    top_k: Annotated[int | None, whole(0, unset=True), NOT_CUT[1]] = None
    min_p: Annotated[float | None, number(0, 1), NOT_CUT[1]] = None
    repetition_penalty: Annotated[float | None, number(0.01, 100), NO_REPEATS] = None
    exact: Annotated[Flag, doc("Use the reference implementation's stopping rule only.")] = None
    fast: Annotated[Flag, doc("Fix confident tokens for good, which takes fewer steps.")] = None
    max_denoising_steps: Annotated[int | None, whole(1, MAX_STEPS), doc("The most denoising steps of a canvas.")] = None
    stability_threshold: Annotated[Whole, doc("Number of previous steps that must have the same best tokens.")] = None
    patience: Annotated[Whole, doc("Steps without a change that finish a canvas; 0 disables this.")] = None
    canvas: Annotated[
        Literal["auto", "full"] | Annotated[int, Field(ge=1, le=2**31 - 1)] | None,
        Rule("it should be auto, full or a whole number, at least 1"),
        doc("auto computes each canvas as far as the answer goes; a number: tokens of the first canvas, then doubled."),
    ] = None
    image_tokens: Annotated[int | None, only(*BUDGETS, why=ONE_BUDGET), doc("The most soft tokens of a picture.")] = (
        None
    )
    entropy_bound: Annotated[Nats, doc("Nats; a higher value accepts more positions in one step.")] = None
    entropy_rise: Annotated[Nats, doc("Share of entropy_bound that each step adds to it.")] = None
    effort: Annotated[
        Literal["low", "medium", "high"] | None,
        doc("Denoising steps for an answer, not thinking: low is fast, high keeps entropy_bound as it is."),
    ] = None
    t_min: Annotated[Nats, doc("Temperature at the last step.")] = None
    t_max: Annotated[float | None, number(MIN_TEMPERATURE, 1e9), doc("Temperature at the first step.")] = None
    confidence_threshold: Annotated[Nats, doc("Nats; a lower mean entropy finishes a canvas.")] = None
    certainty_threshold: Annotated[Nats, doc("Nats; lower entropies everywhere finish a canvas; 0 disables this.")] = (
        None
    )

    def path(self, name: str) -> str:
        """This endpoint's path of a field of `Chat`."""
        return self.NAMES.get(name, name)

    @property
    def choices(self) -> int:
        """Number of answers."""
        return getattr(self, "n", None) or 1

    @property
    def usage(self) -> bool:
        """Whether token counts are sent at the end of a stream."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Choices(Shared):
    """What the endpoints with several choices take."""

    n: Annotated[int | None, whole(1, MAX_CHOICES)] = None
    max_tokens: TokenLimit = None
    frequency_penalty: Annotated[float | None, number(-2, 2), NO_PENALTIES] = None
    presence_penalty: Annotated[float | None, number(-2, 2), NO_PENALTIES] = None
    logit_bias: Annotated[dict[str, Any] | None, Field(max_length=0), Rule(NO_BIASES)] = None


Pattern = Annotated[String, Field(max_length=MAX_REGEX_LENGTH)]
Regex = Annotated[Pattern, doc("Of Python; the whole answer matches it.")]
Choice = Annotated[list[Annotated[str, Field(min_length=1)]] | None, Field(min_length=1, max_length=MAX_STATED)]


class StructuredOutputs(Body):
    """What an answer must be, as vLLM takes it."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json"), doc("A JSON Schema.")] = None
    regex: Pattern = None
    choice: Annotated[Choice, doc("One of these texts.")] = None
    json_object: Flag = None
    disable_any_whitespace: Annotated[Flag, Harmless("JSON is written in one way")] = None
    disable_additional_properties: Annotated[Flag, Harmless("the schema says it")] = None
    disable_fallback: Annotated[Flag, Harmless("there is one way to decode")] = None
    whitespace_pattern: Annotated[String, Harmless("JSON is written in one way")] = None


def _either(texts: list[str] | None) -> str | None:
    return None if texts is None else "|".join(map(re.escape, texts))


class Answered(Shared):
    """What the endpoints take that answer a chat."""

    thinking: Flag = None
    thinking_budget: Annotated[Whole, doc("Tokens after which a thought is ended; on canvases alone.")] = None
    regex: Regex = None
    parallel_tool_calls: Annotated[Flag, doc("False: of several calls the first is answered.")] = None
    top_logprobs: Annotated[
        int | None, whole(0, MAX_TOP_LOGPROBS), Harmless("only the chosen token's is known", (0, 1))
    ] = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[dict[str, Any] | str | None, doc("Another name for structured_outputs.json.")] = None
    guided_regex: Annotated[Pattern, doc("Another name for regex.")] = None
    guided_choice: Annotated[Choice, doc("Another name for structured_outputs.choice.")] = None
    guided_decoding_backend: Annotated[String, Harmless("there is one way to decode")] = None
    verbosity: Annotated[String, Harmless("a hint: ask for it in words", ("medium",))] = None

    @property
    def constraints(self) -> dict[str, tuple[str, Any]]:
        """By their paths the schemas and patterns of an answer: ("schema", a dict or JSON text) or ("regex", text)."""
        own, asked = self.structured_outputs or StructuredOutputs(), {}
        given = {
            "regex": ("regex", self.regex),
            "guided_json": ("schema", self.guided_json),
            "guided_regex": ("regex", self.guided_regex),
            "guided_choice": ("regex", _either(self.guided_choice)),
            "structured_outputs.json": ("schema", own.json_),
            "structured_outputs.regex": ("regex", own.regex),
            "structured_outputs.choice": ("regex", _either(own.choice)),
            "structured_outputs.json_object": ("schema", {"type": "object"} if own.json_object else None),
        }
        asked = {path: one for path, one in given.items() if one[1] is not None}
        form = getattr(self, "response_format", None)
        if form is not None and form.type != "text":
            schema = {"type": "object"} if form.type == "json_object" else getattr(self, "schema_asked", None)
            asked[self.path("response_format")] = ("schema", schema)
        return asked


def _kind_of_choice(value: Any) -> str:
    return "word" if isinstance(value, str) else "object"


CHOICE = Discriminator(_kind_of_choice)
Word = Annotated[Literal["auto", "none", "required"], Rule(TOOL_CHOICE), Tag("word")]


class Name(Body):
    name: str


class NamedFunction(Body):
    function: Name
    type: Annotated[str | None, only("function", why="a function alone can be named")] = None


class TemplateArguments(Body):
    enable_thinking: bool | None = None


class JsonSchema(Body):
    schema_: Annotated[dict[str, Any], Field(alias="schema"), doc("A JSON Schema.")]
    name: String = None
    description: String = None
    strict: Annotated[Flag, doc("No effect: answers are always valid.")] = None


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class Chat(Choices, Answered):
    """A body of /v1/chat/completions."""

    messages: Many[ChatMessage]
    max_completion_tokens: TokenLimit = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateArguments | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Tools | None = None
    tool_choice: Annotated[Word | Annotated[NamedFunction, Tag("object")], CHOICE] | None = None
    logprobs: bool | None = None
    modalities: Annotated[list[str] | None, only(["text"], why="text alone is answered: leave it out")] = None
    prediction: Annotated[Any, Harmless("a hint for speed")] = None

    @property
    def functions(self) -> list[Function]:
        """The functions among the tools."""
        return [tool.function for tool in self.tools or ()]

    @property
    def named_function(self) -> str | None:
        """The function that must be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedFunction) else None

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The schema of a json_schema."""
        form = self.response_format
        return form.json_schema.schema_ if isinstance(form, SchemaFormat) else None
