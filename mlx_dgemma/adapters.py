"""Adapters: low-rank changes of linear maps, put into a model and fused with it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one linear map W [out, in]: scale * b @ a.

    With a magnitude the result is DoRA's (arXiv 2402.09353): every row of W + scale * b @ a is brought to its length.

    Attributes:
        a: [r, in] float32; of experts [E, r, in].
        b: [out, r] float32; of experts [E, out, r].
        scale: factor of the product.
        magnitude: [out] float32, or None.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None


@dataclass(frozen=True)
class Adapter:
    """Changes by the path of the module that they belong to, such as "model.decoder.layers.0.self_attn.q_proj".

    The encoder and the decoder share their layers' weights, but what is added to them may differ by mode. Both dicts
    name the layers by the decoder's paths.
    """

    encode: dict[str, Delta]
    denoise: dict[str, Delta]
