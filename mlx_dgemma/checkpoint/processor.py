"""What a checkpoint's processor does to pictures and videos: settings are taken, or are refused by name.

Transformers looks in three files, and the first that has the settings of pictures or videos gives all of them:
processor_config.json in a section for each, then a file for each. Videos fall back to the file of pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..model.config import ProcessorConfig, VisionConfig, read_json
from ..model.config_keys import changes_nothing, unused
from ..model.patches import BUDGETS

NESTED, IMAGES, VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
_BICUBIC = 3  # Pillow's number of it
# Settings with the only value that is computed here.
_FIXED: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "resample": _BICUBIC,
    "do_sample_frames": True,
}
# Settings that the processors of Gemma 4 do not use.
_INERT = frozenset(
    """auto_map crop_size data_format default_to_square device disable_grouping do_center_crop do_pad
    feature_extractor_type image_processor_type image_seq_length input_data_format model_input_names pad_size
    processor_class return_metadata return_tensors size size_divisor transformers_version video_metadata
    video_processor_type""".split()
)
_NORMALIZATION = ("do_normalize", "image_mean", "image_std")


def read_processor(folder: Path, vision: VisionConfig | None, notes: list[str] | None = None) -> ProcessorConfig:
    """The settings of pictures and videos in a checkpoint's folder; missing ones are Gemma 4's.

    Args:
        folder: of the checkpoint.
        vision: sizes of the tower, with which the settings must agree.
        notes: takes a sentence about keys that are not used.

    Raises:
        CheckpointError: a setting that is not computed here, or is unknown, or contradicts the vision tower.
    """
    image_at, image = _section(folder, "image_processor", IMAGES)
    video_at, video = _section(folder, "video_processor", VIDEOS, IMAGES)
    notes = [] if notes is None else notes
    notes += unused(image_at, _check(image_at, image, vision, ("max_soft_tokens",)))
    notes += unused(video_at, _check(video_at, video, vision, ("max_soft_tokens", "num_frames")))
    return ProcessorConfig(
        _number(image_at, image, "max_soft_tokens", ProcessorConfig.image_tokens, BUDGETS.__contains__),
        _number(video_at, video, "max_soft_tokens", ProcessorConfig.video_tokens, BUDGETS.__contains__),
        _number(video_at, video, "num_frames", ProcessorConfig.video_frames, lambda count: count >= 1),
    )


def _section(folder: Path, name: str, *files: str) -> tuple[str, dict[str, Any]]:
    """(place for error messages, settings that are not null) from the first file that has them."""
    nested = read_json(folder / NESTED) if (folder / NESTED).exists() else {}
    where, found = f"{NESTED} ({name})", nested.get(name)
    for file in files:
        if found is None and (folder / file).exists():
            where, found = file, read_json(folder / file)
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is not a JSON object but {type(found).__name__}; download it again.")
    return where, {key: value for key, value in found.items() if value is not None}


def _check(where: str, settings: dict[str, Any], vision: VisionConfig | None, taken: tuple[str, ...]) -> list[str]:
    """Refuse settings that would change the pixels, the patches or the choice of frames; the unknown others."""
    idle = []
    computed = dict(_FIXED)
    if vision is not None:
        computed |= {"patch_size": vision.patch_size, "pooling_kernel_size": vision.pooling_kernel_size}
    for key, value in settings.items():
        if key in computed:
            if type(value) is bool or type(computed[key]) is bool:
                same = value is computed[key]
            else:
                same = isinstance(value, (int, float)) and abs(value - computed[key]) < 1e-9
            if not same:
                raise CheckpointError(f"{where} has {key} = {value!r}, but only {computed[key]!r} is computed here.")
        elif key in (*taken, *_NORMALIZATION, *_INERT, "patch_size", "pooling_kernel_size"):
            continue
        elif changes_nothing(key, value):
            idle.append(key)
        else:
            raise CheckpointError(
                f"{where} has the unknown key {key!r} = {value!r}, which may change the pixels; "
                "remove it if you know that it does not."
            )
    if settings.get("do_normalize"):
        for key, plain in (("image_mean", 0), ("image_std", 1)):
            value = settings.get(key, plain)
            if any(one != plain for one in (value if isinstance(value, list) else [value])):
                raise CheckpointError(
                    f"{where} has do_normalize = {settings['do_normalize']!r} with {key} = {value!r}, "
                    f"but only {plain} changes nothing, and nothing else is computed here."
                )
    return idle


def _number(where: str, settings: dict[str, Any], key: str, default: int, fits: Callable[[int], bool]) -> int:
    value = settings.get(key, default)
    if type(value) is not int or not fits(value):
        allowed = f"one of {', '.join(map(str, BUDGETS))}" if key == "max_soft_tokens" else "a whole number, at least 1"
        raise CheckpointError(f"{where} has {key} = {value!r}; it should be {allowed}.")
    return value
