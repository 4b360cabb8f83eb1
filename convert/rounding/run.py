"""Rounding in a conversion: states are recorded, weights rounded a layer at a time, scales trained at the end."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import mlx.core as mx

from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.tokenizer import load_tokenizer
from mlx_dgemma.errors import CheckpointError, MemoryLimitError, OptionError, human
from mlx_dgemma.files import told_errors
from mlx_dgemma.model import device
from mlx_dgemma.prompt.endings import own_options

from ..jobs import DTYPES, Job, float_dtype, to_bytes
from ..recipes import Quantization
from ..search import prompts, trajectories
from ..search.replay import outputs
from ..search.shelf import LAYERS, Shelf
from ..search.trajectories import Trajectory
from ..sources.opened import Source
from ..sources.parts import Decoded
from . import dwq, layers
from .dwq import Tuned
from .layers import LayerRounding, Module
from .methods import METHODS, NEAREST
from .replay import Replay
from .targets import write_targets

STATES = 4  # of each trajectory
SCRATCH = "rounding"  # folder in the new checkpoint, while it is written
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
        tuned: what training came to, or None.
        memory: bytes that rounding needs at most, about; the model under training is counted.
    """

    method: str
    prompts: int
    positions: int
    modules: tuple[Module, ...] = ()
    others: tuple[str, ...] = ()
    tuned: Tuned | None = None
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
        if "dwq" in method and not any(one.mode == "affine" and one.bits < dwq.BITS for one in self._how.values()):
            raise OptionError(
                f"rounding is {method}, which trains affine weights of fewer than {dwq.BITS} bits; give a recipe such "
                "as 4bit."
            )
        self._method, self._folder, self._stage = method, folder, stage or (lambda what, done, total: None)
        self._dtype: mx.Dtype = getattr(mx, DTYPES[float_dtype(jobs)])
        self._shelf = Shelf(source)
        self._trajectories: list[Trajectory] = []
        tokenizer = load_tokenizer(checkpoint)
        self._prompts = (
            prompts.bundled(tokenizer) if prompt_file is None else prompts.read(tokenizer, Path(prompt_file))
        )
        self._options, _ = own_options(checkpoint, tokenizer, checkpoint.config.text.vocab_size)
        self._needed = self._memory(checkpoint)
        if self._needed > device.available():
            raise MemoryLimitError(
                f"rounding by {method} takes about {human(self._needed)}, and this machine gives "
                f"{human(device.available())}; give fewer prompts{'' if method == 'gptq' else ', or take gptq alone'}."
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
            {module path: the file that holds its new weight, scales and biases}; empty without GPTQ.
        """
        shelf, told = self._shelf, human(self._needed)
        self._trajectories = trajectories.record(
            shelf.trunk(),
            self._options,
            self._prompts,
            STATES,
            progress=lambda done, total: self._stage(f"Recording states (rounding takes about {told})", done, total),
        )
        positions = sum(one.canvases.size + len(one.prefix) for one in self._trajectories)
        self.rounding = replace(self.rounding, positions=positions)
        if "dwq" in self._method:
            trunk = shelf.trunk()
            found = outputs(trunk, shelf.layer, self._trajectories)
            write_targets(self._folder, trunk, found, self._trajectories)
        return self._round_layers() if "gptq" in self._method else {}

    def _round_layers(self) -> dict[str, Path]:
        text, trunk, files = self._shelf.config.text, self._shelf.trunk(), {}
        decoder, modules = trunk.model.decoder, []
        table, scale = decoder.embed_tokens.weight, trunk.head.embed_scale
        how = self._how.get("model.decoder.embed_tokens")
        if how is not None:
            table = layers.nearest(table, how, self._dtype)
        replay = Replay(text, self._trajectories, lambda tokens: table[tokens].astype(mx.float32) * scale)
        count = len(text.layer_types)
        for index in range(-1, count):
            work = LayerRounding(self._how.get, self._dtype)
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

    def tune(self, result: Checkpoint) -> None:
        """Train the scales and biases of a checkpoint that was written, and write them into its files.

        Without DWQ nothing happens.
        """
        if "dwq" not in self._method:
            return
        del self._shelf
        mx.clear_cache()
        model = build(result, "float32" if device.on_cpu() else None)
        dwq.unpack_for_training(model)
        model.train()
        tuned = dwq.tune(
            model,
            self._trajectories,
            self._folder,
            self._dtype,
            dwq.EPOCHS,
            progress=lambda done, total: self._stage("Training scales", done, total),
        )
        if tuned.kept:
            for path, pair in tuned.scales.items():
                for kind, array in zip(("scales", "biases"), pair):
                    info = result.tensors[f"{path}.{kind}"]
                    with info.file.open("r+b") as file:
                        file.seek(info.start)
                        file.write(to_bytes(array).tobytes())
        self.rounding = replace(self.rounding, tuned=replace(tuned, scales={}))

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
        gptq = 4 * (sizes["trunk"] + 2 * layer) + rows + 3 * layers.EXPERT_BYTES
        if "dwq" not in self._method:
            return gptq
        packed = sum(_packed(shapes[f"{path}.weight"], one) for path, one in self._how.items())
        trained = [shapes[f"{path}.weight"] + (one.group_size,) for path, one in self._how.items() if one.bits < 8]
        values = sum(2 * 5 * 4 * prod(shape[:-1]) // shape[-1] for shape in trained)
        longest = max(map(len, self._prompts)) + STATES * checkpoint.config.canvas_length
        per_row = 4 * (12 * text.hidden_size + 4 * text.top_k_experts * text.moe_intermediate_size)
        return max(gptq, packed + values + longest * per_row * len(text.layer_types))


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


def _packed(shape: tuple[int, ...], how: Quantization) -> int:
    return prod(shape) * how.bits // 8 + 8 * prod(shape) // how.group_size
