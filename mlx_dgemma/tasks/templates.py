"""Texts with slots in braces, written as str.format reads them."""

from __future__ import annotations

import string
from typing import NamedTuple


class Slot(NamedTuple):
    """A {name} in a template."""

    name: str
    formatting: str  # what follows the name in the braces, such as "!r:>3"; "" in a plain slot


def split_template(template: str) -> tuple[list[str], list[Slot]]:
    """The n + 1 texts and the n slots of a template, in order. {{ and }} are single braces of a text.

    Raises:
        ValueError: the braces do not match.
    """
    texts, slots = [""], []
    for text, name, spec, conversion in string.Formatter().parse(template):
        texts[-1] += text  # `parse` ends a part at every {{ and }}
        if name is not None:
            slots.append(Slot(name, (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")))
            texts.append("")
    return texts, slots
