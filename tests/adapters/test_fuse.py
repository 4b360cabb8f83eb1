"""Adapters fused into checkpoints, and trained models written as checkpoints."""

import mlx.core as mx
import numpy as np
import pytest
from adapter_models import (
    ALL,
    BOUND,
    DENSE,
    KINDS,
    LAYERS,
    Q,
    changed,
    deltas,
    gaps,
    logits,
    modes_of,
    quantized_pair,
    save_denoising_dora,
    save_lora,
    stored,
    written,
)
from safetensors_files import INDEX, read_folder, write_safetensors
from support import gap, refusal

import mlx_dgemma
from mlx_dgemma.adapters import deltas as adapters
from mlx_dgemma.adapters import peft
from mlx_dgemma.adapters.deltas import Adapter, apply
from mlx_dgemma.adapters.fuse import fuse, write_checkpoint
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.jobs import make_jobs, source_quantization
from mlx_dgemma.errors import CheckpointError, OptionError

APART = "This adapter changes encoder and decoder differently, but they share their weights; use it with --adapter."


@pytest.fixture(autouse=True)
def no_model_named(monkeypatch):
    monkeypatch.delenv("MLX_DGEMMA_MODEL", raising=False)


@pytest.mark.parametrize(("mode", "kind"), [(m, k) for m in (None, "affine", "mxfp4") for k in KINDS])
def test_a_dequantized_fused_checkpoint_computes_the_same(mode, kind, tmp_path):
    model, twin = quantized_pair(mode)
    adapter = modes_of(twin, *KINDS[kind], "equal")
    report = fuse(written(adapter, tmp_path / "a"), tmp_path / "out", stored(model, tmp_path / "in"), dequantize=True)
    fused = Checkpoint.open(tmp_path / "out")
    before = logits(twin)
    apply(twin, adapter)
    assert max(gaps(logits(build(fused)), logits(twin))) < 1e-3
    assert min(gaps(logits(twin), before)) > 0.1
    assert sorted(report.modules) == sorted(adapter.changes)
    assert not {f"{path}.scales" for path in report.modules} & set(fused.tensors)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_fused_weights_keep_their_quantization(mode, tmp_path):
    model, twin = quantized_pair(mode)
    adapter = modes_of(twin, ALL, False, "equal")
    report = fuse(written(adapter, tmp_path / "a"), tmp_path / "out", stored(model, tmp_path / "in"))
    assert report.requantized == report.modules
    fused = build(Checkpoint.open(tmp_path / "out"))
    for path, module in model.named_modules():
        if "scales" not in module:
            continue
        expected = [module.weight, module.scales, module.get("biases")]
        if path in adapter.changes:
            weight = adapter.changes[path].apply_to(adapters.dequantized_weight(module))
            expected = [*mx.quantize(weight, 32, 4, mode), None][:3]
        found = adapters._module(fused, path)
        pairs = zip(expected, (found.weight, found.scales, found.get("biases")), strict=True)
        assert all(a is b or mx.array_equal(a, b).item() for a, b in pairs), path


@pytest.mark.parametrize("modes", ["different", "encode", "denoise"])
def test_different_modes_cannot_be_fused(modes, tmp_path):
    model, _ = quantized_pair(None)
    folder = written(modes_of(model, DENSE, False, modes), tmp_path / "a")
    source = stored(model, tmp_path / "in")
    assert refusal(CheckpointError, fuse, folder, tmp_path / "new" / "out", source) == APART
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "in"]


# With the demo.


@pytest.fixture(scope="module")
def float32(demo, tmp_path_factory):
    """The demo in float32."""
    folder = tmp_path_factory.mktemp("demo") / "float32"
    convert(demo, folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def adapter(demo, tmp_path_factory):
    return save_lora(demo, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def apart(demo, tmp_path_factory):
    return save_denoising_dora(demo, tmp_path_factory.mktemp("apart"))


def of(path, **options):
    return logits(mlx_dgemma.load(path, dtype="float32", **options).model)


def test_a_fused_checkpoint_computes_the_same(float32, adapter, tmp_path):
    report = fuse(adapter, tmp_path / "out", float32)
    together = of(float32, adapter=adapter)
    assert max(gaps(of(tmp_path / "out"), together)) < BOUND
    assert min(gaps(together, of(float32))) > 1
    before, after = read_folder(float32), read_folder(tmp_path / "out")
    differing = {name for name in before if before[name] != after[name]}
    assert list(before) == list(after)
    assert differing == {f"{path}.weight" for path in report.modules}
    assert all(before[name][:2] == after[name][:2] for name in before)
    assert report.requantized == ()
    assert report.nbytes == sum(len(data) for *_, data in after.values())
    for file in ("config.json", "tokenizer.json", "chat_template.jinja", INDEX):
        assert (tmp_path / "out" / file).read_bytes() == (float32 / file).read_bytes()
    assert make_jobs(Checkpoint.open(tmp_path / "out"), {}, None, None)


@pytest.mark.parametrize("layout", ["release", "halves"])
def test_all_layouts_are_fused_to_the_same_bytes(hf_checkpoint, demo, adapter, tmp_path, layout):
    """Tensors that are not changed keep their bytes and dtypes."""
    source = hf_checkpoint
    if layout == "halves":
        source = tmp_path / "halves"
        source.mkdir()
        for file in demo.iterdir():
            if file.suffix != ".safetensors" and file.name != INDEX:
                (source / file.name).write_bytes(file.read_bytes())
        tensors = {}
        for name, (dtype, shape, data) in read_folder(demo).items():
            if not name.endswith("gate_up_proj.weight"):
                tensors[name] = (dtype, shape, data)
                continue
            rows = np.frombuffer(data, np.uint16).reshape(shape)
            half = [shape[0], shape[1] // 2, shape[2]]
            for part, cut in zip(("gate", "up"), (rows[:, : half[1]], rows[:, half[1] :])):
                tensors[name.replace("gate_up", part)] = (dtype, half, cut.tobytes())
        write_safetensors(source / "model.safetensors", tensors)
    fuse(adapter, tmp_path / "ours", demo)
    report = fuse(adapter, tmp_path / "theirs", source)
    ours, plain = read_folder(tmp_path / "ours"), read_folder(demo)
    assert ours == read_folder(tmp_path / "theirs")
    assert {name for name in ours if ours[name] != plain[name]} == {f"{path}.weight" for path in report.modules}
    assert {dtype for dtype, *_ in ours.values()} == {"BF16"}


def test_a_quantized_checkpoint_is_fused_with_or_without_dequantizing(demo, adapter, tmp_path):
    convert(demo, tmp_path / "packed", "4bit")
    source = Checkpoint.open(tmp_path / "packed")
    report = fuse(adapter, tmp_path / "again", source.path)
    plain = fuse(adapter, tmp_path / "plain", source.path, dequantize=True)
    assert report.requantized == report.modules
    assert plain.requantized == ()
    before, after = read_folder(source.path), read_folder(tmp_path / "again")
    assert {name: one[:2] for name, one in before.items()} == {name: one[:2] for name, one in after.items()}
    again, kept = Checkpoint.open(tmp_path / "again"), Checkpoint.open(tmp_path / "plain")
    assert again.raw_config == source.raw_config
    packing = source_quantization(source)
    assert source_quantization(again) == packing
    assert source_quantization(kept) == {path: q for path, q in packing.items() if path not in report.modules}
    assert [path for path in kept.quantization if path in report.modules] == []
    assert {one.dtype for name, one in kept.tensors.items() if name.endswith("_proj.weight")} == {"BF16"}
    together, base = of(source.path, adapter=adapter), of(source.path)
    rounded, unpacked = (gaps(together, of(tmp_path / name)) for name in ("again", "plain"))
    effect = gaps(together, base)
    assert max(unpacked) < min(rounded)
    assert max(unpacked) < 0.5 * min(effect)


def test_a_dora_is_fused_into_mxfp4_weights(demo, tmp_path):
    model = build(Checkpoint.open(demo), "float32")
    changes = deltas(model, DENSE, True, 6, 0.02)
    peft.write(Adapter({p: d for p, d in changes.items() if p.startswith(LAYERS)}, changes), tmp_path / "dora", "demo")
    convert(demo, tmp_path / "packed", "mxfp4")
    fuse(tmp_path / "dora", tmp_path / "plain", tmp_path / "packed", dequantize=True)
    expected = changed(build(Checkpoint.open(tmp_path / "packed"), "float32", True), changes)
    found = build(Checkpoint.open(tmp_path / "plain"), "float32", True)
    for path in changes:
        weight = adapters._module(expected, path).weight
        assert gap(adapters._module(found, path).weight, weight) < 2**-8 * mx.abs(weight).max().item()


def test_nothing_remains_if_fusing_is_refused(demo, adapter, apart, tmp_path):
    assert refusal(CheckpointError, fuse, apart, tmp_path / "new" / "out", demo) == APART
    (tmp_path / "out").mkdir()
    assert refusal(OptionError, fuse, adapter, tmp_path / "out", demo) == (
        f"{tmp_path / 'out'} exists; delete it or choose another OUT."
    )
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("recipe", [None, "4bit"])
def test_a_model_is_written_with_its_checkpoints_dtypes(demo, tmp_path, recipe):
    """The model computes in float32. An existing folder is replaced."""
    source = demo
    if recipe:
        source = tmp_path / "packed"
        convert(demo, source, recipe)
    checkpoint = Checkpoint.open(source)
    model = build(checkpoint, "float32", bool(recipe))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"")
    write_checkpoint(model, checkpoint, tmp_path / "out")
    found = read_folder(tmp_path / "out")
    if recipe is None:
        assert found == read_folder(demo)
        assert (tmp_path / "out" / "config.json").read_bytes() == (demo / "config.json").read_bytes()
    else:
        assert {name: one[:2] for name, one in found.items()} == {n: one[:2] for n, one in read_folder(demo).items()}
        assert max(gaps(of(tmp_path / "out"), logits(model))) < 1
    model.model.decoder.layers[0].self_attn.q_proj.weight *= 0
    write_checkpoint(model, checkpoint, tmp_path / "out")
    again = read_folder(tmp_path / "out")
    assert [name for name in found if found[name] != again[name]] == [f"{Q}.weight"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out", "packed"][: 1 + bool(recipe)]
