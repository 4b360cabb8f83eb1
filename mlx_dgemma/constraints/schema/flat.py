"""`Flat`: a JSON Schema without combining keywords, and what two of them have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Union

from .numbers import Bound

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
ALL_TYPES = frozenset(TYPES) - {"integer"}  # which "number" holds


class Part(NamedTuple):
    """A schema as it is written.

    Attributes:
        schema: a dict or a bool.
        pointer: the JSON pointer to it.
        depth: how often references that lead back to themselves may still be followed in it.
    """

    schema: Any
    pointer: str
    depth: int


Node = tuple[Union[Part, "Flat"], ...]  # schemas that a value is valid for all at once; () is any JSON
NOTHING: Node = (Part(False, "", 0),)


@dataclass(frozen=True, eq=False)
class Flat:
    """Schemas merged. What is None or empty does not limit anything."""

    types: frozenset[str] = ALL_TYPES
    values: tuple[Any, ...] | None = None  # enum and const
    excluded: tuple[Any, ...] = ()
    properties: dict[str, Node] = field(default_factory=dict)
    has_properties: bool = False  # whether the keyword is there, be it empty
    required: tuple[str, ...] = ()
    additional: Node | None = None
    patterned: tuple[tuple[str, Node], ...] = ()
    names: Node = ()
    members: tuple[int, int | None] = (0, None)
    prefix: tuple[Node, ...] = ()
    items: Node | None = None
    length: tuple[int, int | None] = (0, None)  # of an array
    unique: bool = False
    contains: tuple[tuple[Node, int], ...] = ()
    characters: tuple[int, int | None] = (0, None)
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    low: Bound | None = None
    high: Bound | None = None
    multiples: tuple[Any, ...] = ()
    pointer: str = "#"

    def schema_of(self, key: str) -> Node:
        """What the value of a key that is not among the properties must be."""
        return self.additional or () if not self.patterned else ()


def common(first: Flat, second: Flat) -> Flat:
    """What is valid for both."""
    keys = [*first.properties, *(key for key in second.properties if key not in first.properties)]
    properties = {key: _property(first, key) + _property(second, key) for key in keys}
    values = first.values
    if second.values is not None:
        mine = second.values if values is None else values
        values = tuple(value for value in mine if any(same(value, other) for other in second.values))
    prefix = tuple(_item(first, i) + _item(second, i) for i in range(max(len(first.prefix), len(second.prefix))))
    return Flat(
        types=_common_types(first.types, second.types),
        values=values,
        excluded=first.excluded + second.excluded,
        properties=properties,
        has_properties=first.has_properties or second.has_properties,
        required=tuple(dict.fromkeys(first.required + second.required)),
        additional=_joined(first.additional, second.additional),
        patterned=first.patterned + second.patterned,
        names=first.names + second.names,
        members=_tighter(first.members, second.members),
        prefix=prefix,
        items=_joined(first.items, second.items),
        length=_tighter(first.length, second.length),
        unique=first.unique or second.unique,
        contains=first.contains + second.contains,
        characters=_tighter(first.characters, second.characters),
        patterns=tuple(dict.fromkeys(first.patterns + second.patterns)),
        formats=tuple(dict.fromkeys(first.formats + second.formats)),
        low=max((bound for bound in (first.low, second.low) if bound), default=None),
        high=min(
            (bound for bound in (first.high, second.high) if bound),
            key=lambda high: (high.value, not high.exclusive),
            default=None,
        ),
        multiples=first.multiples + second.multiples,
        pointer=max(first.pointer, second.pointer, key=len),
    )


def without_key(flat: Flat, key: str) -> Flat:
    """Objects without a key, and whatever is no object."""
    return replace(flat, properties={**flat.properties, key: NOTHING})


def same(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal: 1 and 1.0 are, True and 1 are not."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


def type_set(types: Iterable[str]) -> frozenset[str]:
    """Types without "integer" where there is "number"."""
    kept = set(types)
    return frozenset(kept - {"integer"} if "number" in kept else kept)


def _common_types(first: frozenset[str], second: frozenset[str]) -> frozenset[str]:
    both = set(first & second)
    for one, other in ((first, second), (second, first)):
        if "integer" in one and "number" in other:
            both.add("integer")
    return type_set(both)


def _joined(first: Node | None, second: Node | None) -> Node | None:
    return second if first is None else first if second is None else first + second


def _property(flat: Flat, key: str) -> Node:
    return flat.properties[key] if key in flat.properties else flat.schema_of(key)


def _item(flat: Flat, i: int) -> Node:
    return flat.prefix[i] if i < len(flat.prefix) else flat.items or ()


def _tighter(first: tuple[int, int | None], second: tuple[int, int | None]) -> tuple[int, int | None]:
    highs = [high for high in (first[1], second[1]) if high is not None]
    return max(first[0], second[0]), min(highs, default=None)
