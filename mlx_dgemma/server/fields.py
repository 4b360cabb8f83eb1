"""Strict reading of JSON bodies: every field has a type, and unknown fields are refused by name."""

from __future__ import annotations

import json
import math
import re
import reprlib
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ApiError

if TYPE_CHECKING:
    from starlette.requests import Request


MAX_INTEGER = 2**31 - 1  # default upper bound of integer fields
MAX_DIGITS = 40  # of an integer; parsing takes quadratic time in the number of digits


async def read_body(request: Request) -> Fields:
    """Read the JSON body of a request; its `Content-Type` is ignored.

    Raises:
        ApiError: the body is not a JSON object (400).
    """
    return parse_json(await request.body())


def parse_json(body: bytes) -> Fields:
    """Parse a JSON object.

    Raises:
        ApiError: the body is not UTF-8, not JSON or not an object; is nested too deeply; or contains NaN or infinity,
            a duplicate key, a lone surrogate, or an integer of more than `MAX_DIGITS` digits.
    """
    try:
        data = json.loads(
            body.decode(),
            parse_constant=_reject_constant,
            parse_float=_parse_float,
            parse_int=_parse_integer,
            object_pairs_hook=_parse_object,
        )
        if re.search(rb"\\u[dD]", body):
            json.dumps(data, ensure_ascii=False).encode()  # raises for a lone surrogate
    except UnicodeDecodeError as error:
        raise ApiError(f"The body is not UTF-8 (byte {error.start}); send JSON in UTF-8.") from None
    except UnicodeEncodeError:
        raise ApiError("The body has half of a surrogate pair, which is no character; send whole characters.") from None
    except RecursionError:
        raise ApiError("The body is nested too deeply; send JSON with fewer levels.") from None
    except ValueError as error:
        raise ApiError(f"The body is not JSON ({error}); send a JSON object.") from None
    return Fields(data)


class Fields:
    """One JSON object of a request. A null field counts as absent.

    Read every known field, then call `reject_unknown`. All methods raise `ApiError` (400) with the field's path as
    `param`, such as "messages[0].content" or "stream_options.include_usage".

    Args:
        data: the parsed JSON.
        location: path to the object in the body; "" for the body itself.
    """

    def __init__(self, data: Any, location: str = ""):
        self.location = location
        if not isinstance(data, dict):
            name = location or "The body"
            raise ApiError(f"{name} is {format_value(data)}; it should be a JSON object.", location or None)
        self.data: dict[str, Any] = data
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        """Path of a field in the body."""
        return f"{self.location}.{name}" if self.location else name

    def has(self, name: str) -> bool:
        """Whether a field is present and not null. This does not mark it as read."""
        return self.data.get(name) is not None

    def get(self, name: str) -> Any:
        """Value of a field of any type, or None if it is absent."""
        self._read.add(name)
        return self.data.get(name)

    def text(self, name: str, default: Any = None) -> Any:
        """A string. This method and the next five return `default` if the field is absent."""
        return self._typed(name, default, lambda value: isinstance(value, str), "it should be a string")

    def flag(self, name: str, default: Any = None) -> Any:
        """A boolean."""
        return self._typed(name, default, lambda value: isinstance(value, bool), "it should be true or false")

    def integer(self, name: str, low: int, high: int = MAX_INTEGER, default: Any = None) -> Any:
        """An integer from `low` to `high`."""
        bounds = f"at least {low}" if high == MAX_INTEGER else f"from {low} to {high}"
        return self._typed(
            name,
            default,
            lambda value: type(value) is int and low <= value <= high,
            f"it should be a whole number, {bounds}",
        )

    def number(self, name: str, low: float, high: float, default: Any = None) -> Any:
        """An integer or float from `low` to `high`."""
        return self._typed(
            name,
            default,
            lambda value: type(value) in (int, float) and low <= value <= high,
            f"it should be a number from {low:g} to {high:g}",
        )

    def choice(self, name: str, *allowed: str, default: Any = None) -> Any:
        """One of the `allowed` strings."""
        return self._typed(
            name,
            default,
            lambda value: isinstance(value, str) and value in allowed,
            f"it should be {' or '.join(map(json.dumps, allowed))}",
        )

    def array(self, name: str, default: Any = None) -> Any:
        """A list of any values."""
        return self._typed(name, default, lambda value: isinstance(value, list), "it should be a list")

    def object(self, name: str) -> Fields | None:
        """An object, or None if absent. The caller reads it and calls its `reject_unknown`."""
        value = self.get(name)
        return None if value is None else Fields(value, self.path(name))

    def objects(self, name: str) -> list[Fields]:
        """A list of objects, empty if absent. The caller reads each and calls its `reject_unknown`."""
        return [Fields(one, f"{self.path(name)}[{i}]") for i, one in enumerate(self.array(name, []))]

    def require(self, name: str) -> None:
        """Refuse the request if a field is absent."""
        if not self.has(name):
            raise ApiError(f"{self.path(name)} is missing; give it.", self.path(name))

    def allow_only(self, name: str, *allowed: Any, why: str) -> None:
        """Accept a field without effect if it is absent, null or one of the `allowed` values.

        Args:
            why: the reason given when another value is refused.
        """
        value = self.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            self.reject(name, why)

    def reject(self, name: str, why: str) -> NoReturn:
        """Refuse a field with the message "NAME is VALUE; WHY."."""
        raise ApiError(f"{self.path(name)} is {format_value(self.data.get(name))}; {why}.", self.path(name))

    def reject_unknown(self) -> None:
        """Refuse fields that were not read."""
        for name, value in self.data.items():
            if name not in self._read and value is not None:
                raise ApiError(
                    f"{self.path(shorten_name(name))} is not supported here; leave it out.",
                    self.path(shorten_name(name)),
                )

    def _typed(self, name: str, default: Any, is_valid: Any, why: str) -> Any:
        value = self.get(name)
        if value is None:
            return default
        if not is_valid(value):
            self.reject(name, why)
        return value


def format_value(value: Any) -> str:
    """A JSON value for an error message, shortened."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, str):
        return reprlib.repr(value)
    return json.dumps(value)


def shorten_name(name: str) -> str:
    """A field name for an error message, shortened."""
    return name if len(name) <= 64 else name[:61] + "..."


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:MAX_DIGITS]} is too large")
    return number


def _parse_integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found
