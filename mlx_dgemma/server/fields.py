"""JSON bodies read strictly: every field has a type, and what nobody reads is refused by its name."""

from __future__ import annotations

import json
import math
import re
import reprlib
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ApiError

if TYPE_CHECKING:
    from starlette.requests import Request


WHOLE = 2**31 - 1  # the largest whole number where nothing else bounds it
DIGITS = 40  # of a whole number; longer ones take quadratic time to read


async def read(request: Request) -> Fields:
    """The body of a request; its `Content-Type` does not matter.

    Raises:
        ApiError: it is not JSON (400), or no object.
    """
    return parse(await request.body())


def parse(body: bytes) -> Fields:
    """A body's fields.

    Raises:
        ApiError: not UTF-8, not JSON, NaN or infinity, a key twice in an object, nested too deeply, half of a surrogate
            pair, a number of more than 40 digits, or no object.
    """
    try:
        given = json.loads(
            body.decode(), parse_constant=_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_object
        )
        if re.search(rb"\\u[dD]", body):
            json.dumps(given, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ApiError(f"The body is not UTF-8 (byte {error.start}); send JSON in UTF-8.") from None
    except UnicodeEncodeError:
        raise ApiError("The body has half of a surrogate pair, which is no character; send whole characters.") from None
    except RecursionError:
        raise ApiError("The body is nested too deeply; send JSON with fewer levels.") from None
    except ValueError as error:
        raise ApiError(f"The body is not JSON ({error}); send a JSON object.") from None
    return Fields(given)


class Fields:
    """One JSON object of a request. A field that is null counts as absent.

    Read every field that there may be, then call `done`, which refuses the rest. All methods raise `ApiError` (400)
    whose `param` is the field's path, such as "messages[0].content" or "stream_options.include_usage".

    Args:
        given: the parsed JSON.
        place: the path to it, "" for the body.
    """

    def __init__(self, given: Any, place: str = ""):
        self.place = place
        if not isinstance(given, dict):
            name = place or "The body"
            raise ApiError(f"{name} is {shown(given)}; it should be a JSON object.", place or None)
        self.given: dict[str, Any] = given
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        """A field's path in the body."""
        return f"{self.place}.{name}" if self.place else name

    def has(self, name: str) -> bool:
        """Whether a field is given and not null; this does not count as reading it."""
        return self.given.get(name) is not None

    def take(self, name: str) -> Any:
        """A field of any type; None where absent."""
        self._read.add(name)
        return self.given.get(name)

    def text(self, name: str, default: Any = None) -> Any:
        """A string. This and the next five return `default` where the field is absent; see `need`."""
        return self._typed(name, default, lambda value: isinstance(value, str), "it should be a string")

    def flag(self, name: str, default: Any = None) -> Any:
        """True or false."""
        return self._typed(name, default, lambda value: isinstance(value, bool), "it should be true or false")

    def whole(self, name: str, low: int, high: int = WHOLE, default: Any = None) -> Any:
        """A whole number from `low` to `high`."""
        bounds = f"at least {low}" if high == WHOLE else f"from {low} to {high}"
        return self._typed(
            name,
            default,
            lambda value: type(value) is int and low <= value <= high,
            f"it should be a whole number, {bounds}",
        )

    def number(self, name: str, low: float, high: float, default: Any = None) -> Any:
        """A number from `low` to `high`, whole or not."""
        return self._typed(
            name,
            default,
            lambda value: type(value) in (int, float) and low <= value <= high,
            f"it should be a number from {low:g} to {high:g}",
        )

    def choice(self, name: str, *allowed: str, default: Any = None) -> Any:
        """One of some strings."""
        return self._typed(
            name,
            default,
            lambda value: isinstance(value, str) and value in allowed,
            f"it should be {' or '.join(map(json.dumps, allowed))}",
        )

    def array(self, name: str, default: Any = None) -> Any:
        """A list of anything."""
        return self._typed(name, default, lambda value: isinstance(value, list), "it should be a list")

    def object(self, name: str) -> Fields | None:
        """An object, as `Fields` to be read and `done` by the caller; None where absent."""
        value = self.take(name)
        return None if value is None else Fields(value, self.path(name))

    def objects(self, name: str) -> list[Fields]:
        """A list of objects, each to be `done` by the caller; empty where absent."""
        return [Fields(one, f"{self.path(name)}[{i}]") for i, one in enumerate(self.array(name, []))]

    def need(self, name: str) -> None:
        """Refuse where a field is absent."""
        if not self.has(name):
            raise ApiError(f"{self.path(name)} is missing; give it.", self.path(name))

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Accept a field that changes nothing: absent, null or one of some values.

        Args:
            why: what the refusal says behind "name is value; ".
        """
        value = self.take(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            self.refuse(name, why)

    def refuse(self, name: str, why: str) -> NoReturn:
        """Refuse a field: "name is value; why."."""
        raise ApiError(f"{self.path(name)} is {shown(self.given.get(name))}; {why}.", self.path(name))

    def done(self) -> None:
        """Refuse what was not read."""
        for name, value in self.given.items():
            if name not in self._read and value is not None:
                raise ApiError(
                    f"{self.path(shown_name(name))} is not supported here; leave it out.", self.path(shown_name(name))
                )

    def _typed(self, name: str, default: Any, fits: Any, why: str) -> Any:
        value = self.take(name)
        if value is None:
            return default
        if not fits(value):
            self.refuse(name, why)
        return value


def shown(value: Any) -> str:
    """A JSON value for a message, shortened."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, str):
        return reprlib.repr(value)
    return json.dumps(value)


def shown_name(name: str) -> str:
    """A field's name for a message, shortened."""
    return name if len(name) <= 64 else name[:61] + "..."


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:DIGITS]} is too large")
    return number


def _int(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found
