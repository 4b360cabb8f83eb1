"""Prompts on their way through an engine, and conversations that keep what they have encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from ..model.kv_cache import Prefix

if TYPE_CHECKING:
    pass


class Session:
    """A conversation's prefix and pictures: a prompt that begins as the last one did encodes only what is new.

    Attributes:
        prefix: the keys and values held.
        held: what they are of: token ids, and for a placeholder its picture's digest.
        features: soft tokens of the pictures seen so far, by digest.
    """

    def __init__(self, prefix: Prefix):
        self.prefix = prefix
        self.cache_key: list[int | str] = []
        self.features: dict[str, mx.array] = {}

    def shared(self, wanted: list[int | str]) -> int:
        """Tokens at the beginning that a prompt has in common with what is held."""
        pairs = enumerate(zip(self.cache_key, wanted))
        return next((i for i, (mine, new) in pairs if mine != new), min(len(self.cache_key), len(wanted)))

    def reuse(self, wanted: list[int | str]) -> int:
        """Go back to what the prefix shares with a prompt; returns how many tokens that are."""
        count = self.prefix.rewind(self.shared(wanted))
        del self.cache_key[count:]
        return count

    def fork(self) -> Session:
        """The same conversation, which can go on by itself; arrays are copied when one of them writes."""
        other = Session(self.prefix.fork())
        other.cache_key, other.features = list(self.cache_key), dict(self.features)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of unified memory held."""
        return self.prefix.nbytes + sum(a.nbytes for a in self.features.values())
