"""Find a checkpoint (a folder or a Hub id), read and check it, build the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from . import weights
from .config import GenerationConfig, ModelConfig, ProcessorConfig, read_json
from .errors import CheckpointError, DgemmaError, OptionError
from .layers import on_cpu
from .model import DiffusionGemma

DEMO = Path(__file__).parent / "demo"
INDEX = "model.safetensors.index.json"
FLOATS = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_DTYPES = {**FLOATS, "U32": mx.uint32, "U8": mx.uint8}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its bytes are file[start:end]."""

    file: Path
    dtype: str  # safetensors' name: BF16, F32, U32, ...
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file announces, without reading any.

    Raises:
        CheckpointError: the file is missing, no safetensors file, or shorter than it says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{file} is truncated: its header is cut off; download it again.")
            header = json.loads(stream.read(length))
        tensors = {
            name: TensorInfo(file, one["dtype"], tuple(one["shape"]), *(8 + length + at for at in one["data_offsets"]))
            for name, one in header.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise CheckpointError(f"The shard {file} is missing; download it again.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file} is not a safetensors file; download it again.") from None
    end = max((info.end for info in tensors.values()), default=0)
    if end > size:
        raise CheckpointError(f"{file} is truncated: it has {size} of {end} bytes; download it again.")
    return tensors


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder, checked against its index.

    Raises:
        CheckpointError: a missing or truncated shard, a shard that the index does not know, or a
            tensor that stands in the index and in no shard, or the other way round.
    """
    files = sorted(path.glob("*.safetensors"))
    if not (path / INDEX).exists():
        if not files:
            raise CheckpointError(
                f"{path} holds no .safetensors file; point at a folder that holds a whole checkpoint."
            )
        if len(files) > 1:
            raise CheckpointError(f"{path} holds {len(files)} shards but no {INDEX}; download the index.")
        return read_header(files[0])
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise CheckpointError(f"{path / INDEX} has no weight_map; download it again.")
    named = {path / name for name in index.values()}
    if stray := sorted(set(files) - named):
        raise CheckpointError(f"The shard {stray[0]} is not in {INDEX}; remove it or download the index again.")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(named):
        tensors.update(read_header(file))
    for name, shard in index.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{INDEX} names the tensor {name}, but {shard} does not hold it; download both again."
            )
    if extra := sorted(set(tensors) - set(index)):
        raise CheckpointError(
            f"{tensors[extra[0]].file} holds {extra[0]}, which {INDEX} does not name; download both again."
        )
    return tensors


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was read and found whole. No weight is in memory yet."""

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
            CheckpointError: whatever is missing, broken or of another model.
        """
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder; point at the folder that holds config.json.")
        raw = read_json(path / "config.json")
        config = ModelConfig.from_dict(raw)
        generation, processor = path / "generation_config.json", path / "processor_config.json"
        return cls(
            path,
            config,
            GenerationConfig.from_dict(read_json(generation) if generation.exists() else {}, config.eos_token_ids),
            ProcessorConfig.from_dict(read_json(processor) if processor.exists() else {}),
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
        return _shapes(DiffusionGemma(self.config))

    @property
    def parameters(self) -> int:
        """Number of weights, whatever bits hold them."""
        return sum(_size(shape) for shape in self.shapes.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and biases included, per weight."""
        return self.nbytes * 8 / self.parameters


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: a.shape for name, a in dict(tree_flatten(model.parameters())).items()}


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def find(name: str | os.PathLike | None = None) -> Path:
    """The folder of a checkpoint: a path, else a Hub id, looked for on this machine first.

    Args:
        name: None takes $MLX_DGEMMA_MODEL, else the bundled demo.

    Raises:
        CheckpointError: no such folder, no such Hub id, or no network to ask.
    """
    text = str(name or os.environ.get("MLX_DGEMMA_MODEL") or DEMO)
    give = "give a folder or a Hub id such as google/diffusiongemma-26B-A4B-it"
    return fetch(text, ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"), _whole, give)


def _whole(folder: Path) -> bool:
    """Whether a snapshot is a checkpoint; a shard that is missing raises."""
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors")) and bool(read_tensors(folder))


def fetch(
    name: str,
    patterns: Sequence[str],
    whole: Callable[[Path], bool],
    give: str,
    kinds: tuple[str, str] = ("folder", "repository"),
    error: type[DgemmaError] = CheckpointError,
    **wanted: str,
) -> Path:
    """A path of this machine, else a Hub id's snapshot, looked for on this machine first.

    Args:
        name: path or id.
        patterns: names of the files to download.
        whole: whether a snapshot holds all that is needed; what does not, or raises CheckpointError, is downloaded.
        give: what to do about a path that does not exist, for the message.
        kinds: what it is on this machine and on the Hub, for messages.
        error: what is raised.
        wanted: further arguments of `snapshot_download`.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise error(f"{name} does not exist; {give}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    here, there = kinds
    asked: dict[str, Any] = {"allow_patterns": list(patterns), **wanted}
    try:
        try:
            found = Path(snapshot_download(name, local_files_only=True, **asked))
            if whole(found):  # an interrupted download is completed below
                return found
        except (LocalEntryNotFoundError, CheckpointError):
            pass
        return Path(snapshot_download(name, **asked))
    except GatedRepoError:
        raise error(f"{name} is gated; accept its terms on the Hub and run `hf auth login`.") from None
    except RepositoryNotFoundError:
        raise error(
            f"{name} is neither a {here} here nor a {there} on the Hub; check the name, or log in if it is private."
        ) from None
    except HFValidationError:
        raise error(f"{name!r} is neither a {here} here nor a valid Hub id.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
        raise error(
            f"{name} is not on this machine and the Hub cannot be reached ({type(problem).__name__}); "
            "connect and try again, or give a folder."
        ) from None


def build(checkpoint: Checkpoint, dtype: str | None = None, dequantize: bool = False) -> DiffusionGemma:
    """The model with its weights, evaluated.

    Args:
        checkpoint: what to build.
        dtype: of activations and unquantized weights ("float32", "bfloat16", "float16"); None keeps
            what is stored. On the CPU unquantized experts are float32 all the same: MLX has no
            other kernel for them there.
        dequantize: unpack quantized weights.

    Raises:
        OptionError: an unknown dtype.
        CheckpointError: a tensor missing, unknown, or of a wrong shape or dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; it should be one of {', '.join(DTYPES)}.")
    model = DiffusionGemma(checkpoint.config)
    stored = {name for name in checkpoint.tensors if name.endswith(".scales")}
    if checkpoint.quantization:
        _quantize(model, checkpoint.quantization, stored, checkpoint.config)
    elif stored:
        raise CheckpointError(f"The checkpoint holds {min(stored)}, but config.json has no quantization entry.")
    shapes = _shapes(model)
    plan = weights.plan(list(checkpoint.tensors), checkpoint.config, set(shapes))
    cast = DTYPES[dtype] if dtype else None
    model.load_weights(list(_arrays(checkpoint, plan, shapes, cast)), strict=True)
    if dequantize:
        _dequantize(model, cast)
    suit_device(model)
    mx.eval(model.parameters())
    return model


def suit_device(model: nn.Module) -> None:
    """Lay weights out as MLX's default device computes fastest: on the CPU column by column.

    The CPU wheels' BLAS takes half the time for those, and has experts in float32 only.
    """
    if not on_cpu():
        return
    for module in model.modules():
        if isinstance(module, SwitchLinear):
            module.weight = module.weight.astype(mx.float32)
        if isinstance(module, (nn.Linear, SwitchLinear)):
            module.weight = mx.contiguous(module.weight.swapaxes(-1, -2)).swapaxes(-1, -2)


def _quantize(model: nn.Module, quantization: dict, stored: set[str], config: ModelConfig) -> None:
    """Give quantized modules to every path whose scales are stored, with its own parameters."""
    paths = {
        target.removesuffix(".scales") for name in stored if (m := weights.match(name, config)) and (target := m[0])
    }
    default = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}

    def choose(path: str, module: nn.Module):
        if path not in paths:
            return False
        own = quantization.get(path) or quantization.get(path.replace("gate_up_proj", "gate_proj"))
        return {**default, "mode": "affine", **own} if isinstance(own, dict) else default

    try:
        nn.quantize(model, class_predicate=choose)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"config.json has a quantization that MLX cannot compute ({error}).") from None


def _arrays(
    checkpoint: Checkpoint, plan: dict[str, list[weights.Source]], shapes: dict, cast: mx.Dtype | None
) -> Iterator[tuple[str, mx.array]]:
    files: dict[Path, dict[str, mx.array]] = {}
    for target, sources in plan.items():
        parts = []
        for source in sources:
            info = checkpoint.tensors[source.name]
            _check(info, source, shapes[target], packed=f"{target.rpartition('.')[0]}.scales" in shapes)
            if info.file not in files:
                loaded = mx.load(str(info.file))  # lazy: read when evaluated
                assert isinstance(loaded, dict)
                files[info.file] = loaded
            parts.append(files[info.file].pop(source.name))
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
        if cast is not None and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(cast)
        yield target, array


def _check(info: TensorInfo, source: weights.Source, shape: tuple[int, ...], packed: bool) -> None:
    wanted = shape if source.half is None else (shape[0], shape[1] // 2, *shape[2:])
    if info.shape != wanted:
        raise CheckpointError(
            f"{source.name} has the shape {list(info.shape)}, but config.json asks for {list(wanted)}."
        )
    if info.dtype not in FLOATS and not (packed and info.dtype in ("U32", "U8")):
        raise CheckpointError(f"{source.name} has the dtype {info.dtype}; it should be one of {', '.join(FLOATS)}.")


def _dequantize(model: nn.Module, cast: mx.Dtype | None) -> None:
    """Replace every quantized module by its plain twin."""

    def plain(module: nn.Module) -> nn.Module:
        twin = {nn.QuantizedLinear: nn.Linear, nn.QuantizedEmbedding: nn.Embedding, QuantizedSwitchLinear: SwitchLinear}
        weight = mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )
        kind = twin[type(module)]
        new = kind(1, 1, 1, False) if kind is SwitchLinear else kind(1, 1)
        new.pop("bias", None)
        new.weight = weight if cast is None else weight.astype(cast)
        return new

    quantized = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
    leaves = [(path, plain(m)) for path, m in model.named_modules() if isinstance(m, quantized)]
    model.update_modules(tree_unflatten(leaves))
