"""What a rank of a group holds of each parameter, and how it reads only that from a checkpoint.

Attention is dealt by heads, the dense branch and the experts by width, the vocabulary by tokens. Norms, routers,
self-conditioning and the vision tower are held by every rank: they are small, or summing their parts would take longer.
Experts are dealt by width and not by expert: every rank computes the same rows, whatever the router chose. What is
quantized along the axis that is dealt is dealt in whole groups; where they do not come out even, ranks take turns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod

import mlx.core as mx
import numpy as np

from ..distributed.dealing import Span, deal, kv_heads_of
from ..errors import CheckpointError
from ..model.config import ModelConfig
from ..model.tiling import vocab_spans
from .headers import TensorInfo

PIECE = 2**24  # bytes that are read at once where only columns are kept
LONG = 2**16  # bytes of a run from which on it is read by itself
WIDTH_UNIT = 8  # borders of unquantized widths are multiples of it where they can be: products prefer them
# Of quantized widths too: on CUDA and on Apple's newest GPUs MLX reads packed weights once for several rows only where
# there are inputs in multiples of it.
PACKED_UNIT = 64
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}
_PATH = re.compile(r"model\.decoder\.(?:layers\.(\d+)\.)?(.+)\.(weight|scales|biases)")


@dataclass(frozen=True)
class Cut:
    """What is kept of an axis.

    Attributes:
        axis: of the unquantized weight; -1 is the axis along which weights are packed and have scales.
        spans: in weights, in the order in which they are kept.
    """

    axis: int
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """How much is kept."""
        return sum(span.size for span in self.spans)


@dataclass(frozen=True)
class Stored:
    """How a module's weight is quantized."""

    group_size: int
    bits: int
    mode: str


class Slices:
    """The parts of a rank.

    Args:
        config: of the model.
        rank: number of the rank.
        ranks: how many there are.
        quantized: how the weights of modules are stored, by path; those that are not in it are not quantized.

    Raises:
        CheckpointError: the model has too few heads for so many ranks.
    """

    def __init__(self, config: ModelConfig, rank: int, ranks: int, quantized: dict[str, Stored]):
        self.config, self.rank, self.ranks, self.quantized = config, rank, ranks, quantized
        text = config.text
        least = min(text.num_attention_heads, text.moe_intermediate_size, text.intermediate_size)
        if ranks > least or not vocab_spans(text.vocab_size, ranks)[-1].size:
            raise CheckpointError(
                f"A model of {text.num_attention_heads} attention heads cannot be dealt to {ranks} ranks; start fewer."
            )

    def cut(self, parameter: str) -> Cut | None:
        """What this rank holds of a parameter; None: all of it.

        Raises:
            CheckpointError: there are too few quantization groups for so many ranks.
        """
        if not (found := _PATH.fullmatch(parameter)):
            return None
        layer, module = found[1], found[2]
        if module == "embed_tokens":
            return Cut(0, (vocab_spans(self.config.text.vocab_size, self.ranks)[self.rank],))
        if layer is None:
            return None
        kind, _, name = module.rpartition(".")
        if kind == "self_attn":
            return self._of_attention(int(layer), name)
        if kind == "mlp":
            axis = -1 if name == "down_proj" else 0
            return Cut(axis, (self._width(int(layer), "mlp", self.config.text.intermediate_size),))
        if kind == "experts":
            size = self.config.text.moe_intermediate_size
            span = self._width(int(layer), "experts", size)
            return Cut(-1, (span,)) if name == "down_proj" else Cut(1, (span, Span(size + span.start, size + span.end)))
        return None

    def kv_heads(self, layer: int) -> list[int]:
        """The KV heads of a layer that this rank holds."""
        text = self.config.text
        kv_heads, _ = text.kv_shape(text.layer_types[layer])
        return kv_heads_of(self._heads(layer), text.num_attention_heads // kv_heads)

    def _of_attention(self, layer: int, name: str) -> Cut | None:
        text = self.config.text
        _, dim = text.kv_shape(text.layer_types[layer])
        if name in ("q_proj", "o_proj"):
            heads = self._heads(layer)
            return Cut(0 if name == "q_proj" else -1, (Span(heads.start * dim, heads.end * dim),))
        if name not in ("k_proj", "v_proj"):
            return None  # norms of a head
        return Cut(0, tuple(Span(head * dim, (head + 1) * dim) for head in self.kv_heads(layer)))

    def _heads(self, layer: int) -> Span:
        """The rank's query heads: as many as fill whole groups of the projection behind them."""
        text, path = self.config.text, f"model.decoder.layers.{layer}.self_attn.o_proj"
        _, dim = text.kv_shape(text.layer_types[layer])
        stored = self.quantized.get(path)
        unit = stored.group_size // gcd(stored.group_size, dim) if stored else 1
        return self._dealt(path, text.num_attention_heads, (unit,))

    def _width(self, layer: int, branch: str, size: int) -> Span:
        """The rank's part of a branch's width. What is left over goes to another rank in every layer."""
        path = f"model.decoder.layers.{layer}.{branch}.down_proj"
        stored = self.quantized.get(path)
        units = (max(stored.group_size, PACKED_UNIT), stored.group_size) if stored else (WIDTH_UNIT, 4, 2, 1)
        return self._dealt(path, size, units, turn=layer)

    def _dealt(self, path: str, total: int, units: tuple[int, ...], turn: int = 0) -> Span:
        """The rank's part of the inputs of a module, in the first of some units that every rank gets one of."""
        for unit in units:
            if total >= unit * self.ranks:
                return deal(total, self.ranks, unit, turn)[self.rank]
        raise CheckpointError(
            f"{path} can be cut between its quantization groups into {total // units[-1]} parts, too few for "
            f"{self.ranks} ranks; start fewer."
        )


def stored_cut(cut: Cut | None, part: str, stored: Stored | None) -> Cut | None:
    """A cut in elements of a stored tensor: packed weights, or scales and biases.

    Args:
        cut: in weights; along the packed axis of whole groups.
        part: "weight", "scales" or "biases".
        stored: how the module is quantized.
    """
    if cut is None or cut.axis != -1 or stored is None:
        return cut
    size, per_group = stored.group_size, stored.group_size * stored.bits // 32 if part == "weight" else 1
    return Cut(-1, tuple(Span(span.start // size * per_group, span.end // size * per_group) for span in cut.spans))


def read(info: TensorInfo, cut: Cut | None = None) -> mx.array:
    """A tensor, or what is kept of one of its axes; only that is read, or, of columns, a piece of the file at a time.

    Raises:
        CheckpointError: the file became shorter.
    """
    kind = np.dtype(_NUMPY[info.dtype])
    axis = 0 if cut is None else cut.axis % len(info.shape)
    spans: Sequence[Span] = cut.spans if cut else (Span(0, info.shape[0] if info.shape else 1),)
    length = info.shape[axis] if info.shape else 1
    outer, inner = prod(info.shape[:axis]), prod(info.shape[axis + 1 :]) * kind.itemsize
    kept = sum(span.size for span in spans)
    found = np.empty((outer, kept, inner), np.uint8)
    with info.file.open("rb", buffering=0) as stream:

        def fill(target: np.ndarray, at: int) -> None:
            stream.seek(info.start + at)
            view = memoryview(target.data).cast("B")
            while len(view):
                if not (count := stream.readinto(view)):
                    raise CheckpointError(f"{info.file} became shorter while it was being read; download it again.")
                view = view[count:]

        if min(span.size for span in spans) * inner >= LONG or outer == 1:
            for row in range(outer):
                at = 0
                for span in spans:
                    if span.size:
                        fill(found[row, at : at + span.size], (row * length + span.start) * inner)
                    at += span.size
        else:
            step = max(PIECE // (length * inner), 1)
            for first in range(0, outer, step):
                piece = np.empty((min(step, outer - first), length, inner), np.uint8)
                fill(piece, first * length * inner)
                columns = [piece[:, span.start : span.end] for span in spans]
                found[first : first + len(piece)] = np.concatenate(columns, axis=1)
    shape = (*info.shape[:axis], kept, *info.shape[axis + 1 :]) if info.shape else ()
    array = mx.array(found.reshape(-1).view(kind)).reshape(shape)
    return array.view(mx.bfloat16) if info.dtype == "BF16" else array


def held(array: mx.array, cut: Cut | None, part: str, stored: Stored | None) -> mx.array:
    """What is kept of a whole array; arguments as `stored_cut` takes them."""
    if (own := stored_cut(cut, part, stored)) is None:
        return array
    ahead = (slice(None),) * (own.axis % array.ndim)
    return mx.contiguous(mx.concatenate([array[(*ahead, slice(*span))] for span in own.spans], axis=own.axis))
