"""`Checkpoint`: a folder whose configuration and headers were read and checked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import CheckpointError
from ..model.config import GenerationConfig, ModelConfig, ProcessorConfig, read_json
from ..model.diffusion_gemma import DiffusionGemma
from .foreign import format_of, own_quantization
from .headers import TensorInfo, read_tensors
from .processor import read_processor
from .weights import is_vision


@dataclass(frozen=True)
class Settings:
    """The JSON files of a checkpoint folder, read and checked. No file of weights is opened."""

    path: Path
    config: ModelConfig
    generation: GenerationConfig
    processor: ProcessorConfig
    raw_config: dict[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()  # what was found and is not used, one sentence each

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read the JSON files.

        Raises:
            CheckpointError: a file is missing or broken, or belongs to another model.
        """
        if not path.is_dir():
            if path.suffix == ".gguf":
                way = f"mlx-dgemma convert {path} --mlx-path NAME -q"
                raise CheckpointError(f"{path} is a GGUF file; convert it first: {way}.")
            raise CheckpointError(f"{path} is not a folder; point at the folder that holds config.json.")
        notes: list[str] = []
        raw = read_json(path / "config.json")
        config = ModelConfig.from_dict(raw, notes)
        generation, processor = read_generation(path, config, notes), read_processor(path, config.vision, notes)
        return cls(path, config, generation, processor, raw, tuple(notes))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{parameter: shape} of the unquantized model."""
        return parameter_shapes(DiffusionGemma(self.config))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder. No weights are in memory."""

    path: Path
    config: ModelConfig
    generation: GenerationConfig
    processor: ProcessorConfig
    raw_config: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    notes: tuple[str, ...] = ()  # what was found and is not used, one sentence each

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read configuration and headers.

        Raises:
            CheckpointError: a file is missing or broken, or belongs to another model.
        """
        settings = Settings.read(path)
        config, raw, notes = settings.config, settings.raw_config, list(settings.notes)
        tensors = read_tensors(path, notes)
        format_of(raw, tensors)  # refuses formats that nothing here reads
        if config.vision and not any(map(is_vision, tensors)):
            config = replace(config, vision=None)
            raw = {key: value for key, value in raw.items() if key != "vision_config"}
            notes.append("config.json has a vision_config, but no file holds the tower: text only, no pictures.")
        return cls(
            path,
            config,
            settings.generation,
            settings.processor,
            raw,
            tensors,
            tuple(dict.fromkeys(notes)),  # one file may give the settings of pictures and of videos
        )

    @property
    def quantization(self) -> dict[str, Any] | None:
        """config.json's quantization: group_size, bits, mode, and overrides by module path."""
        return own_quantization(self.raw_config)

    @cached_property
    def foreign(self) -> str | None:
        """The other program's format that the weights are quantized in, which only a conversion reads."""
        return format_of(self.raw_config, self.tensors)

    def require_native(self) -> None:
        """Raise CheckpointError for a checkpoint that must be converted before it can be loaded."""
        if self.foreign:
            raise CheckpointError(
                f"{self.path} is quantized in the format of {self.foreign}; convert it first: "
                f"mlx-dgemma convert {self.path} --mlx-path NAME -q."
            )

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


def read_generation(path: Path, config: ModelConfig, notes: list[str]) -> GenerationConfig:
    """generation_config.json of a folder; without one, defaults and config.json's end tokens."""
    file = path / "generation_config.json"
    return GenerationConfig.from_dict(read_json(file) if file.exists() else {}, config.eos_token_ids, notes)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of a model."""
    return {name: a.shape for name, a in dict(tree_flatten(model.parameters())).items()}


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
