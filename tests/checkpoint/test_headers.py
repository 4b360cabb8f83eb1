"""Reading a checkpoint folder and its headers; whatever is missing or broken is refused in one sentence."""

import json
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import refusal, small_config, small_model, write_checkpoint

import mlx_dgemma
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.headers import INDEX, read_header
from mlx_dgemma.errors import CheckpointError

message = partial(refusal, CheckpointError)


@pytest.fixture
def tensors():
    return dict(tree_flatten(small_model().parameters()))


def test_sizes_and_shapes_of_a_checkpoint(tmp_path, tensors):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "a", tensors))
    count = sum(a.size for a in tensors.values())
    assert checkpoint.parameters == count
    assert checkpoint.nbytes == 4 * count
    assert checkpoint.bits_per_weight == 32
    assert checkpoint.shapes == {name: a.shape for name, a in tensors.items()}
    assert checkpoint.quantization is None


def test_a_checkpoint_without_a_tokenizer(tmp_path, tensors):
    path = write_checkpoint(tmp_path / "a", tensors)
    assert message(mlx_dgemma.load, path) == f"{path} has no tokenizer.json; download the whole checkpoint."


def test_a_tokenizer_that_cannot_be_read(tmp_path, tensors):
    path = write_checkpoint(tmp_path / "a", tensors)
    (path / "tokenizer.json").write_text("{")
    text = message(mlx_dgemma.load, path)
    assert text.startswith(f"The tokenizer in {path} cannot be read (")
    assert text.endswith("); download it again.")


def test_a_broken_generation_config(tmp_path, tensors):
    path = write_checkpoint(tmp_path / "a", tensors)
    (path / "generation_config.json").write_text("{")
    assert message(Checkpoint.open, path).startswith(f"{path / 'generation_config.json'} cannot be read as JSON (")


def test_a_path_that_is_no_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert message(Checkpoint.open, file) == f"{file} is not a folder; point at the folder that holds config.json."


def test_a_missing_config(tmp_path):
    path = tmp_path / "config.json"
    assert message(Checkpoint.open, tmp_path) == f"{path} is missing; point at a folder that holds a whole checkpoint."


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_config()))
    assert message(Checkpoint.open, tmp_path) == (
        f"{tmp_path} holds no .safetensors file; point at a folder that holds a whole checkpoint."
    )


def test_an_index_without_a_weight_map(tmp_path, tensors):
    path = write_checkpoint(tmp_path / "a", tensors, shards=2)
    (path / INDEX).write_text("{}")
    assert message(Checkpoint.open, path) == f"{path / INDEX} has no weight_map; download it again."


def test_a_missing_shard(tmp_path, tensors):
    path = write_checkpoint(tmp_path / "a", tensors, shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert message(Checkpoint.open, path) == f"The shard {shard} is missing; download it again."


def test_an_index_that_names_a_missing_tensor(tmp_path, tensors):
    path = write_checkpoint(tmp_path / "a", tensors, shards=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    assert message(Checkpoint.open, path) == (
        f"{INDEX} names the tensor model.extra, but model-00001-of-00002.safetensors does not hold it; "
        "download both again."
    )


def test_an_index_that_names_the_wrong_shard(tmp_path, tensors):
    path = write_checkpoint(tmp_path / "a", tensors, shards=2)
    index = json.loads((path / INDEX).read_text())
    name = next(n for n, shard in index["weight_map"].items() if shard.startswith("model-00001"))
    index["weight_map"][name] = "model-00002-of-00002.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    assert message(Checkpoint.open, path) == (
        f"{INDEX} names the tensor {name}, but model-00002-of-00002.safetensors does not hold it; download both again."
    )


def test_a_tensor_that_the_index_does_not_name(tmp_path, tensors):
    path = write_checkpoint(tmp_path / "a", tensors, shards=2)
    index = json.loads((path / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    del index["weight_map"][name]
    (path / INDEX).write_text(json.dumps(index))
    assert message(Checkpoint.open, path) == (
        f"{path / shard} holds {name}, which {INDEX} does not name; download both again."
    )


@pytest.mark.parametrize("size", [0, 3, 20])
def test_a_shard_cut_within_its_header(tmp_path, tensors, size):
    file = write_checkpoint(tmp_path / "a", tensors) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert message(read_header, file) == f"{file} is truncated: its header is cut off; download it again."


def test_a_shard_cut_within_its_tensors(tmp_path, tensors):
    file = write_checkpoint(tmp_path / "a", tensors) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert message(read_header, file) == (
        f"{file} is truncated: it has {len(whole) - 1} of {len(whole)} bytes; download it again."
    )


@pytest.mark.parametrize("header", [b"not json", b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b"[1]"])
def test_a_file_that_is_no_safetensors(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert message(read_header, file) == f"{file} is not a safetensors file; download it again."


def test_a_header_tells_where_each_tensor_lies(tmp_path):
    file, array = tmp_path / "a.safetensors", np.arange(6, dtype=np.float32).reshape(2, 3)
    mx.save_safetensors(str(file), {"x": mx.array(array), "y": mx.zeros((1,), mx.uint8)})
    info = read_header(file)
    assert (info["x"].dtype, info["x"].shape, info["x"].nbytes) == ("F32", (2, 3), 24)
    assert file.read_bytes()[info["x"].start : info["x"].end] == array.tobytes()
    assert (info["y"].dtype, info["y"].nbytes) == ("U8", 1)
