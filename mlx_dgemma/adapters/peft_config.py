"""PEFT's adapter_config.json: which modules have deltas, and of which rank and scale."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..constraints.matching import Pattern, PatternError, Steps
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
_LAYER = re.compile(r"\.(\d{1,9})\.")  # what follows the name of the list of layers
MAX_RANK, MAX_ALPHA = 2**16, 1e6
MAX_STEPS = 5_000_000  # of all patterns of a file together: some seconds


class NamePattern:
    """A pattern of modules' names. Files of others hold them, so a match takes a bounded number of steps.

    Args:
        file, key: where it stands, for errors.
        text: a regular expression.
        steps: what is left for all patterns of the file.

    Raises:
        CheckpointError: it is not a regular expression, or cannot be matched in bounded time. All methods raise this.
    """

    def __init__(self, file: Path, key: str, text: str, steps: Steps):
        self.text, self._file, self._key = text, file, key
        with self._named_errors():
            self._pattern = Pattern(text, steps)

    def matches(self, name: str) -> bool:
        """Whether it matches the whole name."""
        with self._named_errors():
            return self._pattern.fullmatch(name)

    def matches_end(self, name: str) -> bool:
        """Whether it matches the whole name, or all that follows one of its dots."""
        literal = self._pattern.literal
        if literal is not None:
            return name == literal or name.endswith(f".{literal}")
        with self._named_errors():
            return len(name) in self._pattern.ends(name, _starts(name))

    def layer(self, name: str) -> int | None:
        """The number that follows a match in a name, as in layers.7.mlp. The match begins as early as possible.

        Raises:
            CheckpointError: several numbers may follow the same beginning.
        """
        for start in _starts(name):
            with self._named_errors():
                ends = self._pattern.ends(name, [start])
            numbers = {int(found[1]) for end in ends if (found := _LAYER.match(name, end))}
            if len(numbers) > 1:
                raise CheckpointError(
                    f"{self._file} sets {self._key} to {_json(self.text)}, which finds several layers in {name}; "
                    "write it without repeats."
                )
            if numbers:
                return numbers.pop()
        return None

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except PatternError as error:
            raise _wrong_value(self._file, self._key, self.text, f"a regular expression ({error})") from None


def _starts(name: str) -> list[int]:
    """Where a name begins, and what follows each of its dots."""
    return [0, *(i + 1 for i, character in enumerate(name) if character == ".")]


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
    ranks: list[tuple[NamePattern, int]]
    alphas: list[tuple[NamePattern, float]]
    rslora: bool
    dora: bool
    modules: NamePattern | list[str]
    exclude: NamePattern | list[str]
    parameters: list[str]
    layers: set[int]
    layer_patterns: list[NamePattern]

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
        steps = Steps(MAX_STEPS)
        return cls(
            _rank(file, "r", raw.get("r", 8)),
            _alpha(file, "lora_alpha", raw.get("lora_alpha", 8)),
            _by_pattern(file, raw, "rank_pattern", _rank, steps),
            _by_pattern(file, raw, "alpha_pattern", _alpha, steps),
            _flag(file, raw, "use_rslora"),
            _flag(file, raw, "use_dora"),
            _names_or_pattern(file, raw, "target_modules", steps),
            _names_or_pattern(file, raw, "exclude_modules", steps),
            parameters,
            set(layers),
            [NamePattern(file, "layers_pattern", pattern, steps) for pattern in patterns],
        )

    def targets(self, name: str) -> bool:
        """True if PEFT adapts the module of that name."""
        every = isinstance(self.modules, NamePattern) and self.modules.text.lower() == "all-linear"
        if not (every or _matches(self.modules, name)) or (self.exclude and _matches(self.exclude, name)):
            return False
        if not self.layers:
            return True
        found = (pattern.layer(name) for pattern in self.layer_patterns)
        return next((number for number in found if number is not None), None) in self.layers

    def expert_targets(self, module: str) -> list[str]:
        """The parameters of an experts module that PEFT adapts, the innermost wrapper first."""
        names = [f"{module}.{part}" for part in EXPERT_PARTS]
        return [name for name in names if _matches(self.parameters, name)]

    def rank_of(self, name: str) -> int:
        """The rank of the delta of a module or parameter."""
        return next((rank for pattern, rank in self.ranks if pattern.matches_end(name)), self.rank)

    def scale_of(self, name: str) -> float:
        """The scale of the delta of a module or parameter."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.matches_end(name)), self.alpha)
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _unsupported(file: Path, key: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{file} sets {key} to {_json(value)}, which is not supported; train or export the adapter without it."
    )


def _wrong_value(file: Path, key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"{file} sets {key} to {_json(value)}; it should be {wanted}.")


def _json(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _rank(file: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _wrong_value(file, key, value, "a whole number of at least 1")
    if value > MAX_RANK:
        raise _wrong_value(file, key, value, f"at most {MAX_RANK}")
    return value


def _alpha(file: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong_value(file, key, value, "a number")
    if not 0 < value <= MAX_ALPHA:
        raise _wrong_value(file, key, value, f"above 0 and at most {MAX_ALPHA:.0f}")
    return value


def _flag(file: Path, raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key) or False
    if value not in (True, False):
        raise _wrong_value(file, key, value, "true or false")
    return value


def _names(file: Path, raw: dict[str, Any], key: str) -> Any:
    """A pattern as a string, or a list of names."""
    value = raw.get(key) or []
    if not isinstance(value, str) and (not isinstance(value, list) or any(not isinstance(name, str) for name in value)):
        raise _wrong_value(file, key, value, "a list of names or a pattern")
    return value


def _names_or_pattern(file: Path, raw: dict[str, Any], key: str, steps: Steps) -> NamePattern | list[str]:
    names = _names(file, raw, key)
    return NamePattern(file, key, names, steps) if isinstance(names, str) else names


def _by_pattern(
    file: Path, raw: dict[str, Any], key: str, check: Callable[[Path, str, Any], Any], steps: Steps
) -> list[tuple[NamePattern, Any]]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise _wrong_value(file, key, value, "an object of names and numbers")
    return [
        (NamePattern(file, key, name, steps), check(file, f"{key}'s {name}", number)) for name, number in value.items()
    ]


def _matches(wanted: NamePattern | list[str], name: str) -> bool:
    """True if a pattern matches the full name, or if one of several names is equal to it or to its end."""
    if isinstance(wanted, NamePattern):
        return wanted.matches(name)
    return any(name == other or name.endswith(f".{other}") for other in wanted)
