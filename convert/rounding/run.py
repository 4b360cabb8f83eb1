"""Rounding in a conversion: states are recorded, then weights are rounded a layer at a time."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import mlx.core as mx

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.tokenizer import load_tokenizer
from mlx_dgemma.errors import CheckpointError, MemoryLimitError, OptionError, human
from mlx_dgemma.files import told_errors
from mlx_dgemma.model import device
from mlx_dgemma.prompt.endings import own_options

from ..jobs import DTYPES, Job, float_dtype
from ..search import prompts, trajectories
from ..search.replay import outputs
from ..search.shelf import LAYERS, Shelf
from ..sources.opened import Source
from ..sources.parts import Decoded
from . import layers
from .embedding import round_embedding
from .layers import LayerRounding, Module
from .methods import METHODS, NEAREST
from .replay import Replay

STATES = 4  # of each trajectory
SCRATCH = "rounding"  # folder in the new checkpoint, while it is written
EMBEDDING = "model.decoder.embed_tokens"
SELF_CONDITIONING = "model.decoder.self_conditioning"
Stage = Callable[[str, int, int], None]  # called with what is done, how far it is, and of how much


@dataclass(frozen=True)
class Rounding:
    """What rounding came to.

    Attributes:
        method: a name of `METHODS`.
        prompts: that states were recorded of.
        positions: of canvases and prompts in these states.
        modules: what GPTQ did, module by module.
        others: quantized modules that took their nearest codes.
        memory: bytes that rounding needs at most, about.
    """

    method: str
    prompts: int
    positions: int
    modules: tuple[Module, ...] = ()
    others: tuple[str, ...] = ()
    memory: int = 0

    def by_kind(self) -> list[tuple[str, float, float, int]]:
        """(path without its layer's number, error of the nearest codes, error as rounded, experts with few positions).

        Errors are means over layers.
        """
        kinds: dict[str, list[Module]] = {}
        for one in self.modules:
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", one.path), []).append(one)
        found = []
        for path, some in kinds.items():
            near, error = (sum(values) / len(some) for values in zip(*((one.nearest, one.error) for one in some)))
            found.append((path, near, error, sum(one.few for one in some)))
        return found


class Calibrated:
    """The rounding of one conversion.

    Args:
        method: a name of `METHODS`, not the nearest codes.
        source: what is converted.
        jobs: of the conversion.
        folder: to be made, for what is kept on the disk meanwhile.
        prompt_file: the user's prompts; None takes the bundled ones.
        stage: told how far it is.

    Raises:
        CheckpointError: the source is quantized already.
        OptionError: nothing is quantized, or in affine mode.
        MemoryLimitError: the machine has too little memory.
    """

    def __init__(
        self,
        method: str,
        source: Source,
        jobs: Sequence[Job | Decoded],
        folder: Path,
        prompt_file: str | os.PathLike | None = None,
        stage: Stage | None = None,
    ):
        check_method(method)
        checkpoint = source.checkpoint
        if source.decode is None and checkpoint.quantization:
            raise CheckpointError(f"{checkpoint.path} is quantized already; round the original weights.")
        self._how = {job.target.removesuffix(".weight"): job.quantization for job in jobs if job.quantization}
        if not any(one.mode == "affine" for one in self._how.values()):
            raise OptionError(f"rounding is {method}, which needs affine quantization; give a recipe such as 4bit.")
        self._folder, self._stage = folder, stage or (lambda what, done, total: None)
        self._dtype: mx.Dtype = getattr(mx, DTYPES[float_dtype(jobs)])
        self._shelf = Shelf(source)
        tokenizer = load_tokenizer(checkpoint)
        self._prompts = (
            prompts.bundled(tokenizer) if prompt_file is None else prompts.read(tokenizer, Path(prompt_file))
        )
        self._options, _ = own_options(checkpoint, tokenizer, checkpoint.config.text.vocab_size)
        self._needed = self._memory(checkpoint)
        if self._needed > device.available():
            raise MemoryLimitError(
                f"rounding by {method} takes about {human(self._needed)}, and this machine gives "
                f"{human(device.available())}; give fewer prompts."
            )
        self.rounding = Rounding(method, len(self._prompts), 0, memory=self._needed)
        with told_errors(folder):
            folder.mkdir()

    def close(self) -> None:
        """Remove what was kept on the disk."""
        shutil.rmtree(self._folder)

    def round(self) -> dict[str, Path]:
        """Record states, and round the weights of one layer after the other.

        Returns:
            {module path: the file that holds its new weight, scales and biases}.
        """
        shelf, told = self._shelf, human(self._needed)
        seen = trajectories.record(
            shelf.trunk(),
            self._options,
            self._prompts,
            STATES,
            progress=lambda done, total: self._stage(f"Recording states (rounding takes about {told})", done, total),
        )
        positions = sum(one.canvases.size + len(one.prefix) for one in seen)
        self.rounding = replace(self.rounding, positions=positions)
        return self._round_layers(seen)

    def _round_layers(self, seen: Sequence[trajectories.Trajectory]) -> dict[str, Path]:
        text, trunk, files = self._shelf.config.text, self._shelf.trunk(), {}
        decoder, modules = trunk.model.decoder, []
        head = LayerRounding(self._how.get, self._dtype)
        table, scale = self._round_embedding(seen, head), trunk.head.embed_scale
        replay = Replay(text, seen, lambda tokens: table[tokens].astype(mx.float32) * scale)
        count = len(text.layer_types)
        for index in range(-1, count):
            work = head if index < 0 else LayerRounding(self._how.get, self._dtype)
            if index < 0:
                conditioning, own = replay.conditioning(), decoder.self_conditioning
                layers.round_mlp(SELF_CONDITIONING, own, own.pre_norm(conditioning), work)
                replay.condition(own)
            else:
                layer = self._shelf.layer(index)
                layers.round_layer(replay, layer, index, self._shelf.scalars(index), work)
            file = self._folder / f"rounded-{index}.safetensors"
            kinds = ("weight", "scales", "biases")
            arrays = {f"{path}.{k}": one for path, made in work.rounded.items() for k, one in zip(kinds, made)}
            mx.save_safetensors(str(file), arrays)
            files.update(dict.fromkeys(work.rounded, file))
            modules += work.modules
            self._stage("Rounding layers", index + 1, count)
        others = tuple(path for path in self._how if path not in files)
        self.rounding = replace(self.rounding, modules=tuple(modules), others=others)
        return files

    def _round_embedding(self, seen: Sequence[trajectories.Trajectory], work: LayerRounding) -> mx.array:
        """The embedding as it becomes, [V, H] float32; what the head multiplies it with is the source's."""
        decoder = self._shelf.trunk().model.decoder
        rows = [mx.zeros((0, self._shelf.config.text.hidden_size))]
        if EMBEDDING in self._how:
            for _, states in outputs(self._shelf.trunk(), self._shelf.layer, seen):
                rows.append(decoder.norm(states).reshape(-1, states.shape[-1]).astype(mx.float32))
        return round_embedding(EMBEDDING, decoder.embed_tokens.weight, mx.concatenate(rows), work)

    def _memory(self, checkpoint: Checkpoint) -> int:
        """Bytes that rounding needs at most, about."""
        text, shapes = checkpoint.config.text, checkpoint.shapes
        sizes: dict[str, int] = {}
        for name, shape in shapes.items():
            key = name.split(".")[3] if name.startswith(LAYERS) else "trunk"
            if "vision" not in name:
                sizes[key] = sizes.get(key, 0) + prod(shape)
        positions = sum(len(one) + STATES * checkpoint.config.canvas_length for one in self._prompts)
        rows = positions * 4 * (8 * text.hidden_size + text.num_attention_heads * text.global_head_dim)
        layer = max(size for key, size in sizes.items() if key != "trunk")
        return 4 * (2 * sizes["trunk"] + 2 * layer) + rows + 3 * layers.EXPERT_BYTES


def check_method(method: str) -> None:
    """Refuse an unknown name.

    Raises:
        OptionError: there is no such method.
    """
    if method not in METHODS:
        raise OptionError(f"rounding is {method!r}; take one of {', '.join(METHODS)}.")


def is_plain(method: str) -> bool:
    """Whether a method needs nothing but the weights."""
    check_method(method)
    return method == NEAREST
