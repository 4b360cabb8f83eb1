"""`Shelf`: the weights of a source, read when they are needed and dropped after use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_dgemma.checkpoint.build import suit_device
from mlx_dgemma.model.attention import LayerContext
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.device import available, on_cpu
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.layers import Layer

from ..jobs import NAMES, Job, float_dtype, make_jobs, source_quantization
from ..sources.opened import Source
from ..sources.parts import Decoded

LAYERS = "model.decoder.layers."
SHARE = 0.5  # of the memory that the device gives: what fits into it is read once and kept


class Shelf:
    """The weights of a source. A layer is read from the disk whenever it is taken, unless all layers fit into memory.

    Weights are float32 on the CPU, which computes nothing else fast, and in the source's dtype on a GPU.

    Args:
        source: what is converted; its weights must be floats, or in a format that a conversion decodes.
        keep: hold every layer once it was read; None: if all of them fit into half of the memory.
    """

    def __init__(self, source: Source, keep: bool | None = None):
        checkpoint = source.checkpoint
        self.config: ModelConfig = checkpoint.config
        self.shapes: dict[str, tuple[int, ...]] = {}
        jobs: Sequence[Job | Decoded]
        if source.decode is not None:
            jobs, _ = source.decode(None, None)
        else:
            jobs = make_jobs(checkpoint, source_quantization(checkpoint), None, None)
        self.jobs: dict[str, Job | Decoded] = {job.target: job for job in jobs if ".vision_tower." not in job.target}
        names = {short: name for name, short in NAMES.items()}
        self.stored: mx.Dtype = getattr(mx, names[float_dtype(jobs)])
        self.dtype: mx.Dtype = mx.float32 if on_cpu() else self.stored
        self.parameters = checkpoint.parameters
        needed = self.parameters * self.dtype.size
        self._keep = needed <= SHARE * available() if keep is None else keep
        self._kept: dict[int, Layer] = {}
        self._trunk: DiffusionGemma | None = None

    def weight(self, path: str) -> mx.array:
        """The weight of the module at `path`, in `dtype`, rounded to `stored` as a conversion rounds it."""
        return self._array(f"{path}.weight")

    def layer(self, index: int) -> Layer:
        """A layer with its weights, evaluated."""
        if index in self._kept:
            return self._kept[index]
        layer, prefix = Layer(self.config.text, self.config.text.layer_types[index]), f"{LAYERS}{index}."
        for name in [one for one in self.jobs if one.startswith(prefix)]:
            layer.load_weights([(name.removeprefix(prefix), self._array(name))], strict=False)
            suit_device(layer)
            mx.eval(layer.parameters())
            mx.clear_cache()
        layer.eval()
        if self._keep:
            self._kept[index] = layer
        return layer

    def trunk(self) -> DiffusionGemma:
        """A model whose embedding, final norm, self-conditioning and scalars are there; of its layers use `run`.

        Its `encode` and `denoise` read a layer, compute it and drop it.
        """
        if self._trunk is None:
            model = DiffusionGemma(self.config)
            kept = [one for one in self.jobs if not one.startswith(LAYERS) and ".embed_vision." not in one]
            scalars = [one for one in self.jobs if one.endswith(".layer_scalar")]
            model.load_weights([(one, self._array(one)) for one in dict.fromkeys([*kept, *scalars])], strict=False)
            decoder = model.model.decoder
            mx.eval(
                decoder.embed_tokens.parameters(), decoder.self_conditioning.parameters(), decoder.norm.parameters()
            )
            numbers = {id(layer): i for i, layer in enumerate(decoder.layers)}

            def streamed(layer: Layer, h: mx.array, scalar: mx.array, context: LayerContext) -> mx.array:
                real = self.layer(numbers[id(layer)])
                h = real(h, scalar, context)
                mx.eval(h, *((cache.keys, cache.values) for cache in context.caches))
                return h

            model._apply = streamed
            model.eval()
            self._trunk = model
        return self._trunk

    def scalars(self, index: int) -> tuple[mx.array, mx.array]:
        """The factors of a layer as encoder and as decoder."""
        model = self.trunk().model
        return model.encoder.language_model.layers[index].layer_scalar, model.decoder.layers[index].layer_scalar

    def _array(self, name: str) -> mx.array:
        array = _read(self.jobs[name])
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        array = array.astype(self.stored).astype(self.dtype)
        mx.eval(array)
        return array


def _read(job: Job | Decoded) -> mx.array:
    """A parameter as the source holds it; MLX reads what is stored as it is."""
    if isinstance(job, Decoded):
        return job.whole()
    parts = []
    for name, info in zip(job.names, job.sources):
        loaded: Any = mx.load(str(info.file))  # lazy: of the file only this tensor is read
        parts.append(loaded[name])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
