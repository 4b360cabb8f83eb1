"""`Checkpoint`: a folder whose configuration and headers were read and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import CheckpointError
from ..model.config import GenerationConfig, ModelConfig, ProcessorConfig, read_json
from ..model.diffusion_gemma import DiffusionGemma
from .headers import TensorInfo, read_tensors
from .processor import read_processor


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder. No weights are in memory."""

    path: Path
    config: ModelConfig
    generation: GenerationConfig
    processor: ProcessorConfig
    raw_config: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read configuration and headers.

        Raises:
            CheckpointError: a file is missing or broken, or belongs to another model.
        """
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder; point at the folder that holds config.json.")
        raw = read_json(path / "config.json")
        config = ModelConfig.from_dict(raw)
        generation = path / "generation_config.json"
        return cls(
            path,
            config,
            GenerationConfig.from_dict(read_json(generation) if generation.exists() else {}, config.eos_token_ids),
            read_processor(path, config.vision),
            raw,
            read_tensors(path),
        )

    @property
    def quantization(self) -> dict[str, Any] | None:
        """config.json's quantization: group_size, bits, mode, and overrides by module path."""
        return self.raw_config.get("quantization") or self.raw_config.get("quantization_config")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{parameter: shape} of the unquantized model."""
        return parameter_shapes(DiffusionGemma(self.config))

    @property
    def parameters(self) -> int:
        """Number of weights, independent of quantization."""
        return sum(_size(shape) for shape in self.shapes.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and biases included, per weight."""
        return self.nbytes * 8 / self.parameters


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a model."""
    return {name: a.shape for name, a in dict(tree_flatten(model.parameters())).items()}


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
