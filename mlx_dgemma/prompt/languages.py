"""Languages of constraints, made once: the last few within a size are kept, and so are the last refusals."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable
from typing import Any

from ..constraints.language import Language
from ..constraints.tokens import TokenBytes
from ..errors import OptionError
from .lanes import HERE, LANES

KEPT_LANGUAGES = 16
KEPT_BYTES = 2**26  # of all kept languages; a single pattern of allowed size may take 20 MB and more
KEPT_REFUSALS = 256
LARGE = 2**22  # bytes; a larger language is kept from its second time on, so that those asked once push none out


class Languages:
    """Makes the languages of one tokenizer. Any thread may ask for one.

    Args:
        token_bytes: returns the bytes of the tokenizer's tokens.
        max_bytes: of the languages that are kept; the last one is kept whatever its size.
    """

    def __init__(self, token_bytes: Callable[[], TokenBytes], max_bytes: int = KEPT_BYTES):
        self._token_bytes, self._max_bytes = token_bytes, max_bytes
        self._lock = threading.Lock()  # held while the two dicts change, not while a language is made
        self._made: dict[bytes, Language] = {}  # the least recently used first
        self._refused: dict[bytes, str] = {}
        self._large: dict[bytes, None] = {}  # that were made once and are not kept

    def get(self, kind: str, source: Any, what: str) -> Language:
        """The language of a constraint; takes what `lanes.make_language` takes.

        Raises:
            OptionError: as `make_language`. What was refused once is refused again at no cost.
        """
        try:
            key = hashlib.sha256(pickle.dumps((kind, source, what))).digest()
        except RecursionError:
            raise OptionError(f"{what} is nested too deeply; give one with fewer levels.") from None
        with self._lock:
            if found := self._made.pop(key, None):
                self._made[key] = found
                self._evict()  # what a language learns of tokens takes memory, too
                return found
            refusal = self._refused.get(key)
        if refusal is not None:
            raise OptionError(refusal)
        try:
            made = LANES.get(HERE).language(kind, source, self._token_bytes(), what)
        except OptionError as error:
            with self._lock:
                self._refused[key] = str(error)
                self._evict()
            raise
        with self._lock:
            if made.nbytes > LARGE and key not in self._large:
                self._large[key] = None
            else:
                self._large.pop(key, None)
                self._made[key] = made
            self._evict()
        return made

    def _evict(self) -> None:
        """Forget what was least recently asked for, while there is too much. The lock is held."""
        for known in (self._refused, self._large):
            while len(known) > KEPT_REFUSALS:
                del known[next(iter(known))]
        sizes = {key: language.nbytes for key, language in self._made.items()}
        while len(sizes) > KEPT_LANGUAGES or (len(sizes) > 1 and sum(sizes.values()) > self._max_bytes):
            oldest = next(iter(sizes))
            del sizes[oldest], self._made[oldest]
