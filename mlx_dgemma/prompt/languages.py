"""Languages of constraints, made once: the last few are kept, and so are the last refusals."""

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
KEPT_REFUSALS = 256


class Languages:
    """Makes the languages of one tokenizer. Any thread may ask for one.

    Args:
        token_bytes: returns the bytes of the tokenizer's tokens.
    """

    def __init__(self, token_bytes: Callable[[], TokenBytes]):
        self._token_bytes = token_bytes
        self._lock = threading.Lock()  # held while the two dicts change, not while a language is made
        self._made: dict[bytes, Language] = {}  # the least recently used first
        self._refused: dict[bytes, str] = {}

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
                return found
            refusal = self._refused.get(key)
        if refusal is not None:
            raise OptionError(refusal)
        try:
            made = LANES.get(HERE).language(kind, source, self._token_bytes(), what)
        except OptionError as error:
            self._keep(self._refused, key, str(error), KEPT_REFUSALS)
            raise
        self._keep(self._made, key, made, KEPT_LANGUAGES)
        return made

    def _keep(self, kept: dict[bytes, Any], key: bytes, value: Any, most: int) -> None:
        with self._lock:
            kept[key] = value
            for oldest in list(kept)[:-most]:
                del kept[oldest]
