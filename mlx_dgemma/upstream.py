"""What is taken from mlx-lm. Its import sets this process's limit of open files, which is undone here.

It asks for 2,048 of 4,096. That fails where the hard limit is lower, as in many containers, and elsewhere it lowers
what a server may have.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


@contextmanager
def _limits_kept() -> Iterator[None]:
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *arguments: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit


with _limits_kept():
    from mlx_lm import load as load_autoregressive
    from mlx_lm import stream_generate
    from mlx_lm.models.rope_utils import ProportionalRoPE
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

__all__ = [
    "DoRALinear",
    "LoRALinear",
    "LoRASwitchLinear",
    "ProportionalRoPE",
    "QuantizedSwitchLinear",
    "SwitchLinear",
    "load_autoregressive",
    "load_tokenizer",
    "make_sampler",
    "stream_generate",
]


def mlx_vlm() -> ModuleType | None:
    """mlx-vlm, which knows some models that mlx-lm does not; None: it is not installed."""
    with _limits_kept():
        try:
            return import_module("mlx_vlm")
        except ImportError:
            return None
