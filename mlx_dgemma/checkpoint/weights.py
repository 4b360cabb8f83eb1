"""The weight map: which tensor of a checkpoint fills which parameter. Loading and converting use it.

Three layouts are read: Hugging Face's (experts as bare 3-D tensors), the one that mlx-vlm writes and mlx-community
holds (experts as modules, gate and up fused), and its older form (gate and up apart). Every source tensor must be used
or be a copy or a table that is computed, and every parameter must be filled; otherwise an error names the tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import CheckpointError
from ..model.config import ModelConfig

_EXPERTS = r"(model\.decoder\.layers\.\d+\.experts)"
_PARTS = r"(weight|scales|biases)"

# (source, target, half): the source fills half 0 or 1 of the target's rows, or all of them (None).
RULES: tuple[tuple[str, str, int | None], ...] = (
    (_EXPERTS + r"\.(gate_up_proj|down_proj)", r"\1.\2.weight", None),
    (_EXPERTS + r"\.gate_proj\." + _PARTS, r"\1.gate_up_proj.\2", 0),
    (_EXPERTS + r"\.up_proj\." + _PARTS, r"\1.gate_up_proj.\2", 1),
    (r"(model\.encoder\.language_model\.layers\.\d+\.layer_scalar)", r"\1", None),
    (r"(model\.(?:decoder|encoder\.vision_tower|encoder\.embed_vision)\..+)", r"\1", None),
    (r"(?:encoder\.)?((?:vision_tower|embed_vision)\..+)", r"model.encoder.\1", None),  # OptiQ's file of the tower
)
# Copies of tied weights and their originals; only the encoder's layer scalars are weights of their own.
COPIES: tuple[tuple[str, str], ...] = (
    (r"lm_head\." + _PARTS, r"model.decoder.embed_tokens.\1"),
    (r"model\.encoder\.language_model\.((?!layers\.\d+\.layer_scalar$).+)", r"model.decoder.\1"),
)
# Tables that are computed, and one that exporters of Gemma 3n leave.
_COMPUTED = r".*rotary_emb\..*|.*embed_vision\.embedding\..*"
_CLIP_BOUND = r".*\.(input|output)_(min|max)"  # also written by towers that do not clip


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint and the half of the target that it fills (None: all of it)."""

    name: str
    half: int | None = None


def original_of(name: str) -> str | None:
    """The tensor that a source tensor is a copy of, or None if it is no copy (`tied.check_tied` compares them)."""
    for pattern, original in () if re.fullmatch(_COMPUTED, name) else COPIES:
        if found := re.fullmatch(pattern, name):
            return found.expand(original)
    return None


def is_vision(name: str) -> bool:
    """Whether a tensor belongs to the vision tower or its projector."""
    return re.match(r"(?:model\.)?(?:encoder\.)?(?:vision_tower|embed_vision)\.", name) is not None


def is_copy(name: str) -> bool:
    """Whether a source tensor is a copy of another one or a table that is computed, so that it may be missing."""
    return bool(original_of(name) or re.fullmatch(_COMPUTED, name))


def match(name: str, config: ModelConfig) -> tuple[str, int | None] | None:
    """(target, half) of a source tensor, or None if it is ignored.

    Raises:
        CheckpointError: no rule matches the name.
    """
    vision = is_vision(name)
    clipped = config.vision is not None and config.vision.use_clipped_linears
    unclipped = vision and not clipped and re.fullmatch(_CLIP_BOUND, name)
    if unclipped or original_of(name) or re.fullmatch(_COMPUTED, name):
        return None
    for pattern, target, half in RULES:
        if found := re.fullmatch(pattern, name):
            return found.expand(target), half
    raise CheckpointError(f"The checkpoint holds the unknown tensor {name}; this is not a DiffusionGemma release.")


def plan(names: list[str], config: ModelConfig, targets: set[str]) -> dict[str, list[Source]]:
    """Assign source tensors to parameters.

    Args:
        names: the checkpoint's tensors.
        config: its configuration.
        targets: parameters to be filled.

    Returns:
        {target: its sources}; a target has two sources where gate and up are stored apart.

    Raises:
        CheckpointError: a source has no target, or a target has no source or several.
    """
    assigned: dict[str, list[Source]] = {}
    for name in names:
        if (found := match(name, config)) is None:
            continue
        target, half = found
        if target not in targets:
            raise CheckpointError(f"The checkpoint holds {name}, which config.json has no place for.")
        assigned.setdefault(target, []).append(Source(name, half))
    for target, sources in assigned.items():
        sources.sort(key=lambda source: source.half or 0)
        if [source.half for source in sources] not in ([None], [0, 1]):
            raise CheckpointError(
                f"The checkpoint fills {target} with {', '.join(s.name for s in sources)}: not one way."
            )
    if missing := sorted(targets - set(assigned)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"The checkpoint lacks {missing[0]}{more}; download it again.")
    return assigned
