"""Typed request bodies: JSON becomes pydantic models, and what is wrong with it one sentence that names the field."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from ..errors import ApiError

MAX_INTEGER = 2**31 - 1  # default upper bound of integer fields
MAX_DIGITS = 40  # of an integer; parsing takes quadratic time in the number of digits
MAX_VALUES = 100_000  # objects, lists and commas of a body outside its strings
MAX_ITEMS = 4096  # of a list of messages, parts or calls
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
SENTENCES = {  # by pydantic's names of errors
    "string_type": "it should be a string",
    "bool_type": "it should be true or false",
    "int_type": "it should be a whole number",
    "float_type": "it should be a number",
    "list_type": "it should be a list",
    "dict_type": "it should be a JSON object",
    "model_type": "it should be a JSON object",
    "model_attributes_type": "it should be a JSON object",
    "too_short": "it should have at least {min_length}: give more",
    "too_long": "it should have at most {max_length:,}: send fewer",
    "string_too_long": "at most {max_length:,} characters are read: give a shorter one",
    "literal_error": "it should be {expected}",
    "union_tag_invalid": "it should be {expected_tags}",
}
UNIONS = ("messages", "content", "input", "response_format", "format")  # fields of objects that tags distinguish
ORDER = {"missing": 1, "extra_forbidden": 2}  # wrong values are told before these
B = TypeVar("B", bound="Body")
T = TypeVar("T")
Many = Annotated[list[T], Field(max_length=MAX_ITEMS)]


class Body(BaseModel):
    """An object of a request. Unknown fields are refused, and a null field counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Rule:
    """Annotation of a field: the values it takes, and what the sentence about others says behind the value.

    Args:
        why: such as "it should be a string".
        schema: takes the place of the type's own.
    """

    def __init__(self, why: str, schema: CoreSchema | None = None):
        self._why, self._schema = why, schema

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """What pydantic asks of an annotation."""
        return core_schema.custom_error_schema(
            self._schema or handler(source), custom_error_type="why", custom_error_message=self._why
        )


class Harmless:
    """Annotation of a field that changes no answer here: it is accepted, and `ignored` tells its name.

    Args:
        why: it changes nothing, such as "a label".
        neutral: values that mean what is done anyway; they are not told.
        canvases: whether it changes nothing on canvases alone; token by token it is honoured.
    """

    def __init__(self, why: str, neutral: tuple[Any, ...] = (), canvases: bool = False):
        self.why, self.neutral, self.canvases = why, neutral, canvases

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """What pydantic asks of an annotation: the description says that the field changes nothing."""
        found = handler(schema)
        where = " on canvases" if self.canvases else ""
        return {**found, "description": f"Accepted and told in `x_ignored`{where}: {self.why}."}


class Unread(BaseModel):
    """An object of a request of which only the type is looked at. It changes no answer, so `ignored` tells its path."""

    model_config = ConfigDict(extra="allow")


def harmless(field: FieldInfo) -> Harmless | None:
    """What makes a field harmless, if it is."""
    return next((one for one in field.metadata if isinstance(one, Harmless)), None)


def harmless_fields(kind: type[Body], path: str = "") -> Iterator[tuple[str, Harmless]]:
    """The harmless fields of a body and of the objects in it, by their paths, such as "messages[].name"."""
    for name, field in kind.model_fields.items():
        here, mark = f"{path}{field.alias or name}", harmless(field)
        if mark is not None:
            yield here, mark
        else:
            for inner, is_listed in _objects_in(field.annotation):
                yield from harmless_fields(inner, f"{here}[]." if is_listed else f"{here}.")


def _objects_in(annotation: Any, is_listed: bool = False) -> Iterator[tuple[type[Body], bool]]:
    """The kinds of objects that a field may have, with whether they stand in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Body):
        yield annotation, is_listed
    for one in get_args(annotation):
        yield from _objects_in(one, is_listed or get_origin(annotation) is list)


def ignored(body: Body, path: str = "", by_token: bool = False) -> list[str]:
    """The paths of the given fields that change no answer, such as "messages[0].name".

    Args:
        body: whose fields are looked at.
        path: of the body.
        by_token: whether text comes token by token.
    """
    found = []
    for name in sorted(body.model_fields_set & type(body).model_fields.keys()):
        field, value = type(body).model_fields[name], getattr(body, name)
        here, mark = f"{path}{field.alias or name}", harmless(field)
        if mark is not None:
            if value is not None and value not in mark.neutral and not (mark.canvases and by_token):
                found.append(here)
            continue
        for place, one in (
            ((f"{here}[{i}]", one) for i, one in enumerate(value)) if isinstance(value, list) else ((here, value),)
        ):
            if isinstance(one, Body):
                found += ignored(one, f"{place}.", by_token)
            elif isinstance(one, Unread):
                found.append(place)
    return found


def doc(text: str | None = None, **keywords: str) -> Any:
    """The description of a field, and further keywords of its JSON Schema."""
    return Field(description=text, json_schema_extra=dict(keywords))


def whole(low: int, high: int = MAX_INTEGER, unset: bool = False) -> Rule:
    """An integer from `low` to `high`. With `unset`, -1 counts as absent."""
    bounds = f"at least {low}" if high == MAX_INTEGER else f"from {low} to {high}"
    schema: CoreSchema = core_schema.int_schema(strict=True, ge=low, le=high)
    if unset:
        schema = core_schema.no_info_before_validator_function(
            lambda value: None if type(value) is int and value == -1 else value,
            core_schema.nullable_schema(schema),
            json_schema_input_schema=core_schema.union_schema([schema, core_schema.literal_schema([-1])]),
        )
    return Rule(f"it should be a whole number, {bounds}", schema)


def number(low: float, high: float) -> Rule:
    """A number from `low` to `high`."""
    schema = core_schema.float_schema(strict=True, ge=low, le=high, allow_inf_nan=False)
    return Rule(f"it should be a number from {low:g} to {high:g}", schema)


def only(*allowed: Any, why: str) -> Rule:
    """One of these values, or nothing at all."""

    def check(value: Any) -> Any:
        if not any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in allowed):
            raise ValueError
        return value

    described = core_schema.literal_schema(list(allowed)) if allowed else core_schema.none_schema()
    return Rule(why, core_schema.no_info_plain_validator_function(check, json_schema_input_schema=described))


def parse_body(model: type[B], body: bytes) -> B:
    """Read the JSON body of a request.

    Raises:
        ApiError: the body is no JSON (see `parse_json`), or a field is missing, wrong or unknown.
    """
    data = parse_json(body)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = min(error.errors(include_url=False), key=lambda one: ORDER.get(one["type"], 0))
        raise _api_error(first, data) from None


def parse_json(body: bytes) -> Any:
    """Parse JSON.

    Raises:
        ApiError: the body is not UTF-8 or not JSON; is nested too deeply or has more than `MAX_VALUES` values; or
            contains NaN or infinity, a duplicate key, a lone surrogate, or an integer of more than `MAX_DIGITS` digits.
    """
    if _count(body) > MAX_VALUES and _count(STRING.sub(b"", body)) > MAX_VALUES:
        raise ApiError(f"The body has more than {MAX_VALUES:,} values; send fewer.", status=413)
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
    return data


def reject(path: str, value: Any, why: str) -> NoReturn:
    """Refuse a field with the message "PATH is VALUE; WHY."."""
    raise ApiError(f"{path} is {format_value(value)}; {why}.", path)


def reject_missing(path: str) -> NoReturn:
    """Refuse a request without this field."""
    raise ApiError(f"{path} is missing; give it.", path)


def format_value(value: Any) -> str:
    """A value of a body for an error message, shortened."""
    if isinstance(value, Body):
        value = dict.fromkeys(value.model_fields_set)
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return reprlib.repr(value) if isinstance(value, str) else json.dumps(value)


def _api_error(error: Any, data: Any) -> ApiError:
    """One of pydantic's errors as a sentence. Its location holds tags of unions, which are no part of the path."""
    kind, context, path, field = error["type"], error.get("ctx", {}), "", ""
    for i, step in enumerate(error["loc"]):
        last = i == len(error["loc"]) - 1
        if isinstance(data, dict) and field in UNIONS and step in (data.get("role"), data.get("type")):
            field = ""  # a tag, even if a field has the same name
        elif isinstance(data, dict) and (step in data or (last and kind in ("missing", "extra_forbidden"))):
            name = step if len(step) <= 64 else step[:61] + "..."
            path, data, field = f"{path}.{name}" if path else name, data.get(step), step
        elif isinstance(data, list) and isinstance(step, int):
            path, data = f"{path}[{step}]", data[step]
    if kind.startswith("union_tag"):
        name = context["discriminator"].strip("'")
        path = f"{path}.{name}"
        kind, data = ("missing", None) if data.get(name) is None else (kind, data[name])
    if kind == "missing":
        return ApiError(f"{path} is missing; give it.", path)
    if kind == "extra_forbidden":
        return ApiError(f"{path} is not supported here; leave it out.", path)
    if kind == "sentence":
        return ApiError(error["msg"], path)
    words = {
        name: value.replace("', '", "' or '").replace("'", '"') if isinstance(value, str) else value
        for name, value in context.items()
    }
    why = error["msg"] if kind == "why" else _sentence(error, words)
    end = "" if why.endswith("...") else "."
    return ApiError(f"{path or 'The body'} is {format_value(data)}; {why}{end}", path or None)


def _sentence(error: Any, words: dict[str, Any]) -> str:
    """What is wrong by pydantic's name of it, else in pydantic's words."""
    if known := SENTENCES.get(error["type"]):
        return known.format(**words)
    told = error["msg"].rstrip(".").removeprefix("Input should be ").removeprefix("Value error, ")
    return f"it should be {told}" if error["msg"].startswith("Input should be ") else told[:1].lower() + told[1:]


def _count(body: bytes) -> int:
    return sum(map(body.count, (b"{", b"[", b",")))


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
