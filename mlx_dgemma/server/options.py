"""Request fields that the endpoints share: generation options as `Engine.prepare` arguments, and delivery."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

from ..decoding.options import MIN_TEMPERATURE, MODES, GenerationOptions
from ..errors import DgemmaError, OptionError, PromptError
from ..model.patches import BUDGETS
from .errors import ApiError
from .fields import MAX_INTEGER, Fields, format_value
from .settings import Settings

FLAGS = ("exact", "fast")
MAX_STEPS = 1000  # denoising steps of a canvas: each takes a random key, and the row stays occupied
INTEGER_LIMITS = {  # {name: (lowest, highest)}
    "max_denoising_steps": (1, MAX_STEPS),
    "stability_threshold": (0, MAX_INTEGER),
    "patience": (0, MAX_INTEGER),
    "image_tokens": (1, MAX_INTEGER),
}
NUMBER_LIMITS = {  # {name: (lowest, highest)}
    "entropy_bound": (0, 1e9),
    "t_min": (0, 1e9),
    "t_max": (MIN_TEMPERATURE, 1e9),
    "confidence_threshold": (0, 1e9),
    "certainty_threshold": (0, 1e9),
}
TOKEN_LIMITS = {"top_k": (0, MAX_INTEGER)}  # of causal and speculative mode; {name: (lowest, highest)}
TOKEN_NUMBER_LIMITS = {"min_p": (0, 1), "repetition_penalty": (0.01, 100)}
MAX_STOP_STRINGS = 4
MAX_CHOICES = 8  # answers to one request
_OPTION_NAMES = {field.name for field in dataclass_fields(GenerationOptions)}


def parse_arguments(
    fields: Fields, defaults: GenerationOptions, limits: Sequence[str] = ("max_tokens",), choices: int = 1
) -> dict[str, Any]:
    """Read the fields that control generation. Messages, tools and response format are left to the caller.

    Reads `limits`, seed, stop, temperature, top_p, frequency_penalty, presence_penalty, logit_bias, regex, thinking,
    and the `GenerationOptions` that a request may set.

    Args:
        fields: the body.
        defaults: the checkpoint's options, `scheduler.engine.options`.
        limits: field names for the token limit; error messages refer to the first.
        choices: number of answers, which take consecutive seeds.

    Returns:
        Arguments of `Engine.prepare`, only those present in the request: max_tokens, seed, stop, regex, thinking and
        generation options.

    Raises:
        ApiError: a wrong or unsupported value.
    """
    given: dict[str, Any] = {}
    for limit in limits:
        if (max_tokens := fields.integer(limit, 1)) is not None:
            if given.get("max_tokens", max_tokens) != max_tokens:
                fields.reject(limit, f"but {limits[0]} is {given['max_tokens']}: leave one out")
            given["max_tokens"] = max_tokens
    given["seed"] = fields.integer("seed", 0, 2**64 - choices)
    given["stop"] = _stop(fields)
    given["regex"] = fields.text("regex")
    given["thinking"] = fields.flag("thinking")
    given |= {name: fields.flag(name) for name in FLAGS}
    given |= {name: fields.integer(name, *bounds) for name, bounds in INTEGER_LIMITS.items()}
    given |= {name: fields.number(name, *bounds) for name, bounds in NUMBER_LIMITS.items()}
    given |= {name: fields.integer(name, *bounds) for name, bounds in TOKEN_LIMITS.items()}
    given |= {name: fields.number(name, *bounds) for name, bounds in TOKEN_NUMBER_LIMITS.items()}
    given["mode"] = fields.text("mode")
    if given["mode"] not in (None, *MODES):
        fields.reject("mode", f"it should be one of {', '.join(MODES)}")
    if given["image_tokens"] not in (None, *BUDGETS):
        fields.reject("image_tokens", f"it should be one of {', '.join(map(str, BUDGETS))}")
    temperature = fields.number("temperature", 0, 2)
    if temperature and temperature < MIN_TEMPERATURE:
        fields.reject("temperature", f"it should be 0, or a number from {MIN_TEMPERATURE:g} to 2")
    if temperature == 0 and given["seed"] is None:
        given["seed"] = 0
    by_token = given["mode"] in MODES[1:]
    if by_token:
        given["temperature"], given["top_p"] = temperature, fields.number("top_p", 0.001, 1)
    elif temperature not in (None, 0, 1):
        for name in ("t_min", "t_max"):
            if given[name] is not None:
                fields.reject("temperature", f"and {name} is {given[name]}, which it would multiply: leave one out")
            given[name] = getattr(defaults, name) * temperature
    if not by_token:
        why = "whole canvases know no nucleus sampling: leave it out, give 1, or take the mode causal"
        fields.allow_only("top_p", 1, 1.0, why=why)
    for name in ("frequency_penalty", "presence_penalty"):
        fields.allow_only(name, 0, 0.0, why="penalties are unknown to this model: leave it out, or give 0")
    fields.allow_only("logit_bias", {}, why="biases are unknown to this model: leave it out")
    given = {name: value for name, value in given.items() if value is not None}
    with as_api_errors():
        defaults.override(**{name: value for name, value in given.items() if name in _OPTION_NAMES})
    return given


@contextmanager
def as_api_errors(prompt: str = "messages", **renamed: str) -> Iterator[None]:
    """Turn the engine's errors into `ApiError`s that name the request parameter. `prepare` functions use it too.

    Args:
        prompt: the parameter to name for errors in the prompt.
        renamed: parameters that the engine calls by another name, such as schema="text.format.schema".
    """
    try:
        yield
    except PromptError as error:
        code = "context_length_exceeded" if "context leaves room" in str(error) else None
        raise ApiError(str(error), prompt, code=code) from None
    except RecursionError:
        raise ApiError(f"{prompt} is nested too deeply; send fewer levels.", prompt) from None
    except OverflowError:  # a repeat count in a pattern
        raise ApiError("A number in the request is too large; give a smaller one.", renamed.get("schema")) from None
    except OptionError as error:
        words = str(error).removeprefix("The ").split(maxsplit=1)
        name = (
            words[0] if words and words[0] in {*_OPTION_NAMES, "seed", "regex", "schema", "tools", *renamed} else None
        )
        raise ApiError(str(error), renamed.get(name, name) if name else None) from None
    except DgemmaError as error:
        raise ApiError(str(error)) from None


def _stop(fields: Fields) -> list[str] | None:
    stop = fields.get("stop")
    given = [stop] if isinstance(stop, str) else stop
    if given is None or given == []:
        return None
    if (
        not isinstance(given, list)
        or len(given) > MAX_STOP_STRINGS
        or not all(isinstance(one, str) and one for one in given)
    ):
        fields.reject("stop", f"it should be a string that is not empty, or a list of up to {MAX_STOP_STRINGS}")
    return given


@dataclass(frozen=True)
class Delivery:
    """How answers are sent.

    Attributes:
        model: the served model's name.
        choices: number of answers.
        stream: whether they are sent as server-sent events.
        usage: whether token counts are sent at the end of a stream.
        drafts: whether the canvas is sent after each denoising step.
    """

    model: str
    choices: int
    stream: bool
    usage: bool
    drafts: bool

    def envelope(self, id_prefix: str, kind: str) -> dict[str, Any]:
        """The fields `id`, `object`, `created` and `model` that begin a response body."""
        return {
            "id": f"{id_prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }


def parse_delivery(fields: Fields, settings: Settings) -> Delivery:
    """Read model, n, stream, stream_options and drafts, and the fields that are accepted and ignored.

    Raises:
        ApiError: a wrong value, or another model than the served one (404, as OpenAI does).
    """
    name = check_model(fields.text("model"), settings)
    accept_ignored(fields)
    stream = fields.flag("stream", False)
    drafts = fields.flag("drafts", False)
    if drafts and not stream:
        fields.reject("drafts", "drafts are streamed: give stream true, or leave them out")
    usage, stream_options = False, fields.object("stream_options")
    if stream_options:
        if not stream:
            fields.reject("stream_options", "there is no stream: give stream true, or leave it out")
        usage = stream_options.flag("include_usage", False)
        stream_options.allow_only("include_obfuscation", False, why="no padding is sent: leave it out")
        stream_options.reject_unknown()
    return Delivery(name, fields.integer("n", 1, MAX_CHOICES, 1), stream, usage, drafts)


def check_model(name: str | None, settings: Settings) -> str:
    """Return the served model's name.

    Raises:
        ApiError: the request names another model (404).
    """
    if name not in (None, "default", settings.model):
        raise ApiError(
            f"The model {format_value(name)} is not served here; ask for {settings.model!r}, or leave it out.",
            "model",
            404,
            "model_not_found",
        )
    return settings.model


def accept_ignored(fields: Fields) -> None:
    """Read the fields that are accepted and ignored: client labels, `store: false`, and the default service tier."""
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        fields.text(name)
    if fields.has("metadata"):
        Fields(fields.get("metadata"), "metadata")
    fields.allow_only("store", False, why="nothing is stored here: leave it out, or give false")
    fields.allow_only("service_tier", "auto", "default", why="there are no tiers here: leave it out")
