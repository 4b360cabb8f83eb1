"""What rank 0 tells the others: pickled messages over a connection to each.

MLX's own transport carries arrays. It is no place to wait for the next request: its ring polls, and takes a core as
long as a message is awaited.
"""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..constraints.tokens import TokenBytes
from ..distributed.group import Group
from ..distributed.launched import Place
from ..engine import Engine
from ..model.diffusion_gemma import DiffusionGemma
from ..prompt.builder import PromptBuilder
from ..prompt.vocabulary import Vocabulary, vocabulary_of

# What every rank has of its own: each kind of object, and how a rank finds its own one.
OWN: dict[str, tuple[type, Callable[[Engine], Any]]] = {
    "engine": (Engine, lambda engine: engine),
    "model": (DiffusionGemma, lambda engine: engine.model),
    "builder": (PromptBuilder, lambda engine: engine.builder),
    "tokenizer": (TokenizerWrapper, lambda engine: engine.tokenizer),
    "vocabulary": (Vocabulary, lambda engine: vocabulary_of(engine.tokenizer)),
    "token bytes": (TokenBytes, lambda engine: engine.builder.token_bytes),
}

_PLAIN = {int, str, float, bool, bytes, tuple, list, dict, type(None)}  # what a message has thousands of


class Pickler(pickle.Pickler):
    """Leaves out what every rank has of its own."""

    def persistent_id(self, value: Any) -> str | None:
        """A name for what is left out."""
        if type(value) in _PLAIN:
            return None
        return next((name for name, (kind, _) in OWN.items() if isinstance(value, kind)), None)

    def reducer_override(self, value: Any) -> Any:
        """Arrays travel by way of NumPy."""
        if isinstance(value, mx.array):
            return mx.array, (np.asarray(value),)
        return NotImplemented


class Unpickler(pickle.Unpickler):
    """Puts in what this rank has."""

    def __init__(self, data: bytes, engine: Engine | None):
        super().__init__(BytesIO(data))
        self._engine = engine

    def persistent_load(self, name: Any) -> Any:
        """What such a name stands for."""
        assert self._engine is not None
        return OWN[name][1](self._engine)


def pickled(message: Any) -> bytes:
    """A message as bytes."""
    file = BytesIO()
    Pickler(file, pickle.HIGHEST_PROTOCOL).dump(message)
    return file.getvalue()


def listen(place: Place, group: Group) -> list[Connection]:
    """Connections to the other ranks, in their order; rank 0 calls it while they call `call`."""
    key = secrets.token_bytes(32)
    with Listener((place.meeting[0], 0), backlog=place.size, authkey=key) as listener:
        group.share([*listener.address, key.hex()])
        found: dict[int, Connection] = {}
        while len(found) < place.size - 1:
            with suppress(AuthenticationError, EOFError, ConnectionError):
                connection = listener.accept()
                found[connection.recv()] = connection
    return [found[rank] for rank in sorted(found)]


def call(place: Place, group: Group) -> Connection:
    """The connection to rank 0."""
    host, port, key = group.share()
    connection = Client((host, port), authkey=bytes.fromhex(key))
    connection.send(place.rank)
    return connection
