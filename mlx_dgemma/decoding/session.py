"""`Session`: a conversation that keeps what it has encoded, and `PromptTokens`, what it encodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import mlx.core as mx
import numpy as np

from ..errors import OptionError
from ..model.diffusion_gemma import DiffusionGemma
from ..model.kv_cache import Prefix
from ..model.patches import Patches, join
from .prefill import encode_in_chunks, evaluate

KEPT_PICTURES = 64  # whose soft tokens a conversation keeps, the newest


@dataclass(frozen=True)
class Picture:
    """A picture or video frame of a prompt."""

    digest: str  # of its pixels and its budget
    patches: Patches

    @property
    def tokens(self) -> int:
        """Its soft tokens."""
        return self.patches.tokens[0]


@dataclass
class PromptTokens:
    """A prompt as the model reads it."""

    tokens: list[int]  # a placeholder for each soft token of a picture included
    cache_key: list[int | str]  # the same with a picture's digest for each of its placeholders
    pictures: list[Picture] = field(default_factory=list)
    frame_seconds: list[float] = field(default_factory=list)  # times of video frames
    transcripts: list[str] = field(default_factory=list)  # texts that stand for audio

    def without_last(self) -> PromptTokens:
        """All tokens but the last one, which is text."""
        return replace(self, tokens=self.tokens[:-1], cache_key=self.cache_key[:-1])

    def extend(self, tokens: list[int]) -> None:
        """Put more tokens behind."""
        self.tokens, self.cache_key = [*self.tokens, *tokens], [*self.cache_key, *tokens]


class Session:
    """A conversation's prefix and pictures: a prompt that begins as the last one did encodes only what is new.

    Args:
        model: the model.
        capacity: positions that are allocated at once; more grow them in steps.

    Attributes:
        prefix: the keys and values.
        cache_key: what they are of: token ids, and for a placeholder its picture's digest.
        features: soft tokens of the pictures seen so far, by digest.
        reused_tokens: tokens of the last prompt that were not encoded again.
        images_encoded: pictures of the last prompt that were run through the vision tower.
        snapshot: a copy of the session at the place of the last prompt that `encode` was asked for.
        owner: the request that is being generated with it, or None.
        rewinds: keep what it takes to go back to a prompt's end: beyond the window, the rings once more.
    """

    def __init__(self, model: DiffusionGemma, capacity: int = 0):
        self.model, self.prefix = model, model.new_prefix(capacity=capacity)
        self.cache_key: list[int | str] = []
        self.features: dict[str, mx.array] = {}
        self.reused_tokens = self.images_encoded = 0
        self.snapshot: Session | None = None
        self.owner: object | None = None
        self.rewinds = True

    def __repr__(self) -> str:
        return f"Session({len(self.cache_key)} tokens)"

    def acquire(self, owner: object, model: DiffusionGemma) -> None:
        """Take the session for one request, until `release`.

        Raises:
            OptionError: it belongs to another model, whose keys this one cannot read, or to another request.
        """
        self.check(model)
        if self.owner is not None:
            raise OptionError(
                "The session is in use by another answer; read that to its end or close its stream first, or take "
                "another session."
            )
        self.owner = owner

    def check(self, model: DiffusionGemma) -> None:
        """Refuse a model that is not the session's own: `OptionError`."""
        if model is not self.model:
            raise OptionError("The session belongs to another engine; take one from this engine's session().")

    def release(self, owner: object) -> None:
        """Let the session go; does nothing if it belongs to somebody else."""
        if self.owner is owner:
            self.owner = None

    def shared(self, wanted: list[int | str]) -> int:
        """Tokens at the beginning that a prompt has in common with what is encoded."""
        pairs = enumerate(zip(self.cache_key, wanted))
        return next((i for i, (mine, new) in pairs if mine != new), min(len(self.cache_key), len(wanted)))

    def rewind_to_shared(self, wanted: list[int | str]) -> int:
        """Go back to what the prefix shares with a prompt; returns how many tokens that are."""
        count = self.prefix.rewind(self.shared(wanted))
        del self.cache_key[count:]
        return count

    def reset(self) -> None:
        """Forget what was encoded, which is not to be trusted; pictures stay known."""
        self.prefix, self.cache_key, self.snapshot = self.model.new_prefix(), [], None

    def encode(self, prompt: PromptTokens, chunk: int | None = None, snapshot_at: int = 0) -> Iterator[None]:
        """Encode what the prefix does not hold of a prompt, and yield after every chunk.

        Args:
            prompt: the prompt.
            chunk: tokens at once, as `encode_in_chunks` takes it.
            snapshot_at: position of the prompt at which a copy of the session is kept, as `snapshot`; 0: none.
        """
        tokens, self.snapshot = prompt.tokens, None
        self.reused_tokens = self.rewind_to_shared(prompt.cache_key)
        features, taken = self._encode_pictures(prompt), 0
        for name in list(self.features)[:-KEPT_PICTURES]:
            del self.features[name]
        between = [snapshot_at] if self.reused_tokens < snapshot_at < len(tokens) else []
        for start, end in pairwise([self.reused_tokens, *between, None]):
            new = np.array([tokens[start:end]], np.int32)
            count = 0 if features is None else int((new == self.model.config.image_token_id).sum())
            of_part = [features[taken : taken + count]] if features is not None and count else []
            taken += count
            chunks = encode_in_chunks(self.model, self.prefix, new, chunk, features=of_part)
            while self._encode_chunk(chunks, prompt):
                yield
            if end is not None:
                self.snapshot = self.fork()
        if self.rewinds:
            self.prefix.set_rewind_point()

    def _encode_chunk(self, chunks: Iterator[None], prompt: PromptTokens) -> bool:
        """Encode one chunk; returns whether there was one left."""
        with self._undone_if_interrupted(len(prompt.tokens) - self.prefix.offset):
            found = next(chunks, self) is None
            self.cache_key = prompt.cache_key[: self.prefix.offset]
        return found

    @contextmanager
    def _undone_if_interrupted(self, length: int) -> Iterator[None]:
        """Encode at most `length` tokens whole or not at all: layers write their rings one after the other.

        After an interrupt the session is what it was, or what it was at its rewind point. After an error of MLX
        nothing is known of the arrays, so it is reset.
        """
        offset = self.prefix.offset
        try:
            yield
        except Exception:
            self.reset()
            raise
        except BaseException:
            if not self.prefix.undo(offset, length):
                self.reset()
            del self.cache_key[self.prefix.offset :]
            raise

    def encode_all(self, prompt: PromptTokens, chunk: int | None = None) -> Prefix:
        """Encode a prompt at one go; returns the prefix."""
        for _ in self.encode(prompt, chunk):
            pass
        return self.prefix

    def commit(self, tokens: mx.array) -> None:
        """Encode a block [1, C] that is final."""
        with self._undone_if_interrupted(tokens.shape[1]):
            self.model.encode(tokens, self.prefix)
            evaluate(self.prefix)
            self.cache_key = [*self.cache_key, *np.asarray(tokens[0]).tolist()]
        mx.clear_cache()  # buffers of shapes that the longer prefix has no more use for

    def accept(self, tokens: list[int]) -> None:
        """Take these tokens in, which the last pass of `encode_ahead` began with; there may be none."""
        if not tokens:
            return
        with self._undone_if_interrupted(len(tokens)):
            self.prefix.accept(len(tokens))
            self.cache_key += tokens

    def take_snapshot(self) -> Session | None:
        """The copy that `encode` kept, which belongs to the caller from now on."""
        snapshot, self.snapshot = self.snapshot, None
        return snapshot

    def fork(self) -> Session:
        """The same conversation, which can go on by itself; arrays are copied when one of the two writes."""
        other = Session(self.model)
        other.prefix = self.prefix.fork()
        other.cache_key, other.features = list(self.cache_key), dict(self.features)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of unified memory held."""
        return self.prefix.nbytes + sum(a.nbytes for a in self.features.values())

    def _encode_pictures(self, prompt: PromptTokens) -> mx.array | None:
        """Soft tokens [tokens, H] of the prompt's pictures that the prefix does not hold."""
        before = sum(isinstance(one, str) for one in prompt.cache_key[: self.reused_tokens])
        ends = np.cumsum([picture.tokens for picture in prompt.pictures])
        new = [picture for picture, end in zip(prompt.pictures, ends) if end > before]
        unseen = {picture.digest: picture for picture in new if picture.digest not in self.features}
        if unseen:
            joined = join([picture.patches for picture in unseen.values()])
            features = self.model.encode_images((mx.array(joined.patches), mx.array(joined.positions)))
            cuts = np.cumsum([picture.tokens for picture in unseen.values()])[:-1]
            for name, part in zip(unseen, mx.split(features, cuts.tolist())):
                self.features[name] = part
        self.images_encoded = len(unseen)
        return mx.concatenate([self.features[picture.digest] for picture in new]) if new else None
