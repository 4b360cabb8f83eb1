"""Matrix products in float16, for chips that have no bfloat16: Apple's M1 and M2 compute it in software.

Inputs and weights of the decoder's linear maps and of the embedding are float16. Results return to the dtype of
activations, in which everything between two products stays. The vision tower keeps its dtype.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError
from ..model.diffusion_gemma import DiffusionGemma
from ..upstream import QuantizedSwitchLinear, SwitchLinear

LARGEST = 65504.0  # of float16
SMALLEST = 2.0**-16  # a largest value below this: rounding to multiples of 2**-24 is coarser than bfloat16's rounding
DECODER = "model.decoder."
_LARGEST_CODE = {"mxfp4": 6.0, "mxfp8": 448.0}  # their scales are powers of two, stored as exponents + 127


class _Product:
    """A linear map that is computed in float16; the result has the input's dtype."""

    compute_dtype = mx.float16

    def __call__(self, x: mx.array, *indices: mx.array, **options: Any) -> mx.array:
        y = super().__call__(x.astype(mx.float16), *indices, **options)  # type: ignore[misc]
        return y.astype(mx.float16).astype(x.dtype)  # first to float16: the CPU computes plain experts in float32


class _Table:
    """An embedding whose products are computed in float16."""

    compute_dtype = mx.float16

    def as_linear(self, x: mx.array) -> mx.array:
        """[..., H] -> [..., V] float16."""
        return super().as_linear(x.astype(mx.float16))  # type: ignore[misc]


class Float16Linear(_Product, nn.Linear):
    """`nn.Linear` in float16."""


class Float16QuantizedLinear(_Product, nn.QuantizedLinear):
    """`nn.QuantizedLinear` in float16."""


class Float16SwitchLinear(_Product, SwitchLinear):
    """`SwitchLinear` in float16."""


class Float16QuantizedSwitchLinear(_Product, QuantizedSwitchLinear):
    """`QuantizedSwitchLinear` in float16."""


class Float16Embedding(_Table, nn.Embedding):
    """`nn.Embedding` with products in float16."""


class Float16QuantizedEmbedding(_Table, nn.QuantizedEmbedding):
    """`nn.QuantizedEmbedding` with products in float16."""


KINDS: dict[type, type] = {
    nn.Linear: Float16Linear,
    nn.QuantizedLinear: Float16QuantizedLinear,
    SwitchLinear: Float16SwitchLinear,
    QuantizedSwitchLinear: Float16QuantizedSwitchLinear,
    nn.Embedding: Float16Embedding,
    nn.QuantizedEmbedding: Float16QuantizedEmbedding,
}


def compute_in_float16(model: DiffusionGemma) -> None:
    """Let a model compute its matrix products in float16; its modules change their class and their arrays in place.

    Raises:
        CheckpointError: weights or scales that float16 cannot hold, by name.
    """
    model._dtype = model.dtype
    for path, module in model.model.decoder.named_modules():
        if type(module) not in KINDS:
            continue
        if reason := misfit(DECODER + path, module):
            raise CheckpointError(f"{reason}; load it without --compute-dtype float16 (compute_dtype).")
        cast = {name: module[name].astype(mx.float16) for name in _floats(module)}
        mx.eval(cast)  # one module at a time, so that two copies of all are never held
        for name, array in cast.items():
            module[name] = array
        module.__class__ = KINDS[type(module)]


def misfit(path: str, module: nn.Module) -> str | None:
    """What float16 cannot hold of a linear map's or an embedding's arrays, or None."""
    bounds: dict[str, Any] = {name: mx.maximum(module[name].max(), -module[name].min()) for name in _floats(module)}
    if (code := _LARGEST_CODE.get(getattr(module, "mode", ""))) is not None:
        bounds["scales"] = 2.0 ** (module.scales.max().astype(mx.float32) - 127) * code
    for name, bound in bounds.items():
        largest = bound.item()
        if not largest <= LARGEST:
            return f"{path}.{name} reaches {largest:.3g}, but float16 ends at {LARGEST:.0f}"
        if 0 < largest < SMALLEST and name != "biases":  # these are offsets: small ones change nothing
            return f"{path}.{name} has no value above {largest:.3g}, where float16 is coarser than bfloat16"
    return None


def _floats(module: nn.Module) -> list[str]:
    arrays = {name: module.get(name) for name in ("weight", "scales", "biases")}
    return [name for name, array in arrays.items() if array is not None and mx.issubdtype(array.dtype, mx.floating)]
