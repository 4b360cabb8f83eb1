"""Finding, reading and building checkpoints; every way to be broken is one sentence."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import gap, random_tokens, small_config, small_model

import mlx_dgemma
from mlx_dgemma.checkpoint import build as build_module
from mlx_dgemma.checkpoint import memory, weights
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.find import DEMO, find
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.headers import INDEX, read_header
from mlx_dgemma.errors import CheckpointError, OptionError
from mlx_dgemma.model import device
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma


def message(function, *arguments):
    with pytest.raises(CheckpointError) as caught:
        function(*arguments)
    return str(caught.value)


def write(path, tensors, config=None, shards=1):
    """A checkpoint folder of these tensors in so many shards."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or small_config()))
    if shards == 1:
        mx.save_safetensors(str(path / "model.safetensors"), tensors)
        return path
    names, index = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mx.save_safetensors(str(path / file), {name: tensors[name] for name in names[i::shards]})
        index.update(dict.fromkeys(names[i::shards], file))
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


@pytest.fixture
def tensors():
    return dict(tree_flatten(small_model().parameters()))


def opened(path):
    return build(Checkpoint.open(path), "float32")


def same(model, tensors):
    got = dict(tree_flatten(model.parameters()))
    assert got.keys() == tensors.keys()
    return all((got[name] == tensors[name]).all().item() for name in got)


# Layouts.


@pytest.mark.parametrize("shards", [1, 3])
def test_our_layout_loads(tmp_path, tensors, shards):
    assert same(opened(write(tmp_path / "a", tensors, shards=shards)), tensors)


def test_the_releases_layout_loads(tmp_path, tensors):
    """Experts are bare tensors; tied copies, RoPE tables and the encoder's twins are ignored."""
    release = {name.replace("experts.gate_up_proj.weight", "experts.gate_up_proj"): a for name, a in tensors.items()}
    release = {name.replace("experts.down_proj.weight", "experts.down_proj"): a for name, a in release.items()}
    assert release.keys() != tensors.keys()
    for name in (
        "lm_head.weight",
        "model.decoder.rotary_emb.inv_freq",
        "model.encoder.language_model.norm.weight",
        "model.encoder.language_model.layers.0.self_attn.q_proj.weight",
    ):
        release[name] = mx.zeros((3,))
    assert same(opened(write(tmp_path / "a", release, shards=2)), tensors)


def test_gate_and_up_may_lie_apart(tmp_path, tensors):
    apart = dict(tensors)
    for i in range(3):
        fused = apart.pop(f"model.decoder.layers.{i}.experts.gate_up_proj.weight")
        gate, up = mx.split(fused, 2, axis=1)
        apart[f"model.decoder.layers.{i}.experts.up_proj.weight"] = up
        apart[f"model.decoder.layers.{i}.experts.gate_proj.weight"] = gate
    assert same(opened(write(tmp_path / "a", apart)), tensors)


def test_the_release_and_the_demo_hold_the_same_weights(hf_checkpoint, demo):
    release, ours = (dict(tree_flatten(opened(path).parameters())) for path in (hf_checkpoint, demo))
    assert release.keys() == ours.keys()
    assert all((release[name] == ours[name]).all().item() for name in ours)
    assert Checkpoint.open(demo).config == Checkpoint.open(hf_checkpoint).config
    assert Checkpoint.open(demo).generation == Checkpoint.open(hf_checkpoint).generation


def test_what_a_checkpoint_says_of_itself(tmp_path, tensors):
    held = Checkpoint.open(write(tmp_path / "a", tensors))
    count = sum(a.size for a in tensors.values())
    assert held.parameters == count
    assert held.nbytes == 4 * count
    assert held.bits_per_weight == 32
    assert held.shapes == {name: a.shape for name, a in tensors.items()}
    assert held.quantization is None


@pytest.mark.parametrize(("dtype", "expected"), [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_dtype_is_kept_or_changed(tmp_path, tensors, dtype, expected):
    stored = {name: a.astype(mx.bfloat16) for name, a in tensors.items()}
    model = build(Checkpoint.open(write(tmp_path / "a", stored)), dtype)
    assert model.dtype == getattr(mx, expected)
    experts = model.model.decoder.layers[0].experts.gate_up_proj.weight
    assert experts.dtype == (mx.float32 if build_module.on_cpu() else model.dtype)
    hidden = model.encode(mx.array([[1, 2, 3]]), model.new_prefix())
    assert hidden.dtype == model.dtype


def test_an_unknown_dtype(tmp_path, tensors):
    with pytest.raises(OptionError) as caught:
        build(Checkpoint.open(write(tmp_path / "a", tensors)), "int8")
    assert str(caught.value) == "dtype is 'int8'; it should be one of float32, bfloat16, float16."


def test_clipping_bounds_count_only_where_the_tower_clips(demo):
    name = "model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.input_min"
    plain = Checkpoint.open(demo).config
    clipped = replace(plain, vision=replace(plain.vision, use_clipped_linears=True))
    assert weights.match(name, plain) is None
    assert weights.match(name, clipped) == (name, None)
    assert name in dict(tree_flatten(DiffusionGemma(clipped).parameters()))


# Quantized weights.

WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}


def pack(tensors, name, bits, mode="affine", group=32):
    packed = mx.quantize(tensors.pop(name), group, bits, mode=mode)
    tensors.update(dict(zip((name, name.replace(".weight", ".scales"), name.replace(".weight", ".biases")), packed)))


@pytest.fixture
def quantized(tmp_path):
    """Experts at 4 bit, one dense matrix and the embedding at 8 by an override, and the plain twin of it all."""
    tensors = dict(tree_flatten(small_model(**WIDE).parameters()))
    dense = "model.decoder.layers.0.mlp.up_proj"
    wide, narrow = [f"{dense}.weight", "model.decoder.embed_tokens.weight"], [n for n in tensors if ".experts." in n]
    for name in wide + narrow:
        pack(tensors, name, 8 if name in wide else 4)
    config = small_config(**WIDE)
    override = {"group_size": 32, "bits": 8, "mode": "affine"}
    config["quantization"] = {"group_size": 32, "bits": 4, "mode": "affine", dense: override}
    config["quantization"]["model.decoder.embed_tokens"] = override
    return write(tmp_path / "q", tensors, config)


def test_quantized_weights_compute_as_their_dequantized_twin(quantized):
    held = Checkpoint.open(quantized)
    assert 4 < held.bits_per_weight < 32
    packed, plain = build(held), build(held, "float32", dequantize=True)
    layer = packed.model.decoder.layers[0]
    assert (layer.mlp.up_proj.bits, layer.experts.down_proj.bits, packed.model.decoder.embed_tokens.bits) == (8, 4, 8)
    assert not hasattr(layer.mlp.down_proj, "bits")
    names = {name for name, _ in tree_flatten(plain.parameters())}
    assert names == set(held.shapes)
    tokens, canvas = random_tokens(0, 1, 7), random_tokens(1, 1, 4)
    out = []
    for model in (packed, plain):
        prefix = model.new_prefix()
        model.encode(tokens, prefix)
        logits = model.logits(model.denoise(canvas, prefix))
        again = model.denoise(canvas, prefix, model.condition(logits / 0.8))
        out.append(mx.concatenate([logits, model.logits(again)]))
    assert gap(*out) < 1e-2


def test_a_quantized_checkpoint_is_dequantized_on_the_cpu_unless_told_otherwise(quantized, demo, monkeypatch):
    if not build_module.on_cpu():
        pytest.skip("says what the CPU backend does")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, quantized)
    engine = mlx_dgemma.load(quantized)
    bits = f"{engine.checkpoint.bits_per_weight:.1f}"
    assert not hasattr(engine.model.model.decoder.embed_tokens, "bits")
    assert engine.notes == (f"CPU device: weights of {bits} bits are dequantized to float32, the fastest there.",)
    packed = mlx_dgemma.load(quantized, dequantize=False)
    assert packed.model.model.decoder.embed_tokens.bits == 8
    assert packed.notes == (f"CPU device: weights of {bits} bits are kept packed, which is slow there.",)
    fits = memory.need(engine.checkpoint, 64, None, False).total
    monkeypatch.setattr(device, "available", lambda: fits)  # too little for the dequantized weights
    assert mlx_dgemma.load(quantized, ignore_memory=True).model.model.decoder.embed_tokens.bits == 8


def test_scales_without_a_quantization_entry(tmp_path):
    tensors = dict(tree_flatten(small_model(**WIDE).parameters()))
    pack(tensors, "model.decoder.embed_tokens.weight", 8)
    path = write(tmp_path / "a", tensors, small_config(**WIDE))
    assert message(opened, path) == (
        "The checkpoint holds model.decoder.embed_tokens.scales, but config.json has no quantization entry."
    )


def test_a_quantization_that_mlx_cannot_compute(quantized):
    config = json.loads((quantized / "config.json").read_text())
    config["quantization"]["model.decoder.embed_tokens"]["mode"] = "ternary"
    (quantized / "config.json").write_text(json.dumps(config))
    text = message(opened, quantized)
    assert text.startswith("config.json has a quantization that MLX cannot compute (")
    assert text.endswith(").")


# Broken checkpoints.


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


def test_several_shards_without_an_index(tmp_path, tensors):
    path = write(tmp_path / "a", tensors, shards=2)
    (path / INDEX).unlink()
    assert message(Checkpoint.open, path) == f"{path} holds 2 shards but no {INDEX}; download the index."


def test_an_index_without_a_weight_map(tmp_path, tensors):
    path = write(tmp_path / "a", tensors, shards=2)
    (path / INDEX).write_text("{}")
    assert message(Checkpoint.open, path) == f"{path / INDEX} has no weight_map; download it again."


def test_a_missing_shard(tmp_path, tensors):
    path = write(tmp_path / "a", tensors, shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert message(Checkpoint.open, path) == f"The shard {shard} is missing; download it again."


def test_a_shard_that_is_not_in_the_index(tmp_path, tensors):
    path = write(tmp_path / "a", tensors, shards=2)
    stray = path / "model-00003-of-00003.safetensors"
    mx.save_safetensors(str(stray), {"x": mx.zeros((1,))})
    assert message(Checkpoint.open, path) == (
        f"The shard {stray} is not in {INDEX}; remove it or download the index again."
    )


def test_an_index_that_names_a_missing_tensor(tmp_path, tensors):
    path = write(tmp_path / "a", tensors, shards=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    assert message(Checkpoint.open, path) == (
        f"{INDEX} names the tensor model.extra, but model-00001-of-00002.safetensors does not hold it; "
        "download both again."
    )


def test_an_index_that_names_the_wrong_shard(tmp_path, tensors):
    path = write(tmp_path / "a", tensors, shards=2)
    index = json.loads((path / INDEX).read_text())
    name = next(n for n, shard in index["weight_map"].items() if shard.startswith("model-00001"))
    index["weight_map"][name] = "model-00002-of-00002.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    assert message(Checkpoint.open, path) == (
        f"{INDEX} names the tensor {name}, but model-00002-of-00002.safetensors does not hold it; download both again."
    )


def test_a_tensor_that_the_index_does_not_name(tmp_path, tensors):
    path = write(tmp_path / "a", tensors, shards=2)
    index = json.loads((path / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    del index["weight_map"][name]
    (path / INDEX).write_text(json.dumps(index))
    assert message(Checkpoint.open, path) == (
        f"{path / shard} holds {name}, which {INDEX} does not name; download both again."
    )


@pytest.mark.parametrize("size", [0, 3, 20])
def test_a_shard_cut_within_its_header(tmp_path, tensors, size):
    file = write(tmp_path / "a", tensors) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert message(read_header, file) == f"{file} is truncated: its header is cut off; download it again."


def test_a_shard_cut_within_its_tensors(tmp_path, tensors):
    file = write(tmp_path / "a", tensors) / "model.safetensors"
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


def test_a_missing_tensor_is_named(tmp_path, tensors):
    del tensors["model.decoder.norm.weight"]
    path = write(tmp_path / "a", tensors)
    assert message(opened, path) == "The checkpoint lacks model.decoder.norm.weight; download it again."
    del tensors["model.decoder.layers.0.layer_scalar"]
    path = write(tmp_path / "b", tensors)
    assert (
        message(opened, path)
        == "The checkpoint lacks model.decoder.layers.0.layer_scalar and 1 more; download it again."
    )


def test_an_encoder_scalar_is_not_filled_with_the_decoders(tmp_path, tensors):
    del tensors["model.encoder.language_model.layers.1.layer_scalar"]
    assert message(opened, write(tmp_path / "a", tensors)) == (
        "The checkpoint lacks model.encoder.language_model.layers.1.layer_scalar; download it again."
    )


def test_an_unknown_tensor_is_named(tmp_path, tensors):
    tensors["model.visual.weight"] = mx.zeros((1,))
    assert message(opened, write(tmp_path / "a", tensors)) == (
        "The checkpoint holds the unknown tensor model.visual.weight; this is not a DiffusionGemma release."
    )


def test_a_tensor_without_a_place_is_named(tmp_path, tensors):
    tensors["model.decoder.layers.3.layer_scalar"] = mx.zeros((1,))
    assert message(opened, write(tmp_path / "a", tensors)) == (
        "The checkpoint holds model.decoder.layers.3.layer_scalar, which config.json has no place for."
    )


def test_a_parameter_filled_twice(tmp_path, tensors):
    name = "model.decoder.layers.0.experts.down_proj"
    tensors[name] = tensors[f"{name}.weight"]
    text = message(opened, write(tmp_path / "a", tensors))
    assert text.startswith(f"The checkpoint fills {name}.weight with ")
    assert text.endswith(": not one way.")


def test_half_of_gate_and_up(tmp_path, tensors):
    fused = tensors.pop("model.decoder.layers.0.experts.gate_up_proj.weight")
    tensors["model.decoder.layers.0.experts.gate_proj.weight"] = mx.split(fused, 2, axis=1)[0]
    assert message(opened, write(tmp_path / "a", tensors)) == (
        "The checkpoint fills model.decoder.layers.0.experts.gate_up_proj.weight with "
        "model.decoder.layers.0.experts.gate_proj.weight: not one way."
    )


def test_a_tensor_of_a_wrong_shape(tmp_path, tensors):
    tensors["model.decoder.norm.weight"] = mx.zeros((17,))
    assert message(opened, write(tmp_path / "a", tensors)) == (
        "model.decoder.norm.weight has the shape [17], but config.json asks for [16]."
    )


@pytest.mark.parametrize("name", ["model.decoder.norm.weight", "model.decoder.layers.0.layer_scalar"])
def test_a_tensor_of_a_wrong_dtype(tmp_path, tensors, name):
    tensors[name] = tensors[name].astype(mx.int32)
    assert message(opened, write(tmp_path / "a", tensors)) == (
        f"{name} has the dtype I32; it should be one of F32, BF16, F16."
    )


def test_packed_weights_in_a_plain_checkpoint(tmp_path, tensors):
    tensors["model.decoder.norm.weight"] = tensors["model.decoder.norm.weight"].astype(mx.uint32)
    assert message(opened, write(tmp_path / "a", tensors)) == (
        "model.decoder.norm.weight has the dtype U32; it should be one of F32, BF16, F16."
    )


def test_a_checkpoint_without_a_tokenizer(tmp_path, tensors):
    path = write(tmp_path / "a", tensors)
    assert message(mlx_dgemma.load, path) == f"{path} has no tokenizer.json; download the whole checkpoint."


def test_a_tokenizer_that_cannot_be_read(tmp_path, tensors):
    path = write(tmp_path / "a", tensors)
    (path / "tokenizer.json").write_text("{")
    text = message(mlx_dgemma.load, path)
    assert text.startswith(f"The tokenizer in {path} cannot be read (")
    assert text.endswith("); download it again.")


def test_a_broken_generation_config(tmp_path, tensors):
    path = write(tmp_path / "a", tensors)
    (path / "generation_config.json").write_text("{")
    assert message(Checkpoint.open, path).startswith(f"{path / 'generation_config.json'} cannot be read as JSON (")


# Finding one.


def test_a_folder_is_found(tmp_path, monkeypatch):
    assert find(tmp_path) == tmp_path
    assert find(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert find(f"~/{tmp_path.name}") == tmp_path


def test_without_a_name_the_environment_and_then_the_demo_is_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("MLX_DGEMMA_MODEL", raising=False)
    assert find() == DEMO
    monkeypatch.setenv("MLX_DGEMMA_MODEL", str(tmp_path))
    assert find() == tmp_path
    assert find(DEMO) == DEMO


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/nowhere-at-all", "nowhere", "a/b/c"])
def test_a_path_that_does_not_exist(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    assert message(find, name) == (
        f"{name} does not exist; give a folder or a Hub id such as google/diffusiongemma-26B-A4B-it."
    )


class Hub:
    """Stands in for huggingface_hub: what it holds here, and what a request gives."""

    def __init__(self, monkeypatch, local=None, remote=None):
        self.local, self.remote, self.asked = local, remote, []
        monkeypatch.setattr("huggingface_hub.snapshot_download", self)

    def __call__(self, repo, allow_patterns, local_files_only=False):
        self.asked.append((repo, local_files_only))
        assert {"*.json", "*.safetensors", "*.jinja"} <= set(allow_patterns)
        answer = self.local if local_files_only else self.remote
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


def absent():
    from huggingface_hub.errors import LocalEntryNotFoundError

    return LocalEntryNotFoundError("not here")


def refused(kind):
    """An error of the Hub's, whatever its constructor asks for."""
    return kind.__new__(kind)


def test_a_hub_id_is_looked_for_on_this_machine_first(tmp_path, tensors, monkeypatch):
    path = write(tmp_path / "a", tensors)
    hub = Hub(monkeypatch, local=path)
    assert find("some/model") == path
    assert hub.asked == [("some/model", True)]


@pytest.mark.parametrize("state", ["absent", "no config", "no weights", "a shard is missing"])
def test_what_is_absent_or_incomplete_is_downloaded(tmp_path, tensors, monkeypatch, state):
    path = write(tmp_path / "a", tensors, shards=2)
    if state == "no config":
        (path / "config.json").unlink()
    elif state == "no weights":
        for file in path.glob("*.safetensors"):
            file.unlink()
    elif state == "a shard is missing":
        (path / "model-00002-of-00002.safetensors").unlink()
    hub = Hub(monkeypatch, local=absent() if state == "absent" else path, remote=tmp_path)
    assert find("some/model") == tmp_path
    assert hub.asked == [("some/model", True), ("some/model", False)]


def test_a_hub_id_that_does_not_exist(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    Hub(monkeypatch, local=absent(), remote=refused(RepositoryNotFoundError))
    assert message(find, "no/body") == (
        "no/body is neither a folder here nor a repository on the Hub; check the name, or log in if it is private."
    )


def test_a_gated_repository(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    Hub(monkeypatch, local=absent(), remote=refused(GatedRepoError))
    assert message(find, "some/model") == ("some/model is gated; accept its terms on the Hub and run `hf auth login`.")


def test_no_network(monkeypatch):
    Hub(monkeypatch, local=absent(), remote=absent())
    assert message(find, "some/model") == (
        "some/model is not on this machine and the Hub cannot be reached (LocalEntryNotFoundError); "
        "connect and try again, or give a folder."
    )
    Hub(monkeypatch, local=absent(), remote=ConnectionError("down"))
    assert "(ConnectionError)" in message(find, "some/model")


def test_a_name_that_is_no_hub_id():
    assert message(find, "what is/this?") == "'what is/this?' is neither a folder here nor a valid Hub id."
