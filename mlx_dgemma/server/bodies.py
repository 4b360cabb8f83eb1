"""The bodies that the endpoints take: every field with its type, bounds and description. The API description is made
of them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from ..decoding.options import MIN_TEMPERATURE
from ..model.patches import BUDGETS
from .fields import Body, Many, Rule, number, only, whole
from .messages import ChatMessage, Function, Tools

MAX_CHOICES = 8  # answers to one request
MAX_STEPS = 1000  # denoising steps of a canvas: each takes a random key, and the row stays occupied
MAX_STOP_STRINGS = 4
MAX_REGEX_LENGTH = 20_000  # characters; a million take seconds to parse
TOOL_CHOICE = "it should be auto, none, required, or name a function"
NO_PENALTIES = only(0, why="penalties are unknown to this model: leave it out, or give 0")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Whole = Annotated[int | None, whole(0)]
Nats = Annotated[float | None, number(0, 1e9)]
TokenLimit = Annotated[int | None, whole(1)]
StopString = Annotated[str, Field(min_length=1)]


class StreamOptions(Body):
    """What a stream tells."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, only(False, why="no padding is sent: leave it out")] = None


class Shared(Body):
    """What every endpoint takes.

    Attributes:
        NAMES: the endpoint's own paths of the fields that `Chat` has under other ones.
    """

    NAMES: ClassVar[dict[str, str]] = {}

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    drafts: Annotated[
        bool | None, Field(description="Send the canvas after each denoising step; requires `stream`.")
    ] = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    store: Annotated[bool | None, only(False, why="nothing is stored here: leave it out, or give false")] = None
    service_tier: Annotated[str | None, only("auto", "default", why="there are no tiers here: leave it out")] = None
    seed: Annotated[int | None, whole(0, 2**64 - 1), Field(description="The same seed gives the same answer.")] = None
    temperature: Annotated[
        float | None,
        number(0, 2),
        Field(description="Multiplies t_min and t_max; 0 means seed 0 if no seed is given."),
    ] = None
    top_p: Annotated[
        float | None, only(1, why="nucleus sampling is unknown to this model: leave it out, or give 1")
    ] = None
    stop: Annotated[
        StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None,
        Rule(f"it should be a string that is not empty, or a list of up to {MAX_STOP_STRINGS}"),
    ] = None
    exact: Annotated[bool | None, Field(description="Use the reference implementation's stopping rule only.")] = None
    fast: Annotated[bool | None, Field(description="Fix confident tokens for good, which takes fewer steps.")] = None
    max_denoising_steps: Annotated[
        int | None, whole(1, MAX_STEPS), Field(description="Maximum number of denoising steps of a canvas.")
    ] = None
    stability_threshold: Annotated[
        Whole, Field(description="Number of previous steps whose most probable tokens must be the same.")
    ] = None
    patience: Annotated[
        Whole, Field(description="Finish a canvas after this many steps without a change; 0 disables this.")
    ] = None
    image_tokens: Annotated[
        int | None,
        only(*BUDGETS, why=f"it should be one of {', '.join(map(str, BUDGETS))}"),
        Field(description="Maximum number of soft tokens of a picture."),
    ] = None
    entropy_bound: Annotated[Nats, Field(description="Nats; a higher value accepts more positions in one step.")] = None
    t_min: Annotated[Nats, Field(description="Temperature at the last step.")] = None
    t_max: Annotated[
        float | None, number(MIN_TEMPERATURE, 1e9), Field(description="Temperature at the first step.")
    ] = None
    confidence_threshold: Annotated[
        Nats, Field(description="Finish a canvas when its mean entropy, in nats, is below this.")
    ] = None
    certainty_threshold: Annotated[
        Nats,
        Field(description="Finish a canvas when every position's entropy, in nats, is below this; 0 disables this."),
    ] = None

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
    logit_bias: Annotated[
        dict[str, Any] | None, Field(max_length=0), Rule("biases are unknown to this model: leave it out")
    ] = None


class Answered(Shared):
    """What the endpoints take that answer a chat."""

    thinking: bool | None = None
    regex: Annotated[
        str | None,
        Field(max_length=MAX_REGEX_LENGTH, description="A Python regular expression that the whole answer matches."),
    ] = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int | None, only(0, why="only the chosen tokens' are known: leave it out, or give 0")] = (
        None
    )


def _kind_of_choice(value: Any) -> str:
    return "word" if isinstance(value, str) else "object"


CHOICE = Discriminator(_kind_of_choice)
Word = Annotated[Literal["auto", "none", "required"], Rule(TOOL_CHOICE), Tag("word")]


class Name(Body):
    """A function's name."""

    name: str


class NamedFunction(Body):
    """The function to call."""

    function: Name
    type: Annotated[str | None, only("function", why="a function alone can be named")] = None


class TemplateArguments(Body):
    """Arguments of the chat template."""

    enable_thinking: bool | None = None


class JsonSchema(Body):
    """A form that the answer has."""

    schema_: Annotated[dict[str, Any], Field(alias="schema", description="A JSON Schema.")]
    name: str | None = None
    description: str | None = None
    strict: Annotated[bool | None, Field(description="No effect: answers are always valid.")] = None


class PlainFormat(Body):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Body):
    """JSON of a schema."""

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


ELSEWHERE = "a text is continued without it: leave it out, or ask /v1/chat/completions"


class Completion(Choices):
    """A body of /v1/completions."""

    prompt: Annotated[
        str | Annotated[list[str], Field(min_length=1, max_length=1)],
        Rule("it should be one string: send several in several requests, and no tokens"),
    ]
    suffix: str | None = None
    exact: Annotated[bool | None, only(False, why=ELSEWHERE)] = None
    thinking: Annotated[bool | None, only(False, why=ELSEWHERE)] = None
    regex: Annotated[str | None, only(why=ELSEWHERE)] = None
    echo: Annotated[bool | None, only(False, why="the prompt is not repeated: leave it out, or give false")] = None
    best_of: Annotated[int | None, only(1, why="every answer is given: leave it out, and ask for n")] = None
    logprobs: Annotated[
        int | None, only(why="log-probabilities are told by /v1/chat/completions alone: leave it out")
    ] = None
