"""What passes of a model cost on this machine: measured once and kept, else reckoned from the weights.

`choose_mode` compares modes by them, and drafts are made while they save more than they cost.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import __version__
from ..errors import DgemmaError
from ..files import atomic_file, cache_folder
from ..model import device, rng
from ..model.config import TextConfig
from ..model.diffusion_gemma import DiffusionGemma
from ..model.kv_cache import Prefix
from .control import Layout
from .lookahead import denoise_block
from .options import GenerationOptions

NO_MEASURE = "MLX_DGEMMA_MEASURE"  # environment variable; 0: nothing is measured, and what was is not read
PREFIX = 1024  # positions before the passes
VERIFIED, DRAFTED, STEPPED = (5, 17, 65), (17, 65), (64, 256)  # tokens and positions that passes are measured with
RUNS, WARM_UP = 3, 1
TOKENS = 8  # passes over one token, which overlap
AT_ONCE = 16  # positions of a draft whose logits over the whole vocabulary are in memory at once


@dataclass(frozen=True)
class Costs:
    """What passes over one row take, behind a prefix. The unit is the same for all.

    Attributes:
        token: a pass over one token, its draw, and the reading of the token before.
        verify: by tokens, a pass over a draft and the token before it, and the draws of all its places.
        draft: by positions, a denoising step that makes a draft.
        step: by positions, a denoising step of a canvas.
        measured: in milliseconds on this machine; else in passes over one token, reckoned.
    """

    token: float
    verify: dict[int, float]
    draft: dict[int, float]
    step: dict[int, float]
    measured: bool = False

    def verify_cost(self, tokens: int) -> float:
        """Of a pass that verifies a draft, the token before it included."""
        return between({1: self.token, **self.verify}, tokens)

    def draft_cost(self, positions: int) -> float:
        """Of a denoising step that makes a draft."""
        return between(self.draft, positions)

    def step_cost(self, positions: int) -> float:
        """Of a denoising step of a canvas."""
        return between(self.step, positions)


def between(known: dict[int, float], at: int) -> float:
    """A value between known ones, on a straight line; before the first the first, behind the last in proportion."""
    places = sorted(known)
    if at > places[-1]:
        return known[places[-1]] * at / places[-1]
    return float(np.interp(at, places, [known[place] for place in places]))


def balance() -> int:
    """Tokens that a device computes with a weight in the time in which it reads it, where nothing was measured.

    On Metal of an M2 Max: 13.6 TFLOP/s in 16 bit over 400 GB/s, at 4 bits a weight.
    """
    return 8 if device.on_cpu() else 10 if device.on_metal() else 64


def pass_cost(config: TextConfig, count: int, balance: int) -> float:
    """What a pass over `count` tokens costs, in passes over one token; launches and attention's scores are left out.

    A token takes `top_k_experts` of `num_experts`, and others take others. Attention's matrices, the dense branch and
    the vocabulary are read once in any case. A weight costs its reading or its arithmetic, whichever takes longer.
    """
    hidden, experts = config.hidden_size, config.num_experts
    shared = float(config.vocab_size * hidden)
    for kind in config.layer_types:
        heads, dim = config.kv_shape(kind)
        shared += hidden * (dim * (2 * config.num_attention_heads + 2 * heads) + 3 * config.intermediate_size)
    expert = 3.0 * hidden * config.moe_intermediate_size * len(config.layer_types)
    one = config.top_k_experts / experts

    def cost(tokens: int) -> float:
        of_experts = max(1 - (1 - one) ** tokens, one * tokens / balance)
        return shared * max(1, tokens / balance) + expert * experts * of_experts

    return cost(count) / cost(1)


def reckoned(config: TextConfig) -> Costs:
    """Costs in passes over one token, from the sizes of the weights alone."""
    at = (5, 9, 17, 33, 65, 128, 256)
    known = {count: pass_cost(config, count, balance()) for count in at}
    return Costs(1.0, known, known, known)


class KnownCosts:
    """The costs of a model on this machine: measured when they are first asked for, and kept in a file.

    They are measured on the thread that made this object, which may use the model. On others they are read from the
    file, else reckoned. Ranks of a group take what rank 0 has in its file, else reckon: all must decide alike.

    Args:
        model: whose passes are measured.
    """

    def __init__(self, model: DiffusionGemma):
        self._model, self._thread = model, threading.get_ident()
        self._costs: Costs | None = None
        if model.group.size > 1:
            found = read(file_of(model)) if os.environ.get(NO_MEASURE) != "0" else None
            held = model.group.share(found and asdict(found))
            self._costs = of_values(held) if held else reckoned(model.config.text)

    def __call__(self) -> Costs:
        """The costs, as well as they are known."""
        if self._costs is None and os.environ.get(NO_MEASURE) != "0":
            path = file_of(self._model)
            costs = read(path)
            if costs is None and threading.get_ident() == self._thread:
                costs = measure(self._model)
                write(path, costs)
                mx.clear_cache()
            self._costs = costs
        return self._costs or reckoned(self._model.config.text)


def measure(model: DiffusionGemma) -> Costs:
    """Time passes of a model, in milliseconds. At the release's shape that takes some twenty passes."""
    config = model.config
    prefix = random_prefix(model, min(PREFIX, config.text.max_position_embeddings // 2))
    canvas = [count for count in STEPPED if count < config.canvas_length] + [config.canvas_length]
    drafted = {min(count, config.canvas_length) for count in DRAFTED}
    with device.wired_limit():
        return Costs(
            _token(model, prefix),
            {count: _median(partial(_verify, model, prefix, count)) for count in VERIFIED},
            {count: _median(partial(_draft, model, prefix, count)) for count in drafted},
            {count: _step(model, prefix, count) for count in canvas},
            measured=True,
        )


def random_prefix(model: DiffusionGemma, length: int) -> Prefix:
    """So many positions of random keys and values, which are as good as encoded ones where time is measured."""
    prefix, random = model.new_prefix(), iter(mx.random.split(mx.random.key(5), 1024))
    decoder, kinds = model.model.decoder, model.config.text.layer_types
    for own, layer, kind in zip(decoder.layers, prefix.layers, kinds):
        _, dim = model.config.text.kv_shape(kind)
        projection = own.self_attn.k_proj
        projection = projection.get("linear", projection)  # which an adapter wraps
        heads = projection.weight.shape[0] // dim  # of several ranks, this one's
        shape = 1, heads, layer.used(length), dim
        keys, values = (mx.random.normal(shape, key=next(random)).astype(model.dtype) for _ in range(2))
        layer.extend(keys, values, 0)
        mx.eval(layer.stage, *(array for array in layer.arrays if array is not None))
    prefix.offset = length
    return prefix


def _median(start: Callable[[], None]) -> float:
    """Median milliseconds of a call that ends when its work has."""
    taken = []
    for _ in range(WARM_UP + RUNS):
        began = time.perf_counter()
        start()
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken[WARM_UP:])


def _token(model: DiffusionGemma, prefix: Prefix) -> float:
    """Of a token in causal mode, where each pass is under way before the token before is read."""
    prefix, drawn, ends = prefix.fork(), mx.zeros((1, 1), mx.int32), []
    for _ in range(2 + TOKENS):
        before = drawn
        drawn = mx.argmax(model.logits(model.encode_ahead(drawn, [prefix])), axis=-1).astype(mx.int32)
        mx.async_eval(drawn, prefix.state)
        mx.eval(before)
        prefix.accept(1)
        ends.append(time.perf_counter())
    return 1e3 * statistics.median(np.diff(ends)[1:].tolist())


def _verify(model: DiffusionGemma, prefix: Prefix, count: int) -> None:
    hidden = model.encode_ahead(mx.zeros((1, count), mx.int32), [prefix])
    for start in range(0, count, AT_ONCE):
        mx.async_eval(mx.argmax(model.logits(hidden[:, start : start + AT_ONCE]), axis=-1))
    mx.synchronize()


def _draft(model: DiffusionGemma, prefix: Prefix, count: int) -> None:
    key = mx.random.key(3)[None]
    canvas = rng.noise(count, model.config.text.vocab_size, key)
    mx.eval(model.head.predict(model.denoise(canvas, [prefix]), 1.0, key).argmax)


def _step(model: DiffusionGemma, prefix: Prefix, count: int) -> float:
    """Of a step in the loop that generates, made to settle nothing."""
    nothing = {"confidence_threshold": 0.0, "certainty_threshold": 0.0, "patience": 0}
    options = GenerationOptions(**nothing, max_denoising_steps=2 + RUNS)  # type: ignore[arg-type]
    none = mx.zeros((1, count), mx.bool_)
    layout, ends = Layout(mx.zeros((1, count), mx.int32), none, none), [time.perf_counter()]
    for _ in denoise_block(model, prefix, options, mx.random.key(1)[None], layout=layout):
        ends.append(time.perf_counter())
    return 1e3 * statistics.median(np.diff(ends)[1:].tolist())


def file_of(model: DiffusionGemma) -> Path:
    """Where the costs are kept of models of this shape and these dtypes, on this machine with these versions."""
    info = {str(name): value for name, value in mx.device_info().items() if isinstance(value, (str, int))}
    machine = [str(mx.default_device()), info.get("device_name"), platform.machine(), platform.processor()]
    named: Any = tree_flatten(model.parameters())
    parts = {(re.sub(r"\d+", "", name), a.shape, str(a.dtype)) for name, a in named if ".decoder." in name}
    layers, versions = len(model.config.text.layer_types), [__version__, metadata.version("mlx")]
    told = json.dumps([machine, versions, layers, model.config.canvas_length, model.kv_bits, sorted(parts)])
    return cache_folder() / "costs" / f"{sha256(told.encode()).hexdigest()[:32]}.json"


def read(path: Path) -> Costs | None:
    """What `write` wrote; None: nothing that can be used."""
    try:
        costs = of_values(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    tables = costs.verify, costs.draft, costs.step
    values = [costs.token, *(value for table in tables for value in table.values())]
    return costs if all(tables) and all(0 < value < float("inf") for value in values) else None


def of_values(held: dict[str, Any]) -> Costs:
    """Measured costs from the JSON of `asdict`."""
    tables = {name: {int(at): float(value) for at, value in held[name].items()} for name in ("verify", "draft", "step")}
    return Costs(float(held["token"]), **tables, measured=True)  # type: ignore[arg-type]


def write(path: Path, costs: Costs) -> None:
    """Keep costs; where nothing can be written, they are measured again next time."""
    with suppress(DgemmaError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, flush=False) as draft:
            draft.write_text(json.dumps(asdict(costs)))
