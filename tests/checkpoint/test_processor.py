"""Settings of pictures and videos are those that Transformers would use, or are refused by name with their value."""

import json

import pytest
from support import refusal

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.processor import IMAGES, NESTED, VIDEOS, read_processor
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model.config import ProcessorConfig, VisionConfig

VISION = VisionConfig()


def write(folder, **files):
    names = {"nested": NESTED, "images": IMAGES, "videos": VIDEOS}
    for name, content in files.items():
        (folder / names[name]).write_text(json.dumps(content))
    return folder


def refused(folder, **files) -> str:
    return refusal(CheckpointError, read_processor, write(folder, **files), VISION)


def test_the_demos_and_the_defaults(demo, tmp_path):
    assert Checkpoint.open(demo).processor == ProcessorConfig(70, 70, 32)
    assert read_processor(tmp_path, None) == read_processor(tmp_path, VISION) == ProcessorConfig(280, 70, 32)


def test_each_setting_comes_from_the_file_that_transformers_takes_it_from(tmp_path):
    write(tmp_path, images={"max_soft_tokens": 140})
    assert read_processor(tmp_path, VISION) == ProcessorConfig(140, 140, 32)  # videos too
    write(tmp_path, videos={"num_frames": 5})
    assert read_processor(tmp_path, VISION) == ProcessorConfig(140, 70, 5)
    write(tmp_path, nested={"image_seq_length": 9, "image_processor": {}, "video_processor": None})
    assert read_processor(tmp_path, VISION) == ProcessorConfig(280, 70, 5)
    write(tmp_path, nested={"image_processor": {"max_soft_tokens": 560}, "video_processor": {"num_frames": 7}})
    assert read_processor(tmp_path, VISION) == ProcessorConfig(560, 70, 7)


@pytest.mark.parametrize(
    ("key", "value", "computed"),
    [
        ("do_resize", False, True),
        ("do_rescale", False, True),
        ("do_convert_rgb", False, True),
        ("rescale_factor", 1 / 127.5, 1 / 255),
        ("resample", 2, 3),
        ("resample", "bicubic", 3),
        ("patch_size", 14, 16),
        ("pooling_kernel_size", 2, 3),
    ],
)
def test_a_setting_with_another_value_than_the_computed_one(tmp_path, key, value, computed):
    said = f"has {key} = {value!r}, but only {computed!r} is computed here."
    assert refused(tmp_path, nested={"image_processor": {key: value}}) == f"{NESTED} (image_processor) {said}"
    assert refused(tmp_path, nested={"video_processor": {key: value}}) == f"{NESTED} (video_processor) {said}"
    assert refused(tmp_path, nested={}, images={key: value}) == f"{IMAGES} {said}"
    assert refused(tmp_path, images={}, videos={key: value}) == f"{VIDEOS} {said}"
    read_processor(write(tmp_path, videos={key: computed}), VISION)


def test_patches_are_those_of_the_vision_tower(tmp_path):
    write(tmp_path, images={"patch_size": 14, "pooling_kernel_size": 2})
    read_processor(tmp_path, VisionConfig(patch_size=14, pooling_kernel_size=2))


@pytest.mark.parametrize(("key", "value", "plain"), [("image_mean", [0.5, 0.5, 0.5], 0), ("image_std", 0.5, 1)])
def test_a_normalization_that_changes_pixels_is_refused(tmp_path, key, value, plain):
    assert refused(tmp_path, images={"do_normalize": True, key: value}) == (
        f"{IMAGES} has do_normalize = True with {key} = {value!r}, "
        f"but only {plain} changes nothing, and nothing else is computed here."
    )
    read_processor(write(tmp_path, images={"do_normalize": False, key: value}), VISION)
    same = {"do_normalize": True, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    read_processor(write(tmp_path, images=same), VISION)


@pytest.mark.parametrize(("key", "value"), [("do_sample_frames", False), ("fps", 2), ("max_pixels", 10**6)])
def test_other_choices_of_frames_and_unknown_settings(tmp_path, key, value):
    assert f"{key}" in (said := refused(tmp_path, videos={key: value})) and f"{value!r}" in said
    read_processor(write(tmp_path, videos={key: None}), VISION)


@pytest.mark.parametrize("value", [100, "280", True, 280.0])
def test_a_budget_that_pictures_cannot_have(tmp_path, value):
    assert refused(tmp_path, images={"max_soft_tokens": value}) == (
        f"{IMAGES} has max_soft_tokens = {value!r}; it should be one of 70, 140, 280, 560, 1120."
    )


def test_values_of_wrong_types(tmp_path):
    assert refused(tmp_path, videos={"num_frames": 0}) == (
        f"{VIDEOS} has num_frames = 0; it should be a whole number, at least 1."
    )
    assert refused(tmp_path, nested={"image_processor": [1]}) == (
        f"{NESTED} (image_processor) is not a JSON object but list; download it again."
    )
