"""DiffusionGemma: one stack of layers that runs as encoder and as decoder.

- `encode` (the encoder) runs the stack causally over tokens and appends them to a `Prefix`.
- `denoise` (the decoder) runs it in both directions over a canvas; it reads the prefix and does not change it.

The two modes differ in attention, in the layers' scalars and in self-conditioning; all other weights are shared.
Formulas follow Transformers' diffusion_gemma. Names of submodules are the checkpoint's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..distributed.group import ALONE, Group
from ..errors import PromptError, RangeError
from .attention import ALIGNMENT, LayerContext
from .cache.quantized import QuantizedKV
from .config import ModelConfig
from .device import Queue
from .head import Head
from .kv_cache import Prefix
from .layers import Layer, SelfConditioning
from .masks import Narrow
from .traced.layer import LayerTraces
from .traced.token import TokenPass
from .vision import Projector, VisionTower

PATCHES_AT_ONCE = 10240  # patches that the vision tower encodes at once


class Decoder(nn.Module):
    """The shared weights. Releases store them under the decoder's key."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        text = config.text
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = [Layer(text, kind) for kind in text.layer_types]
        self.norm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.self_conditioning = SelfConditioning(text)


class EncoderScalar(nn.Module):
    """The scalar of an encoder layer, the only weight that it does not share with the decoder."""

    def __init__(self):
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class EncoderText(nn.Module):
    """The text part of the encoder: one scalar per layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = [EncoderScalar() for _ in config.text.layer_types]


class Encoder(nn.Module):
    """The encoder's own weights: its scalars and, in checkpoints with vision, the tower and the projector."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.language_model = EncoderText(config)
        if config.vision is not None:
            self.vision_tower = VisionTower(config.vision)
            self.embed_vision = Projector(config.vision, config.text.hidden_size)


class Backbone(nn.Module):
    """All weights, under the checkpoint's `model` key."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.decoder = Decoder(config)
        self.encoder = Encoder(config)


class DiffusionGemma(nn.Module):
    """The model. Sampling and the loop over blocks are in `decoding`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self._apply: Callable[..., mx.array] = Layer.__call__  # called with (layer, h, scalar, context)
        self.uses_kernels = False  # custom kernels, which have no gradient; training mode computes without them
        self.token_pass: TokenPass | None = None  # replays traces of passes over one token; None: none are made
        self.layer_traces: LayerTraces | None = None  # replays traces of single layers; None: none are made
        self.kv_bits: int | None = None  # of the prefix in full layers; None, and in training mode: not quantized
        self.low_memory = False  # save memory at the price of time
        self._dtype: mx.Dtype | None = None  # of activations; set where the embedding's weights do not tell it
        self._group: Group = ALONE
        self._encoder_layers: tuple[Layer, ...] | None = None  # set where an adapter changes the two modes differently

    @property
    def group(self) -> Group:
        """The ranks that compute this model together; this process alone if nothing else was said."""
        return self._group

    def join(self, group: Group) -> None:
        """Compute together with other ranks; each holds its part of the weights (`checkpoint.slices`)."""
        self._group = group
        for layer in self.model.decoder.layers:
            layer._group = group
        self._forget_traces()

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations: that of the final norm, or of a quantized embedding's scales if they are floats."""
        table = self.model.decoder.embed_tokens
        if self._dtype is not None:
            return self._dtype
        return table.scales.dtype if _is_float_scale(table) else self.model.decoder.norm.weight.dtype

    @property
    def compute_dtype(self) -> mx.Dtype:
        """The dtype of matrix products: that of activations, or float16 where loading asked for it."""
        return getattr(self.model.decoder.embed_tokens, "compute_dtype", self.dtype)

    def range_error(self) -> RangeError:
        """The error for hidden states that hold inf or NaN."""
        if mx.float16 not in (self.compute_dtype, self.dtype):
            return RangeError(
                "The model computed inf or NaN, so there is no answer; its weights are broken, convert them again."
            )
        name, flag = ("compute_dtype", "--compute-dtype") if self.dtype != mx.float16 else ("dtype", "--dtype")
        return RangeError(
            f"Numbers of this model left the range of float16, so there is no answer; load it without {flag} float16 "
            f'({name}="float16").'
        )

    def new_prefix(self, batch_size: int = 1, capacity: int = 0) -> Prefix:
        """An empty prefix of `batch_size` rows; `capacity` positions are allocated at once."""
        prefix = Prefix(self.config.text, batch_size, capacity)
        prefix.low_memory = self.low_memory
        if self.kv_bits is not None and not self.training:
            layers = self._encoder_layers or self.model.decoder.layers
            for i, layer in enumerate(layers):
                if layer._layer_type == "full_attention":
                    unpack = layer.self_attn.unpack
                    prefix.layers[i] = QuantizedKV(capacity, self.kv_bits, unpack, self._with_kernels)
        return prefix

    def encode(
        self,
        tokens: mx.array,
        prefix: Prefix,
        images: tuple[mx.array, mx.array] | None = None,
        mask: mx.array | np.ndarray | None = None,
        features: mx.array | None = None,
    ) -> mx.array:
        """Encode tokens causally in one pass and append them to the prefix.

        Args:
            tokens: [B, L] int32.
            prefix: of B rows; extended in place.
            images: patches [N, P, 3 * patch_size**2] and positions [N, P, 2] (padded with -1) of the
                pictures whose placeholders are in `tokens`, in the same order.
            mask: [B, L], false on left padding.
            features: [N, H] from `encode_images`, instead of `images`.

        Returns:
            Hidden states [B, L, H] after the final norm. They are lazy: evaluating the prefix does not compute the
            rest of the last layer.

        Raises:
            PromptError: the number of placeholders is not that of the pictures' soft tokens.
            OptionError: the mask is not left padding.
        """
        if mask is not None:
            prefix.pad(mask)
        h = self._embed(tokens)
        spans = None
        if images is not None:
            features = self.encode_images(images)
        if features is not None:
            h, spans = self._insert_image_features(tokens, h, features)
        masks = prefix.encode_masks(tokens.shape[1], spans, ALIGNMENT if self._with_kernels else 1)
        h = self._run(h, [prefix], [masks], encoder=True, canvas=False)
        prefix.offset += tokens.shape[1]
        return h

    def encode_ahead(self, tokens: mx.array, prefixes: Sequence[Prefix]) -> mx.array:
        """Encode tokens causally behind prefixes, which are extended by as many of them as `Prefix.accept` is told.

        Args:
            tokens: [B, L] int32, text alone.
            prefixes: B prefixes of one row each, without padding.

        Returns:
            Hidden states [B, L, H] after the final norm.
        """
        if self.token_pass is not None and not self.training:
            hidden = self.token_pass(tokens, prefixes)
            if hidden is not None:
                return hidden
        masks = [one.encode_masks(tokens.shape[1]) for one in prefixes]
        return self._run(self._embed(tokens), prefixes, masks, encoder=True, canvas=True)

    def trace_tokens(self) -> None:
        """From now on replay traces of passes over one token."""
        self.token_pass = TokenPass(self._run_ahead, self.config.text)

    def trace_layers(self) -> None:
        """From now on replay traces of the layers of passes over a canvas, or over tokens ahead."""
        self.layer_traces = LayerTraces(Layer.__call__)

    def train(self, mode: bool = True) -> nn.Module:
        """As of any module; traces are dropped with the weights that they hold."""
        self._forget_traces()
        return super().train(mode)

    def _forget_traces(self) -> None:
        for traces in (self.token_pass, self.layer_traces):
            if traces is not None:
                traces.forget()

    def _run_ahead(self, tokens: mx.array, prefixes: Sequence[Any], masks: list[dict]) -> mx.array:
        """As `encode_ahead`, with masks that were made."""
        return self._run(self._embed(tokens), prefixes, masks, encoder=True, canvas=True)

    def encode_images(self, images: tuple[mx.array, mx.array]) -> mx.array:
        """Soft tokens of pictures. They are encoded in groups, so that memory does not grow with their number.

        Args:
            images: patches [N, P, 3 * patch_size**2] in 0..1 and positions [N, P, 2], padded with -1.

        Returns:
            [N, H], the soft tokens of one picture after another, without padding.

        Raises:
            PromptError: the checkpoint has no vision tower.
        """
        encoder = self.model.encoder
        if "vision_tower" not in encoder:
            raise PromptError("This checkpoint has no vision tower, so it cannot look at pictures; send text alone.")
        patches, positions = (mx.array(a) for a in images)
        group, found = max(1, PATCHES_AT_ONCE // patches.shape[1]), []
        for start in range(0, patches.shape[0], group):
            part = slice(start, start + group)
            found.append(encoder.embed_vision(encoder.vision_tower(patches[part], positions[part])))
            mx.eval(found[-1])
        return mx.concatenate(found)

    def denoise(
        self,
        canvas: mx.array,
        prefix: Prefix | Sequence[Prefix],
        conditioning: mx.array | None = None,
        queue: Queue | None = None,
        narrow: Narrow | None = None,
    ) -> mx.array:
        """Run the stack over a canvas in both directions. The prefix is read and not extended.

        Args:
            canvas: [B, C] int32, at the positions after the prefix.
            prefix: of B rows, or B prefixes of one row each, without padding.
            conditioning: [B, C, H] from `condition`, or None in the first step of a canvas.
            queue: starts every layer as soon as it is built; None leaves all of them to the caller.
            narrow: what is computed of each canvas: then `canvas` is [1, T], `conditioning` [1, T, H], and prefixes
                have one row each. Keys and values of the other positions are those of the last pass that computed them,
                which must have been one over these prefixes. None: all.

        Returns:
            Hidden states [B, C, H] after the final norm, or [1, T, H].
        """
        decoder = self.model.decoder
        h = decoder.self_conditioning(self._embed(canvas), conditioning)
        prefixes = [prefix] if isinstance(prefix, Prefix) else prefix
        masks = [one.denoise_masks(narrow.length if narrow else canvas.shape[1]) for one in prefixes]
        return self._run(h, prefixes, masks, encoder=False, canvas=True, queue=queue, narrow=narrow)

    @property
    def head(self) -> Head:
        """The vocabulary: logits, samples and conditioning (the embedding is tied to it)."""
        text = self.config.text
        table = self.model.decoder.embed_tokens
        scale = text.hidden_size**0.5
        softcap, kernels = text.final_logit_softcapping, self._with_kernels
        return Head(table, text.vocab_size, softcap, scale, self.dtype, kernels, self._group)

    def logits(self, hidden: mx.array) -> mx.array:
        """[B, C, H] -> [B, C, V] float32, softcapped, before temperature."""
        return self.head.logits(hidden)

    def condition(self, processed_logits: mx.array) -> mx.array:
        """The expected embedding under a step's processed logits, for the next step.

        Args:
            processed_logits: [B, C, V] float32, after temperature.

        Returns:
            [B, C, H]: softmax(logits rounded to the model's dtype) @ embedding * sqrt(H).
        """
        return self.head.condition(processed_logits)

    @property
    def _with_kernels(self) -> bool:
        return self.uses_kernels and not self.training

    def _embed(self, tokens: mx.array) -> mx.array:
        return self.head.embed(tokens)

    def turns(
        self, offset: int | mx.array, length: int, narrow: Narrow | None = None
    ) -> dict[str, tuple[mx.array, mx.array]]:
        """RoPE's cosines and sines for the custom kernels, by layer type.

        Args:
            offset: position of the first token; [B] where it differs by row.
            length: L.
            narrow: of canvases that `offset` is the beginning of.

        Returns:
            Pairs of [1 or B, L, D / 2] float32.
        """
        text, found = self.config.text, {}
        positions = mx.arange(length) + (offset[:, None] if isinstance(offset, mx.array) else offset)
        if narrow is not None:
            positions = narrow.take(mx.broadcast_to(positions, (len(narrow.widths), narrow.length)))
        places = positions.reshape(-1, positions.shape[-1], 1).astype(mx.float32)
        for kind in dict.fromkeys(text.layer_types):
            angles = places * mx.array(text.rope_frequencies(kind))
            found[kind] = mx.cos(angles), mx.sin(angles)
        return found

    def _run(
        self,
        h: mx.array,
        prefixes: Sequence[Any],
        masks: list[dict],
        encoder: bool,
        canvas: bool,
        queue: Queue | None = None,
        narrow: Narrow | None = None,
    ) -> mx.array:
        """Hidden states after the final norm; `canvas` and `narrow` as in `LayerContext`."""
        offsets, rope_offset = [prefix.offset for prefix in prefixes], prefixes[0].rope_offset()
        if len(prefixes) > 1:
            rope_offset = mx.array(offsets)
        length = narrow.length if narrow else h.shape[1]
        turns = self.turns(rope_offset, length, narrow) if self._with_kernels else {}
        apply = self._apply
        if self.layer_traces is not None and not self.training and apply is Layer.__call__:
            apply = self.layer_traces
        layers: Sequence[Layer] = self.model.decoder.layers
        scalars = [layer.layer_scalar for layer in layers]
        if encoder:
            layers = self._encoder_layers or layers
            scalars = [one.layer_scalar for one in self.model.encoder.language_model.layers]
        for i, (layer, scalar) in enumerate(zip(layers, scalars)):
            kind = layer._layer_type
            caches = [prefix.layers[i] for prefix in prefixes]
            context = LayerContext(
                caches, offsets, [mask[kind] for mask in masks], rope_offset, canvas, turns.get(kind), narrow
            )
            h = apply(layer, h, scalar, context)
            if queue is not None:
                queue.add(*(stage for cache in caches for stage in cache.stages), h)
        return self.model.decoder.norm(h)

    def _insert_image_features(
        self, tokens: mx.array, h: mx.array, features: mx.array
    ) -> tuple[mx.array, np.ndarray | None]:
        """Replace the embeddings of image placeholders by image features.

        Args:
            tokens: [B, L] int32.
            h: [B, L, H], their embeddings.
            features: [N, H], one for each placeholder, row by row.

        Returns:
            The embeddings, and the ids of image spans [B, L], 0 for text; None where spans are attended to causally.

        Raises:
            PromptError: the number of features is not that of the placeholders.
        """
        placeholder = np.asarray(tokens) == self.config.image_token_id
        if placeholder.sum() != features.shape[0]:
            raise PromptError(
                f"The prompt has {placeholder.sum()} image placeholders, but its pictures have "
                f"{features.shape[0]} soft tokens; they must agree."
            )
        rows = mx.array(np.flatnonzero(placeholder))
        flat = h.reshape(-1, h.shape[-1])
        flat[rows] = features.astype(h.dtype)
        starts = placeholder & ~np.pad(placeholder, ((0, 0), (1, 0)))[:, :-1]
        spans = np.where(placeholder, np.cumsum(starts, axis=1), 0).astype(np.int32)
        return flat.reshape(h.shape), spans if self.config.text.use_bidirectional_attention == "vision" else None


def _is_float_scale(table: nn.Module) -> bool:
    return isinstance(table, nn.QuantizedEmbedding) and table.scales.dtype != mx.uint8
