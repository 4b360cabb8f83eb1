"""What the endpoints take that change or continue a text: completions, editors' holes, edits and templates."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from .bodies import MAX_CHOICES, MAX_STOPS, NO_BIASES, Choices, Flag, Shared, StopString, String
from .fields import Body, Harmless, Many, Rule, doc, number, only, whole

MAX_FILES = 256
ONE_PROMPT = "it should be one string: send several in several requests, and no tokens"
STOPS = f"it should be a string that is not empty, or a list of up to {MAX_STOPS}"
NOT_REPEATED = "the prompt is not repeated: leave it out, or give false"
NO_LOGPROBS = "log-probabilities are told by /v1/chat/completions alone: leave it out, or give 0"
ELSEWHERE = "a text is continued without it: leave it out, or ask /v1/chat/completions"
NO_GRAMMAR = "a text is continued without it: leave it out"
NO_ADAPTER = "an adapter is chosen when the server starts: leave it out, or give an empty list"
WHOLE = Harmless("a hole's text comes whole, as soon as it is there")
CACHED = Harmless("what a prompt shares with an earlier one is always kept")
SAMPLERS = Harmless("a canvas takes its most probable text")
LOADED = Harmless("the model is loaded as the server was told to")
LIMIT = whole(-1)
SAMPLING = (  # that cut or shift a distribution: a canvas takes its most probable text, whatever they are
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
Stops = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None, Rule(STOPS)
]
Limit = Annotated[int | None, LIMIT, doc("The most tokens of the text, and of a hole; -1: no bound of the client's.")]
Penalty = Annotated[float | None, number(-2, 2), doc("No effect on canvases, and refused token by token.")]


class Continued(Shared):
    """What the endpoints take that write into a text."""

    stop: Stops = None
    top_p: Annotated[float | None, number(0, 1), doc("Token by token; a canvas takes its most probable text.")] = None
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    exact: Annotated[Flag, only(False, why=ELSEWHERE)] = None


class OllamaOptions(Body):
    """What Ollama's clients put into `options`."""

    num_predict: Limit = None
    temperature: Annotated[float | None, number(0, 2)] = None
    seed: Annotated[int | None, whole(0, 2**64 - 1)] = None
    stop: Stops = None
    num_ctx: Annotated[int | None, LOADED] = None
    num_keep: Annotated[int | None, LOADED] = None
    num_batch: Annotated[int | None, LOADED] = None
    num_gpu: Annotated[int | None, LOADED] = None
    num_thread: Annotated[int | None, LOADED] = None
    use_mmap: Annotated[Flag, LOADED] = None
    top_k: Annotated[int | None, SAMPLERS] = None
    top_p: Annotated[float | None, SAMPLERS] = None
    min_p: Annotated[float | None, SAMPLERS] = None
    typical_p: Annotated[float | None, SAMPLERS] = None
    repeat_penalty: Annotated[float | None, SAMPLERS] = None
    repeat_last_n: Annotated[int | None, SAMPLERS] = None
    presence_penalty: Annotated[float | None, SAMPLERS] = None
    frequency_penalty: Annotated[float | None, SAMPLERS] = None
    mirostat: Annotated[int | None, SAMPLERS] = None
    mirostat_tau: Annotated[float | None, SAMPLERS] = None
    mirostat_eta: Annotated[float | None, SAMPLERS] = None


class Completion(Continued, Choices):
    """A body of /v1/completions."""

    prompt: Annotated[
        str | Annotated[list[str], Field(min_length=1, max_length=1)],
        Rule(ONE_PROMPT),
        doc("Fill-in-the-middle markers of other models are read as prefix, suffix and other files."),
    ]
    suffix: String = None
    max_tokens: Limit = None
    thinking: Annotated[Flag, only(False, why=ELSEWHERE)] = None
    regex: Annotated[String, only(why=ELSEWHERE)] = None
    echo: Annotated[Flag, only(False, why=NOT_REPEATED)] = None
    best_of: Annotated[int | None, only(1, why="every answer is given: leave it out, and ask for n")] = None
    logprobs: Annotated[int | bool | None, only(0, False, why=NO_LOGPROBS)] = None
    keep_alive: Annotated[int | float | str | None, LOADED] = None
    options: Annotated[OllamaOptions | None, doc("As Ollama takes them; num_predict is max_tokens.")] = None


class MistralFill(Continued):
    """A body of /v1/fim/completions, as Mistral has it."""

    prompt: str
    suffix: String = None
    max_tokens: Limit = None
    max_completion_tokens: Limit = None
    min_tokens: Annotated[int | None, only(0, why="a hole is as long as its text: leave it out, or give 0")] = None
    random_seed: Annotated[int | None, whole(0, 2**64 - 1), doc("The same as `seed`.")] = None
    n: Annotated[int | None, whole(1, MAX_CHOICES)] = None


class File(Body):
    text: str
    filename: String = None


class LlamaInfill(Continued):
    """A body of /infill and /completion, as llama.cpp has them."""

    input_prefix: String = None
    input_suffix: String = None
    input_extra: Annotated[
        Many[File] | None, Field(max_length=MAX_FILES), doc("Other files, shown before the text.")
    ] = None
    prompt: Annotated[String, doc("Text that follows `input_prefix`; may hold fill-in-the-middle markers.")] = None
    seed: Annotated[int | None, whole(-1, 2**64 - 1), doc("0 unless given; -1: a random one.")] = None
    n_predict: Limit = None
    max_tokens: Annotated[int | None, LIMIT, doc("The same as `n_predict`.")] = None
    n_indent: Annotated[int | None, whole(0, 1000), doc("The text ends before a line with less indentation.")] = None
    n_cmpl: Annotated[int | None, whole(1, MAX_CHOICES), doc("Number of answers; more than one come as a list.")] = None
    response_fields: Annotated[
        Many[str] | None, doc("Paths of the fields that are sent, such as timings/prompt_n.")
    ] = None
    t_max_predict_ms: Annotated[int | None, WHOLE] = None
    t_max_prompt_ms: Annotated[int | None, WHOLE] = None
    timings_per_token: Annotated[Flag, WHOLE] = None
    return_progress: Annotated[Flag, WHOLE] = None
    cache_prompt: Annotated[Flag, CACHED] = None
    id_slot: Annotated[int | None, CACHED] = None
    n_keep: Annotated[int | None, CACHED] = None
    n_cache_reuse: Annotated[int | None, CACHED] = None
    samplers: Annotated[list[str] | str | None, SAMPLERS] = None
    typical_p: Annotated[float | None, SAMPLERS] = None
    repeat_penalty: Annotated[float | None, SAMPLERS] = None
    repeat_last_n: Annotated[int | None, SAMPLERS] = None
    penalty_last_n: Annotated[int | None, SAMPLERS] = None
    mirostat: Annotated[int | None, SAMPLERS] = None
    mirostat_tau: Annotated[float | None, SAMPLERS] = None
    mirostat_eta: Annotated[float | None, SAMPLERS] = None
    min_keep: Annotated[int | None, SAMPLERS] = None
    n_probs: Annotated[int | None, only(0, why=NO_LOGPROBS)] = None
    logit_bias: Annotated[list[Any] | dict[str, Any] | None, Field(max_length=0), Rule(NO_BIASES)] = None
    grammar: Annotated[String, only("", why=NO_GRAMMAR)] = None
    json_schema: Annotated[Any, only({}, why=NO_GRAMMAR)] = None
    lora: Annotated[list[Any] | None, Field(max_length=0), Rule(NO_ADAPTER)] = None
    ignore_eos: Annotated[Flag, only(False, why="a text ends where it ends: leave it out")] = None

    @property
    def choices(self) -> int:
        """Number of answers; none where no tokens are asked for."""
        return 0 if self.limit == 0 else self.n_cmpl or 1

    @property
    def limit(self) -> int | None:
        """The most tokens."""
        return self.max_tokens if self.n_predict is None else self.n_predict


class Rewritten(Shared):
    """What the endpoints take that give a text of their own making back."""

    stop: Annotated[list[str] | None, Field(max_length=0), Rule("the text has an end of its own: leave it out")] = None
    exact: Annotated[Flag, only(False, why="the reference knows no such task: leave it out")] = None
    n: Annotated[int | None, whole(1, MAX_CHOICES)] = None
    max_tokens: Annotated[int | None, whole(1)] = None


class Edit(Rewritten):
    """A body of /v1/edits."""

    input: Annotated[str, doc("The text to rewrite.", pattern="\\S")]
    instruction: Annotated[str, doc("What to do with it.", pattern="\\S")]
    strength: Annotated[float | None, number(0, 1), doc("The share of the text that begins as noise; 0.5.")] = None


class Fill(Rewritten):
    """A body of /v1/fill."""

    template: Annotated[str, doc("A text with a name in every pair of braces, as Python's str.format takes it.")]
    holes: Annotated[
        dict[str, int | str | list[str]],
        doc("For each name a number of characters, a list of texts, or a regular expression."),
    ]
    prompt: Annotated[String, doc("A request that the text answers.")] = None
