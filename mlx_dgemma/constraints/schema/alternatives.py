"""A JSON Schema as a choice of `Flat` ones: references followed, allOf merged, anyOf, oneOf, not and if spread out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from ...errors import shown
from .flat import ALL_TYPES, Flat, Node, Part, common, without_key
from .keywords import fail, key_pointer, own_part, schemas_of
from .validity import in_bounds, is_valid_flat

MAX_ALTERNATIVES = 200  # of one schema; each may take a part of the automaton of its own
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
MAX_COMPARED = 3  # levels that are looked at to tell two schemas apart
SPLIT = "write anyOf, or give each a required property with a const of its own"


class Alternatives:
    """Knows one schema as a whole.

    Args:
        root: the schema.
        depth: how often references that lead back to themselves are followed.

    Attributes:
        recursive: whether some do.
    """

    def __init__(self, root: Any, depth: int):
        self.root, self.depth, self.recursive = root, depth, False
        self._homes: dict[int, list[Any]] = {}  # of each schema with $ref, the ones around it that define names
        self._names: dict[str, Any] = {}  # $id, $anchor
        self._cyclic: dict[int, bool] = {}
        self._kept: dict[tuple[Any, ...], tuple[Node, list[Flat]]] = {}  # the node keeps its parts' ids from new use
        self._open: list[int] = []
        self._compared = 0  # how deep `apart` is in schemas within schemas
        self._find_homes(root, [root])

    def of_root(self) -> Node:
        """The whole schema."""
        return (Part(self.root, "#", self.depth),)

    def of(self, node: Node) -> list[Flat]:
        """The schemas one of which a value must be valid for."""
        key = tuple((id(part), 0) if isinstance(part, Flat) else (id(part.schema), part.depth) for part in node)
        if key not in self._kept:
            found = [Flat(pointer=node[0].pointer if node else "#")]
            for part in node:
                found = self._both(found, [part] if isinstance(part, Flat) else self._of_part(part), part.pointer)
            self._kept[key] = node, found
        return self._kept[key][1]

    def is_valid(self, value: Any, node: Node) -> bool:
        """Whether a JSON value is valid."""
        return any(is_valid_flat(value, flat, self.is_valid) for flat in self.of(node))

    def _of_part(self, part: Part) -> list[Flat]:
        schema, pointer, depth = part
        if schema is True:
            return [Flat(pointer=pointer)]
        if schema is False:
            return []
        if not isinstance(schema, dict):
            fail(pointer, f"is {shown(schema)}; it should be an object with keywords")
        if id(schema) in self._open:
            fail(pointer, "refers to itself without a property or item between; leave that out")
        self._open.append(id(schema))
        try:
            found = [own_part(schema, pointer, depth)]
            for word in REFERENCES:
                if word in schema:
                    found = self._both(found, self._reference(schema[word], schema, part), pointer)
            for word in ("allOf", "anyOf", "oneOf", "not", "if"):
                if word in schema:
                    found = self._both(found, getattr(self, f"_{word}")(schema, part), pointer)
            return self._dependent(schema, part, found)
        finally:
            self._open.pop()

    def _both(self, first: list[Flat], second: list[Flat], pointer: str) -> list[Flat]:
        if len(first) * len(second) > MAX_ALTERNATIVES:
            fail(pointer, f"has more than {MAX_ALTERNATIVES} combinations of alternatives; write fewer of them")
        found = (common(one, other) for one in first for other in second)
        return [one for one in found if one.types and one.values != ()]

    def _reference(self, name: Any, schema: dict, part: Part) -> list[Flat]:
        target = self._target(name, schema, part.pointer)
        depth, pointer = part.depth, name if isinstance(name, str) else part.pointer
        if self._leads_back(target):
            self.recursive = True
            if depth == 0:
                return []
            depth -= 1
        return self._of_part(Part(target, pointer, depth))

    def _allOf(self, schema: dict, part: Part) -> list[Flat]:
        found = [Flat(pointer=part.pointer)]
        for one, pointer in schemas_of(schema, part.pointer, "allOf"):
            found = self._both(found, self._of_part(Part(one, pointer, part.depth)), part.pointer)
        return found

    def _anyOf(self, schema: dict, part: Part) -> list[Flat]:
        branches = schemas_of(schema, part.pointer, "anyOf")
        return [flat for one, pointer in branches for flat in self._of_part(Part(one, pointer, part.depth))]

    def _oneOf(self, schema: dict, part: Part) -> list[Flat]:
        """The branches, changed so that no value is valid for two of them. What is around them helps to see that."""
        around = {word: value for word, value in schema.items() if word in ("type", "properties", "required")}
        rest = self._of_part(Part(around, part.pointer, part.depth)) if around else [Flat()]
        branches = [
            self._both(rest, self._of_part(Part(one, pointer, part.depth)), part.pointer)
            for one, pointer in schemas_of(schema, part.pointer, "oneOf")
        ]
        kept = []
        for i, branch in enumerate(branches):
            others = [flat for j, other in enumerate(branches) if j != i for flat in other]
            kept += [one for one in (self._clear_of(flat, others) for flat in branch) if one is not None]
        if not kept:
            fail(part.pointer, f"has oneOf, of which no schema can be told apart from the others; {SPLIT}")
        return kept

    def _clear_of(self, flat: Flat, others: list[Flat]) -> Flat | None:
        """What is valid for a schema and for none of the others; None if that cannot be said."""
        for other in others:
            if not self.apart(flat, other):
                found = next((one for one in self._narrower(flat, other) if self.apart(one, other)), None)
                if found is None:
                    return None
                flat = found
        return flat

    def _narrower(self, flat: Flat, other: Flat) -> Iterator[Flat]:
        """Schemas with fewer values: with a key that tells, without one that the other needs, without its values."""
        if "object" in flat.types:
            names = sorted(flat.properties, key=lambda key: not _is_fixed(flat.properties[key]))
            for key in names:
                if key not in flat.required:
                    yield replace(flat, required=(*flat.required, key))
            needed = [key for key in other.required if key not in flat.required]
            for key in sorted(needed, key=flat.properties.__contains__):
                yield without_key(flat, key)
        if flat.values is not None:
            left = [one for one in flat.values if not is_valid_flat(one, other, self.is_valid)]
            if left:
                yield replace(flat, values=tuple(left))
        if other.values is not None:
            yield replace(flat, excluded=flat.excluded + other.values)

    def apart(self, first: Flat, second: Flat) -> bool:
        """Whether certainly no value is valid for both."""
        shared = common(first, second)
        if not shared.types or shared.values == ():
            return True
        if shared.values is not None:
            return not any(
                is_valid_flat(value, first, self.is_valid) and is_valid_flat(value, second, self.is_valid)
                for value in shared.values
            )
        if self._compared == MAX_COMPARED:
            return False
        self._compared += 1
        still_open, self._open = self._open, []
        try:
            return all(self._apart_as(kind, first, second, shared) for kind in shared.types)
        finally:
            self._compared -= 1
            self._open = still_open

    def _apart_as(self, kind: str, first: Flat, second: Flat, shared: Flat) -> bool:
        if kind == "object":
            for key in sorted(shared.required, key=lambda key: not _is_fixed(shared.properties.get(key, ()))):
                mine, other = (_deeper(flat.properties.get(key, flat.schema_of(key))) for flat in (first, second))
                if mine == other:
                    continue
                pairs = [(one, two) for one in self.of(mine) for two in self.of(other)]
                if all(self.apart(one, two) for one, two in pairs):
                    return True
            return False
        if kind in {"number", "integer"}:
            return not (shared.low is None or shared.high is None or in_bounds(shared.low.value, shared)) and (
                shared.low.value >= shared.high.value
            )
        low, high = {"array": shared.length, "string": shared.characters}.get(kind, (0, None))
        return high is not None and low > high

    def _not(self, schema: dict, part: Part) -> list[Flat]:
        return self._negated(Part(schema["not"], f"{part.pointer}/not", part.depth), "not")

    def _negated(self, part: Part, word: str) -> list[Flat]:
        """What is not valid for a schema, where that can be said."""
        found = [Flat(pointer=part.pointer)]
        for flat in self._of_part(part):
            found = self._both(found, self._without(flat, part, word), part.pointer)
        return found

    def _without(self, flat: Flat, part: Part, word: str) -> list[Flat]:
        rest = replace(
            flat, types=ALL_TYPES, values=None, properties={}, has_properties=False, required=(), low=None, high=None
        )
        plain = replace(Flat(), pointer=rest.pointer)
        if any(getattr(rest, name) != getattr(plain, name) for name in Flat.__dataclass_fields__):
            fail(
                part.pointer,
                f"has keywords in {word} that cannot be turned round; there may be type, enum, const, properties, "
                "required, minimum and maximum",
            )
        found: list[Flat] = []
        if flat.types != ALL_TYPES:
            kinds = ALL_TYPES - flat.types
            found.append(Flat(types=kinds - {"number"} if "integer" in flat.types else kinds))
        if flat.values is not None:
            found.append(Flat(types=flat.types, excluded=flat.values))
        numbers = frozenset({"number"})
        if flat.low:
            found.append(Flat(types=numbers, high=flat.low._replace(exclusive=not flat.low.exclusive)))
        if flat.high:
            found.append(Flat(types=numbers, low=flat.high._replace(exclusive=not flat.high.exclusive)))
        objects = frozenset({"object"})
        for key in flat.required:
            found.append(Flat(types=objects, properties={key: (Part(False, part.pointer, 0),)}))
        for key, node in flat.properties.items():
            inner = Part({"allOf": [one.schema for one in node if isinstance(one, Part)]}, part.pointer, part.depth)
            for other in self._negated(inner, word):
                found.append(Flat(types=objects, properties={key: (other,)}, required=(key,)))
        return found

    def _if(self, schema: dict, part: Part) -> list[Flat]:
        """What is valid for `if` and `then`, and what is not valid for `if` and is for `else`."""
        condition = Part(schema["if"], f"{part.pointer}/if", part.depth)
        then = Part(schema.get("then", True), f"{part.pointer}/then", part.depth)
        other = Part(schema.get("else", True), f"{part.pointer}/else", part.depth)
        met = self._both(self._of_part(condition), self._of_part(then), part.pointer)
        return met + self._both(self._negated(condition, "if"), self._of_part(other), part.pointer)

    def _dependent(self, schema: dict, part: Part, found: list[Flat]) -> list[Flat]:
        """What a key brings with it: either the key is missing, or all of that is there."""
        for word in ("dependentRequired", "dependentSchemas", "dependencies"):
            given = schema.get(word, {})
            if not isinstance(given, dict):
                fail(part.pointer, f"has {word} {shown(given)}; it should be an object")
            for key, needed in given.items():
                inner = {"required": needed} if isinstance(needed, list) else needed
                pointer = key_pointer(part.pointer, word, key)
                there = self._of_part(Part({"required": [key], "allOf": [inner]}, pointer, part.depth))
                missing = without_key(Flat(pointer=pointer), key)
                found = self._both(found, [missing, *there], part.pointer)
        return found

    # references

    def _find_homes(self, schema: Any, around: list[Any]) -> None:
        """Remember which schemas that define names stand around each reference."""
        if isinstance(schema, list):
            for one in schema:
                self._find_homes(one, around)
        if not isinstance(schema, dict):
            return
        if schema is not self.root and ("$defs" in schema or "definitions" in schema):
            around = [*around, schema]
        for word in ("$id", "$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(word), str):
                self._names[schema[word] if word == "$id" else f"#{schema[word]}"] = schema
        if any(word in schema for word in REFERENCES):
            self._homes[id(schema)] = around
        for word, value in schema.items():
            if word not in ("enum", "const", "default", "examples", "example"):
                self._find_homes(value, around)

    def _target(self, name: Any, schema: dict, pointer: str) -> Any:
        if isinstance(name, str) and isinstance(self.root, dict) and isinstance(self.root.get("$id"), str):
            name = name.removeprefix(self.root["$id"]) if name.startswith(f"{self.root['$id']}#") else name
        if isinstance(name, str) and name in self._names:
            return self._names[name]
        if not isinstance(name, str) or not (name == "#" or name.startswith("#/")):
            fail(pointer, f"refers to {name!r}; references should start with #/: put what it names under $defs")
        for target in self._homes.get(id(schema), [self.root]):
            found = _at(target, name)
            if found is not _MISSING:
                return found
        return fail(pointer, f"refers to {name!r}, which the schema does not have; define it")

    def _leads_back(self, target: Any) -> bool:
        """Whether references in a schema lead to it again."""
        if id(target) not in self._cyclic:
            seen: set[int] = set()
            todo = self._references(target)
            while todo:
                one = todo.pop()
                if id(one) not in seen:
                    seen.add(id(one))
                    todo += self._references(one)
            self._cyclic[id(target)] = id(target) in seen
        return self._cyclic[id(target)]

    def _references(self, schema: Any) -> list[Any]:
        """What the references in a schema refer to, and the schemas in it that are referred to by their place."""
        found, todo = [], [schema]
        while todo:
            one = todo.pop()
            if isinstance(one, list):
                todo += one
            elif isinstance(one, dict):
                found += [self._target(one[word], one, "#") for word in REFERENCES if word in one]
                todo += [value for word, value in one.items() if word not in ("$defs", "definitions", "enum", "const")]
        return found


_MISSING = object()


def _at(target: Any, pointer: str) -> Any:
    """What a JSON pointer leads to, or _MISSING."""
    for step in pointer.split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and key.isdigit() and int(key) < len(target):
            target = target[int(key)]
        elif isinstance(target, dict) and key in target:
            target = target[key]
        else:
            return _MISSING
    return target


def _is_fixed(node: Node) -> bool:
    """Whether a schema says which values there are."""
    return any(
        isinstance(part, Part) and isinstance(part.schema, dict) and {"const", "enum"} & part.schema.keys()
        for part in node
    )


def _deeper(node: Node) -> Node:
    """A schema whose references are followed although its depth is used up."""
    return tuple(part._replace(depth=max(part.depth, 1)) if isinstance(part, Part) else part for part in node)
