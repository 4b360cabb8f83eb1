"""Conversion to MLX's layout: names, dtypes, shards and files."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import safetensors
from checkpoint_files import contents, floats, left_in, same
from safetensors_files import INDEX, read_folder, read_safetensors

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.convert import DEFAULT, Report, convert
from mlx_dgemma.convert import writer as writer_module


@pytest.fixture(scope="session")
def quantized(demo, tmp_path_factory) -> Path:
    """The demo, quantized with the default recipe."""
    folder = tmp_path_factory.mktemp("quantized") / "demo-4bit"
    convert(demo, folder, DEFAULT)
    return folder


# --- floats -------------------------------------------------------------------------------------------------------


def test_a_release_becomes_the_demo(hf_checkpoint, demo, tmp_path):
    report = convert(hf_checkpoint, tmp_path / "out")
    ours, bundled = contents(tmp_path / "out"), contents(demo)
    assert ours.pop("README.md") != bundled.pop("README.md")  # the demo's card says what it is
    assert ours == bundled
    assert isinstance(report, Report)
    assert (report.unchanged, report.recipe, report.dtype, report.quantized) == (False, None, "bfloat16", {})
    assert report.nbytes == sum(len(data) for *_, data in read_folder(demo).values())
    assert report.bits_per_weight == 16
    assert report.parameters == report.nbytes // 2


def test_only_names_change(hf_checkpoint, demo):
    source, ours = read_folder(hf_checkpoint), read_folder(demo)
    experts = {name for name in source if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))}
    assert len(experts) == 12
    assert {f"{name}.weight" if name in experts else name: one for name, one in source.items()} == ours


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtypes_are_cast_as_mlx_does(demo, tmp_path, dtype):
    report = convert(demo, tmp_path / "out", dtype=dtype)
    assert report.dtype == dtype
    before, after = read_folder(demo), read_folder(tmp_path / "out")
    assert all(same(floats(after[name]), floats(one).astype(getattr(mx, dtype))) for name, one in before.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == dtype


def test_shards_stay_below_the_limit_and_load(hf_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 3_000_000)
    convert(hf_checkpoint, tmp_path / "out", DEFAULT)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(shards)
    assert [file.name for file in shards] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert count > 1
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors_of = {file.name: read_safetensors(file) for file in shards}
    assert index["weight_map"] == {name: file for file in tensors_of for name in tensors_of[file]}
    sizes = {file: sum(len(data) for *_, data in tensors.values()) for file, tensors in tensors_of.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert max(sizes.values()) <= 3_000_000
    assert Checkpoint.open(tmp_path / "out").nbytes == sum(sizes.values())


def test_tensors_are_aligned_and_other_readers_agree(quantized):
    ours = read_safetensors(quantized / "model.safetensors")
    with safetensors.safe_open(quantized / "model.safetensors", "mlx") as file:
        assert file.metadata() == {"format": "mlx"}
        assert set(file.keys()) == set(ours)
    loaded = mx.load(str(quantized / "model.safetensors"))
    assert all(same(loaded[name], floats(one)) for name, one in ours.items())
    for info in Checkpoint.open(quantized).tensors.values():
        assert info.start % {"U32": 4, "BF16": 2}[info.dtype] == 0


def test_other_files_are_copied_but_not_other_weights(hf_checkpoint, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(hf_checkpoint, source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "LICENSE").write_text("Apache-2.0")
    (source / "weights.gguf").write_bytes(b"x")
    convert(source, tmp_path / "out")
    assert left_in(tmp_path / "out") == sorted(
        "LICENSE README.md additional_chat_templates chat_template.jinja config.json generation_config.json "
        "model.safetensors model.safetensors.index.json processor_config.json tokenizer.json "
        "tokenizer_config.json".split()
    )
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"


@pytest.mark.parametrize(
    ("share", "full_layers", "expected"),
    [
        (0.25, {"head_dim": 64, "num_key_value_heads": 1}, (64, 1)),
        (0.33, {"head_dim": 64, "num_key_value_heads": 1}, (64, 1)),
    ],
)
def test_configurations_that_transformers_saves_get_the_keys_that_mlx_vlm_reads(
    hf_checkpoint, tmp_path, share, full_layers, expected
):
    source = tmp_path / "source"
    shutil.copytree(hf_checkpoint, source)
    raw = json.loads((source / "config.json").read_text())
    text = raw["text_config"]
    for key in ("global_head_dim", "num_global_key_value_heads", "use_bidirectional_attention"):
        del text[key]
    text["per_layer_config"] = {"5": full_layers}
    text["rope_parameters"]["full_attention"]["partial_rotary_factor"] = share
    (source / "config.json").write_text(json.dumps(raw))
    convert(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert written["per_layer_config"] == text["per_layer_config"]
    assert (written["global_head_dim"], written["num_global_key_value_heads"]) == expected
    assert written["use_bidirectional_attention"] is None
    found = written["rope_parameters"]["full_attention"]["partial_rotary_factor"]
    pairs = int(share * 64 // 2)
    assert (int(found * 64), int(found * 64 // 2)) == (2 * pairs, pairs)  # as mlx-lm and Transformers count
    ours, source_config = Checkpoint.open(tmp_path / "out").config.text, Checkpoint.open(source).config.text
    assert ours.rope("full_attention") == source_config.rope("full_attention") == (1e6, pairs)
    assert ours.kv_shape("full_attention") == source_config.kv_shape("full_attention")
