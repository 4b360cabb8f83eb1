"""What a rank of a group holds of each parameter, and how it reads only that from a checkpoint.

Attention is dealt by heads, the dense branch and the experts by width, the vocabulary by tokens. Norms, routers,
self-conditioning and the vision tower are held by every rank: they are small, or summing their parts would take longer.
Experts are dealt by width and not by expert: every rank computes the same rows, whatever the router chose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from ..distributed.dealing import Span, deal, group_of_width, kv_heads_of
from ..errors import CheckpointError
from ..model.config import ModelConfig
from ..model.tiling import vocab_spans
from .headers import TensorInfo

PIECE = 2**24  # bytes that are read at once where only columns are kept
LONG = 2**16  # bytes of a run from which on it is read by itself
SMALLEST = 32  # weights of a group of the affine mode, which MLX knows 32, 64 and 128 of
WIDTH_UNIT = 8  # borders of unquantized widths are multiples of it where they can be: products prefer them
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

    @property
    def smallest(self) -> int:
        """The smallest group that MLX computes with in this mode."""
        return SMALLEST if self.mode == "affine" else self.group_size


class Slices:
    """The parts of a rank.

    Args:
        config: of the model.
        rank: number of the rank.
        ranks: how many there are.
        quantized: how the weights of modules are stored, by path; those that are not in it are not quantized.

    Raises:
        CheckpointError: the model has too few heads, or groups that cannot be dealt to so many ranks.
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
        """What this rank holds of a parameter; None: all of it."""
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

    def group_size(self, path: str) -> int:
        """Weights of a quantization group of a module as this rank holds it: as stored, or a half or quarter of it."""
        stored = self.quantized[path]
        cut = self.cut(f"{path}.weight")
        if cut is None or cut.axis != -1:
            return stored.group_size
        size, borders = stored.group_size, [border for span in cut.spans for border in span]
        if ".self_attn." not in path:
            size = group_of_width(self._width_of(path), self.ranks, size, stored.smallest)
        while size >= stored.smallest:
            if all(border % size == 0 for border in borders):
                return size
            size //= 2
        raise CheckpointError(
            f"{path} is quantized in groups of {stored.group_size}, which cannot be dealt to {self.ranks} ranks; "
            "start another number of ranks, or load it dequantized (--dequantize, dequantize=True)."
        )

    def _of_attention(self, layer: int, name: str) -> Cut | None:
        text = self.config.text
        kv_heads, dim = text.kv_shape(text.layer_types[layer])
        heads = deal(text.num_attention_heads, self.ranks)[self.rank]
        if name in ("q_proj", "o_proj"):
            return Cut(0 if name == "q_proj" else -1, (Span(heads.start * dim, heads.end * dim),))
        if name not in ("k_proj", "v_proj"):
            return None  # norms of a head
        held = kv_heads_of(heads, text.num_attention_heads // kv_heads)
        return Cut(0, tuple(Span(head * dim, (head + 1) * dim) for head in held))

    def _width_of(self, path: str) -> int:
        text = self.config.text
        return text.moe_intermediate_size if ".experts." in path else text.intermediate_size

    def _width(self, layer: int, branch: str, size: int) -> Span:
        """The rank's part of a branch's width. What is left over goes to another rank in every layer."""
        stored = self.quantized.get(f"model.decoder.layers.{layer}.{branch}.down_proj")
        if stored is None:
            unit = next(unit for unit in (WIDTH_UNIT, 4, 2, 1) if size >= unit * self.ranks)
        else:
            unit = group_of_width(size, self.ranks, stored.group_size, stored.smallest)
        return deal(size, self.ranks, unit, turn=layer)[self.rank]


def stored_cut(cut: Cut | None, part: str, stored: Stored | None, info_axis: int) -> Cut | None:
    """A cut in elements of a stored tensor: packed weights, or scales and biases of whole groups.

    Args:
        cut: in weights.
        part: "weight", "scales" or "biases".
        stored: how the module is quantized.
        info_axis: length of the tensor's last axis.
    """
    if cut is None or cut.axis != -1 or stored is None:
        return cut
    per = 32 // stored.bits if 32 % stored.bits == 0 else 0

    def of(border: int) -> int:
        if part != "weight":
            return border // stored.group_size
        return border // per if per else border * stored.bits // 32

    def end_of(border: int) -> int:
        return -(-border // stored.group_size) if part != "weight" else of(border)

    return Cut(-1, tuple(Span(of(span.start), min(end_of(span.end), info_axis)) for span in cut.spans))


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


def held(array: mx.array, cut: Cut | None, part: str, stored: Stored | None, group_size: int) -> mx.array:
    """What is kept of a whole array; arguments as `stored_cut` and `regroup` take them."""
    if cut is None:
        return array
    own = stored_cut(cut, part, stored, array.shape[-1])
    assert own is not None
    ahead = (slice(None),) * (cut.axis % array.ndim)
    kept = mx.concatenate([array[(*ahead, slice(*span))] for span in own.spans], axis=cut.axis)
    if stored is not None and cut.axis == -1 and part != "weight":
        kept = regroup(kept, cut, stored, group_size)
    return mx.contiguous(kept)


def regroup(scales: mx.array, cut: Cut, stored: Stored, group_size: int) -> mx.array:
    """Scales or biases of stored groups as those of smaller groups, of which only the cut's are kept.

    Args:
        scales: [..., groups] as `stored_cut` keeps them: all groups that the cut touches.
        cut: in weights, of one span.
        stored: how the module is quantized.
        group_size: of the groups that are wanted.
    """
    times = stored.group_size // group_size
    if times == 1:
        return scales
    (span,) = cut.spans
    first = span.start % stored.group_size // group_size
    return mx.repeat(scales, times, axis=-1)[..., first : first + -(-span.size // group_size)]
