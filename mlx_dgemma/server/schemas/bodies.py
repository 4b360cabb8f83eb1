"""What the endpoints take: every field with its type, bounds and description, from which the API's is made."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from ...decoding.options import MIN_TEMPERATURE
from ...model.patches import BUDGETS
from .fields import Body, Harmless, Many, Rule, doc, number, only, whole
from .messages import ChatMessage, Function, Tools

MAX_CHOICES = 8  # answers to one request
MAX_STEPS = 1000  # denoising steps of a canvas: each takes a random key, and the row stays occupied
MAX_STOPS = 4
MAX_REGEX_LENGTH = 20_000  # characters; a million take seconds to parse
TOOL_CHOICE = "it should be auto, none, required, or name a function"
STOPS = f"it should be a string that is not empty, or a list of up to {MAX_STOPS}"
ONE_BUDGET = f"it should be one of {', '.join(map(str, BUDGETS))}"
NO_BIASES = "biases are unknown to this model: leave it out"
ONLY_CHOSEN = "only the chosen tokens' are known: leave it out, or give 0"
NO_PENALTIES = only(0, why="penalties are unknown to this model: leave it out, or give 0")
LABEL = Harmless("a label of the client's")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Flag = bool | None
String = str | None
Whole = Annotated[int | None, whole(0)]
Nats = Annotated[float | None, number(0, 1e9)]
TokenLimit = Annotated[int | None, whole(1)]
StopString = Annotated[str, Field(min_length=1)]


class StreamOptions(Body):
    include_usage: Flag = None
    include_obfuscation: Annotated[Flag, only(False, why="no padding is sent: leave it out")] = None


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
    metadata: dict[str, Any] | None = None
    store: Annotated[Flag, only(False, why="nothing is stored here: leave it out, or give false")] = None
    service_tier: Annotated[String, only("auto", "default", why="there are no tiers here: leave it out")] = None
    seed: Annotated[int | None, whole(0, 2**64 - 1), doc("The same seed gives the same answer.")] = None
    temperature: Annotated[float | None, number(0, 2), doc("Of canvases it multiplies t_min, t_max; 0: seed 0.")] = None
    top_p: Annotated[float | None, number(0.001, 1), doc("Token by token; whole canvases take 1 alone.")] = None
    stop: Annotated[StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None, Rule(STOPS)] = None
    mode: Annotated[
        Literal["diffusion", "causal", "speculative"] | None,
        doc("How text comes."),
    ] = None
    top_k: Annotated[Whole, doc("Token by token: draw among so many of the most probable tokens; 0: all.")] = None
    min_p: Annotated[float | None, number(0, 1), doc("Token by token: least share of the best one's probability.")] = (
        None
    )
    repetition_penalty: Annotated[float | None, number(0.01, 100), doc("Token by token: above 1, fewer repeats.")] = (
        None
    )
    exact: Annotated[Flag, doc("Use the reference implementation's stopping rule only.")] = None
    fast: Annotated[Flag, doc("Fix confident tokens for good, which takes fewer steps.")] = None
    max_denoising_steps: Annotated[int | None, whole(1, MAX_STEPS), doc("The most denoising steps of a canvas.")] = None
    stability_threshold: Annotated[Whole, doc("Number of previous steps that must have the same best tokens.")] = None
    patience: Annotated[Whole, doc("Steps without a change that finish a canvas; 0 disables this.")] = None
    image_tokens: Annotated[int | None, only(*BUDGETS, why=ONE_BUDGET), doc("The most soft tokens of a picture.")] = (
        None
    )
    entropy_bound: Annotated[Nats, doc("Nats; a higher value accepts more positions in one step.")] = None
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
    frequency_penalty: Annotated[float | None, NO_PENALTIES] = None
    presence_penalty: Annotated[float | None, NO_PENALTIES] = None
    logit_bias: Annotated[dict[str, Any] | None, Field(max_length=0), Rule(NO_BIASES)] = None


class Answered(Shared):
    """What the endpoints take that answer a chat."""

    thinking: Flag = None
    thinking_budget: Annotated[Whole, doc("Tokens after which a thought is ended; on canvases alone.")] = None
    regex: Annotated[String, Field(max_length=MAX_REGEX_LENGTH), doc("Of Python; the whole answer matches it.")] = None
    parallel_tool_calls: Flag = None
    top_logprobs: Annotated[int | None, only(0, why=ONLY_CHOSEN)] = None


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
