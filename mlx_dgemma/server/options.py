"""Generation options of a request as arguments of `Engine.prepare`, and the engine's errors as the server's."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from ..decoding.options import MIN_TEMPERATURE, MODES, TOKEN_OPTIONS, GenerationOptions
from ..errors import DgemmaError, OptionError, PromptError
from .errors import ApiError
from .schemas.bodies import Shared
from .schemas.fields import format_value, reject
from .settings import Settings

OPTIONS = {field.name for field in fields(GenerationOptions)} - {"max_tokens", "stop", "temperature"}
LIMITS = ("max_completion_tokens", "max_tokens")


def generation_arguments(body: Shared, defaults: GenerationOptions) -> dict[str, Any]:
    """Arguments of `Engine.prepare`: the seed of the first answer, and max_tokens, stop and options where given.

    Args:
        body: the request.
        defaults: the checkpoint's options.

    Raises:
        ApiError: values that contradict each other.
    """
    given = {name: value for name in sorted(OPTIONS) if (value := getattr(body, name, None)) is not None}
    limits = [limit for name in LIMITS if (limit := getattr(body, name, None)) is not None]
    if limits:
        given["max_tokens"] = min(limits)
    if body.stop:
        given["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    temperature, seed = body.temperature, body.seed
    if temperature and temperature < MIN_TEMPERATURE:
        reject("temperature", temperature, f"it should be 0, or a number from {MIN_TEMPERATURE:g} to 2")
    by_token = body.mode in MODES[1:]
    if by_token and temperature is not None:
        given["temperature"] = temperature
    if not by_token:
        given = {name: value for name, value in given.items() if name not in TOKEN_OPTIONS}
    if not by_token and temperature not in (None, 0, 1):
        for name in ("t_min", "t_max"):
            if name in given:
                reject(
                    "temperature", temperature, f"and {name} is {given[name]}, which it would multiply: leave one out"
                )
            given[name] = getattr(defaults, name) * temperature
    if seed is not None and seed > 2**64 - body.choices:
        reject("seed", seed, f"it should be a whole number, from 0 to {2**64 - body.choices}")
    with as_api_errors():
        defaults.override(**given)
    return {**given, "seed": seed if seed is not None else 0 if temperature == 0 else secrets.randbits(32)}


@contextmanager
def as_api_errors(prompt: str = "messages", **renamed: str) -> Iterator[None]:
    """Turn the engine's errors into `ApiError`s that name the request parameter.

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
        known = {*OPTIONS, "max_tokens", "stop", "seed", "regex", "schema", "tools", *renamed}
        name = words[0] if words and words[0] in known else None
        raise ApiError(str(error), renamed.get(name, name) if name else None) from None
    except DgemmaError as error:
        raise ApiError(str(error)) from None


def check_model(name: str | None, settings: Settings) -> str:
    """Return the served model's name: an alias if the request has one.

    Raises:
        ApiError: the request names another model (404).
    """
    if name in settings.aliases:
        return str(name)
    if name not in (None, "", "default", settings.model):
        raise ApiError(
            f"The model {format_value(name)} is not served here; ask for {settings.model!r}, leave it out, or start "
            "the server with --alias for this name.",
            "model",
            404,
            "model_not_found",
        )
    return settings.model
