"""The path of a file that a text names, as programs and terminals write it."""

from __future__ import annotations

import os
import shlex
import unicodedata
from collections.abc import Iterator
from contextlib import suppress


def local_path(text: str) -> str:
    """The path itself if it exists, else what it is as a `file:` address or as a terminal writes a dropped file.

    A `file:` address is read in any case; what else names no file comes back as it is.
    """
    if os.path.lexists(text):
        return text
    if text.strip().lower().startswith("file:"):
        return next(filter(os.path.lexists, _forms(_of_address(text.strip()))), _of_address(text.strip()))
    return next((one for form in _readings(text) for one in _forms(form) if os.path.lexists(one)), text)


def _of_address(address: str) -> str:
    import urllib.parse

    parts = urllib.parse.urlsplit(address, allow_fragments=False)
    return urllib.parse.unquote(parts.path + (f"?{parts.query}" if parts.query else ""))


def _readings(text: str) -> Iterator[str]:
    """What a text may mean: blanks around it, `~`, and a shell's quotes and backslashes."""
    bare = text.strip()
    yield bare
    yield os.path.expanduser(bare)
    with suppress(ValueError):  # quotes that do not match
        words = shlex.split(bare)
        if len(words) == 1:
            yield words[0]
            yield os.path.expanduser(words[0])


def _forms(path: str) -> Iterator[str]:
    """A name with its accents composed and decomposed: file systems differ."""
    yield path
    yield unicodedata.normalize("NFC", path)
    yield unicodedata.normalize("NFD", path)
