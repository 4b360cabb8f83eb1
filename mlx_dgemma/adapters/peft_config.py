"""PEFT's adapter_config.json: which modules have deltas, and of which rank and scale."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..model.config import read_json

# The parameters of experts in the order in which Transformers declares them. PEFT wraps the first one innermost.
EXPERT_PARTS = ("gate_up_proj", "down_proj")

_USED = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern use_dora init_lora_weights target_modules "
    "target_parameters exclude_modules layers_to_transform layers_pattern".split()
)
# Names, training notes, and settings that only matter together with keys that are refused.
_IGNORED = frozenset(
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode loftq_config "
    "lora_dropout lora_ga_config megatron_core peft_version qalora_group_size revision runtime_config task_type".split()
)
# Initializations that leave the base weights as they are; pissa, olora, corda, loftq and lora_ga change them.
_INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class PeftConfig:
    """The parts of adapter_config.json that say what an adapter changes.

    Attributes:
        rank: default rank.
        alpha: default alpha; the scale is alpha / rank, or alpha / sqrt(rank) with `rslora`.
        ranks: exceptions by name; the first pattern that matches a name counts.
        alphas: the same for alpha.
        rslora: rank-stabilized LoRA.
        dora: DoRA instead of LoRA.
        modules: targeted modules: a pattern of full names, or a list of names or ends of names.
        exclude: modules that are not targeted, in the same form.
        parameters: targeted parameters of experts: names or ends of names.
        layers: numbers of the layers whose modules are targeted; empty for all. Parameters ignore it.
        layer_patterns: patterns that find the number of a layer in a module's name.
    """

    rank: int
    alpha: float
    ranks: list[tuple[re.Pattern, int]]
    alphas: list[tuple[re.Pattern, float]]
    rslora: bool
    dora: bool
    modules: str | list[str]
    exclude: str | list[str]
    parameters: list[str]
    layers: set[int]
    layer_patterns: list[re.Pattern]

    @classmethod
    def read(cls, file: Path) -> PeftConfig:
        """Read and check a file.

        Raises:
            CheckpointError: it is not a LoRA, a value has a wrong type, or a key changes the computation in a way
                that is not supported.
        """
        raw = read_json(file)
        if raw.get("peft_type") != "LORA":
            raise CheckpointError(f"{file} has the peft_type {raw.get('peft_type')!r}; only LORA is supported.")
        for key, value in raw.items():
            # An unknown key may change the computation, unless its value is empty or false.
            if key not in _USED | _IGNORED and value and (key, value) != ("bias", "none"):
                raise _unsupported(file, key, value)
        if (initialization := raw.get("init_lora_weights")) not in _INITIALIZATIONS:
            raise _unsupported(file, "init_lora_weights", initialization)
        layers = raw.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers or []
        if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
            raise _wrong_value(file, "layers_to_transform", layers, "a list of numbers")
        parameters, patterns = _names(file, raw, "target_parameters"), _names(file, raw, "layers_pattern")
        if isinstance(parameters, str):
            raise _wrong_value(file, "target_parameters", parameters, "a list of names")
        patterns = [patterns] if isinstance(patterns, str) else patterns or ["[^.]*"]
        return cls(
            _rank(file, "r", raw.get("r", 8)),
            _alpha(file, "lora_alpha", raw.get("lora_alpha", 8)),
            _by_pattern(file, raw, "rank_pattern", _rank),
            _by_pattern(file, raw, "alpha_pattern", _alpha),
            _flag(file, raw, "use_rslora"),
            _flag(file, raw, "use_dora"),
            _names(file, raw, "target_modules"),
            _names(file, raw, "exclude_modules"),
            parameters,
            set(layers),
            [_compile(file, "layers_pattern", name, r"(?:^|.*?\.){}\.(?P<index>\d+)\.") for name in patterns],
        )

    def targets(self, name: str) -> bool:
        """True if PEFT adapts the module of that name."""
        every = isinstance(self.modules, str) and self.modules.lower() == "all-linear"
        if not (every or _matches(self.modules, name)) or (self.exclude and _matches(self.exclude, name)):
            return False
        found = next((match for pattern in self.layer_patterns if (match := pattern.match(name))), None)
        return not self.layers or (found is not None and int(found["index"]) in self.layers)

    def expert_targets(self, module: str) -> list[str]:
        """The parameters of an experts module that PEFT adapts, the innermost wrapper first."""
        names = [f"{module}.{part}" for part in EXPERT_PARTS]
        return [name for name in names if _matches(self.parameters, name)]

    def rank_of(self, name: str) -> int:
        """The rank of the delta of a module or parameter."""
        return next((rank for pattern, rank in self.ranks if pattern.match(name)), self.rank)

    def scale_of(self, name: str) -> float:
        """The scale of the delta of a module or parameter."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(name)), self.alpha)
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _unsupported(file: Path, key: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{file} sets {key} to {json.dumps(value)}, which is not supported; train or export the adapter without it."
    )


def _wrong_value(file: Path, key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"{file} sets {key} to {json.dumps(value)}; it should be {wanted}.")


def _rank(file: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _wrong_value(file, key, value, "a whole number of at least 1")
    return value


def _alpha(file: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _wrong_value(file, key, value, "a number")
    return value


def _flag(file: Path, raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key) or False
    if value not in (True, False):
        raise _wrong_value(file, key, value, "true or false")
    return value


def _names(file: Path, raw: dict[str, Any], key: str) -> Any:
    """A pattern as a string, or a list of names."""
    value = raw.get(key) or []
    if isinstance(value, str):
        _compile(file, key, value)
    elif not isinstance(value, list) or any(not isinstance(name, str) for name in value):
        raise _wrong_value(file, key, value, "a list of names or a pattern")
    return value


def _by_pattern(
    file: Path, raw: dict[str, Any], key: str, check: Callable[[Path, str, Any], Any]
) -> list[tuple[re.Pattern, Any]]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise _wrong_value(file, key, value, "an object of names and numbers")
    return [
        (_compile(file, key, name, r"(?:.*\.)?(?:{})$"), check(file, f"{key}'s {name}", number))
        for name, number in value.items()
    ]


def _compile(file: Path, key: str, pattern: str, template: str = "{}") -> re.Pattern:
    try:
        return re.compile(template.replace("{}", pattern))
    except re.error as error:
        raise _wrong_value(file, key, pattern, f"a regular expression ({error})") from None


def _matches(wanted: str | list[str], name: str) -> bool:
    """True if a pattern matches the full name, or if one of several names is equal to it or to its end."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == other or name.endswith(f".{other}") for other in wanted)
