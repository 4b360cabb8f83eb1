"""OpenAI's options and this model's own, as the arguments of `Engine.prepare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

from ..decoding.options import GenerationOptions
from ..errors import DgemmaError, OptionError, PromptError
from ..model.patches import BUDGETS
from .errors import ApiError
from .fields import WHOLE, Fields, shown
from .settings import Settings

FLAGS = ("exact", "fast")
STEPS = 1000  # of a canvas at most: a key is kept for each, and nobody else gets the row meanwhile
WHOLES = {  # (least, most) of each
    "max_denoising_steps": (1, STEPS),
    "stability_threshold": (0, WHOLE),
    "patience": (0, WHOLE),
    "image_tokens": (1, WHOLE),
}
COLDEST = 0.001  # temperature above 0; logits divided by much less are no numbers
NUMBERS = {
    "entropy_bound": (0, 1e9),
    "t_min": (0, 1e9),
    "t_max": (COLDEST, 1e9),
    "confidence_threshold": (0, 1e9),
    "certainty_threshold": (0, 1e9),
}
STOPS = 4  # stop strings at most
CHOICES = 8  # answers to one request at most
_NAMES = {field.name for field in dataclass_fields(GenerationOptions)}


def arguments_of(
    fields: Fields, defaults: GenerationOptions, limits: Sequence[str] = ("max_tokens",), choices: int = 1
) -> dict[str, Any]:
    """Read how to generate; the messages, tools and form of the answer are the caller's.

    Reads `limits`, seed, stop, temperature, top_p, frequency_penalty, presence_penalty, logit_bias, regex, thinking,
    and the names of `GenerationOptions` that a request may set.

    Args:
        fields: of the body.
        defaults: the checkpoint's own options, `scheduler.engine.options`.
        limits: names under which the most tokens may be given; the first is the one to name.
        choices: answers asked for; their seeds follow each other.

    Returns:
        Arguments of `Engine.prepare`: max_tokens, seed, stop, regex, thinking and options, those that were given.

    Raises:
        ApiError: a wrong value, or one that cannot be honoured, by its name.
    """
    given: dict[str, Any] = {}
    for limit in limits:
        if (most := fields.whole(limit, 1)) is not None:
            if given.get("max_tokens", most) != most:
                fields.refuse(limit, f"but {limits[0]} is {given['max_tokens']}: leave one out")
            given["max_tokens"] = most
    given["seed"] = fields.whole("seed", 0, 2**64 - choices)
    given["stop"] = _stop(fields)
    given["regex"] = fields.text("regex")
    given["thinking"] = fields.flag("thinking")
    given |= {name: fields.flag(name) for name in FLAGS}
    given |= {name: fields.whole(name, *limits) for name, limits in WHOLES.items()}
    given |= {name: fields.number(name, *limits) for name, limits in NUMBERS.items()}
    if given["image_tokens"] not in (None, *BUDGETS):
        fields.refuse("image_tokens", f"it should be one of {', '.join(map(str, BUDGETS))}")
    temperature = fields.number("temperature", 0, 2)
    if temperature and temperature < COLDEST:
        fields.refuse("temperature", f"it should be 0, or a number from {COLDEST:g} to 2")
    if temperature == 0 and given["seed"] is None:
        given["seed"] = 0
    if temperature not in (None, 0, 1):
        for name in ("t_min", "t_max"):
            if given[name] is not None:
                fields.refuse("temperature", f"and {name} is {given[name]}, which it would multiply: leave one out")
            given[name] = getattr(defaults, name) * temperature
    fields.only("top_p", 1, 1.0, why="nucleus sampling is unknown to this model: leave it out, or give 1")
    for name in ("frequency_penalty", "presence_penalty"):
        fields.only(name, 0, 0.0, why="penalties are unknown to this model: leave it out, or give 0")
    fields.only("logit_bias", {}, why="biases are unknown to this model: leave it out")
    given = {name: value for name, value in given.items() if value is not None}
    with blamed():
        defaults.override(**{name: value for name, value in given.items() if name in _NAMES})
    return given


@contextmanager
def blamed(prompt: str = "messages", **renamed: str) -> Iterator[None]:
    """Turn what the engine refuses into an `ApiError` with the parameter's name; for use in `prepare` too.

    Args:
        prompt: the parameter that a wrong prompt is in.
        renamed: parameters whose name in the engine is another, such as schema="text.format.schema".
    """
    try:
        yield
    except PromptError as error:
        code = "context_length_exceeded" if "context leaves room" in str(error) else None
        raise ApiError(str(error), prompt, code=code) from None
    except RecursionError:
        raise ApiError(f"{prompt} is nested too deeply; send fewer levels.", prompt) from None
    except OverflowError:  # of a pattern's repeats
        raise ApiError("A number in the request is too large; give a smaller one.", renamed.get("schema")) from None
    except OptionError as error:
        words = str(error).removeprefix("The ").split(maxsplit=1)
        name = words[0] if words and words[0] in {*_NAMES, "seed", "regex", "schema", "tools", *renamed} else None
        raise ApiError(str(error), renamed.get(name, name) if name else None) from None
    except DgemmaError as error:
        raise ApiError(str(error)) from None


def _stop(fields: Fields) -> list[str] | None:
    stop = fields.take("stop")
    given = [stop] if isinstance(stop, str) else stop
    if given is None or given == []:
        return None
    if not isinstance(given, list) or len(given) > STOPS or not all(isinstance(one, str) and one for one in given):
        fields.refuse("stop", f"it should be a string that is not empty, or a list of up to {STOPS}")
    return given


@dataclass(frozen=True)
class Form:
    """How an answer is sent."""

    model: str
    choices: int
    stream: bool
    usage: bool  # at the end of a stream
    drafts: bool


def form_of(fields: Fields, settings: Settings) -> Form:
    """Read model, n, stream, stream_options and drafts, and what is accepted because it changes nothing.

    Raises:
        ApiError: 404 for another model, as OpenAI does.
    """
    name = check_model(fields.text("model"), settings)
    harmless(fields)
    stream = fields.flag("stream", False)
    drafts = fields.flag("drafts", False)
    if drafts and not stream:
        fields.refuse("drafts", "drafts are streamed: give stream true, or leave them out")
    usage, given = False, fields.object("stream_options")
    if given:
        if not stream:
            fields.refuse("stream_options", "there is no stream: give stream true, or leave it out")
        usage = given.flag("include_usage", False)
        given.only("include_obfuscation", False, why="no padding is sent: leave it out")
        given.done()
    return Form(name, fields.whole("n", 1, CHOICES, 1), stream, usage, drafts)


def check_model(name: str | None, settings: Settings) -> str:
    """The served model's name, if it is meant.

    Raises:
        ApiError: another one is.
    """
    if name not in (None, "default", settings.model):
        raise ApiError(
            f"The model {shown(name)} is not served here; ask for {settings.model!r}, or leave it out.",
            "model",
            404,
            "model_not_found",
        )
    return settings.model


def harmless(fields: Fields) -> None:
    """Read what needs no answer: labels of the asker's, no storing, and the only tier that there is."""
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        fields.text(name)
    if fields.has("metadata"):
        Fields(fields.take("metadata"), "metadata")
    fields.only("store", False, why="nothing is stored here: leave it out, or give false")
    fields.only("service_tier", "auto", "default", why="there are no tiers here: leave it out")
