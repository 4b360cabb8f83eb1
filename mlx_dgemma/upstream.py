"""What is taken from mlx-lm. Its import sets this process's limit of open files, which is undone here.

It asks for 2,048 of 4,096. That fails where the hard limit is lower, as in many containers, and elsewhere it lowers
what a server may have.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _limits_kept() -> Iterator[None]:
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *arguments: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit


with _limits_kept():
    from mlx_lm.models.rope_utils import ProportionalRoPE
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
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
    "load_tokenizer",
]
