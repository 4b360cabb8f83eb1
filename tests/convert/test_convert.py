"""Conversion: layouts, bytes, quantization, idempotence, atomicity, memory."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from conftest import INDEX, read_folder, read_safetensors, write_safetensors
from mlx.utils import tree_flatten
from support import small_config

from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.headers import read_header
from mlx_dgemma.convert import DEFAULT, RECIPES, Quantization, Recipe, Report, convert
from mlx_dgemma.convert import conversion as module
from mlx_dgemma.convert import jobs as jobs_module
from mlx_dgemma.convert import writer as writer_module
from mlx_dgemma.convert.writer import Entry, Writer
from mlx_dgemma.errors import CheckpointError, DgemmaError, OptionError
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

ROOT = Path(__file__).parent.parent.parent
COMBINATIONS = [(bits, size, "affine") for bits, size in itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128))]
COMBINATIONS += [(4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def changed(source: Path, folder: Path, **tensors) -> Path:
    """A copy of a one-shard checkpoint in `folder`, without index, with other tensors; None removes one."""
    shutil.copytree(source, folder)
    (folder / INDEX).unlink()
    held = read_safetensors(folder / "model.safetensors")
    held.update(tensors)
    write_safetensors(folder / "model.safetensors", {name: one for name, one in held.items() if one is not None}, "mlx")
    return folder


def floats(one: tuple[str, list[int], bytes]) -> mx.array:
    dtype, shape, data = one
    kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}[dtype]
    array = mx.array(np.frombuffer(data, kind)).reshape(shape)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def same(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and mx.array_equal(a, b).item()


@pytest.fixture(scope="session")
def quantized(demo, tmp_path_factory) -> Path:
    """The demo by the default recipe."""
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
def test_a_cast_is_mlx_own(demo, tmp_path, dtype):
    report = convert(demo, tmp_path / "out", dtype=dtype)
    assert report.dtype == dtype
    before, after = read_folder(demo), read_folder(tmp_path / "out")
    assert all(same(floats(after[name]), floats(one).astype(getattr(mx, dtype))) for name, one in before.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == dtype


def test_shards_are_cut_at_the_limit_and_load(hf_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 3_000_000)
    convert(hf_checkpoint, tmp_path / "out", DEFAULT)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(shards)
    assert [file.name for file in shards] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert count > 1
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    held = {file.name: read_safetensors(file) for file in shards}
    assert index["weight_map"] == {name: file for file in held for name in held[file]}
    sizes = {file: sum(len(data) for *_, data in tensors.values()) for file, tensors in held.items()}
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


def test_other_files_travel_and_weights_of_other_kinds_do_not(hf_checkpoint, tmp_path):
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


# --- quantization -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, group_size, mode", COMBINATIONS)
@pytest.mark.parametrize("halves", [False, True])
def test_slices_quantize_as_the_whole(tmp_path, monkeypatch, bits, group_size, mode, halves):
    """Gate and up may lie apart; slices end in the middle of an expert."""
    monkeypatch.setattr(jobs_module, "SLICE_BYTES", 3000)
    whole = mx.random.normal((3, 10, 256), key=mx.random.key(bits)).astype(mx.bfloat16)
    parts = mx.split(whole, 2, axis=1) if halves else [whole]
    names = [f"part{i}" for i in range(len(parts))]
    raw = {n: ("BF16", p.shape, np.array(p.view(mx.uint16)).tobytes()) for n, p in zip(names, parts)}
    write_safetensors(tmp_path / "source.safetensors", raw)
    header = read_header(tmp_path / "source.safetensors")
    quantization = Quantization(bits, group_size, mode)
    sources = tuple(header[name] for name in names)
    job = jobs_module.Job("m.weight", whole.shape, tuple(names), sources, "BF16", quantization)
    (tmp_path / "out").mkdir()
    module._write([job], tmp_path / "out", False, None)
    assert len(list(job.slices())) == 6
    written = read_folder(tmp_path / "out")
    wanted = mx.quantize(whole, group_size=group_size, bits=bits, mode=mode)
    kinds = ["weight", "scales", "biases"][: len(wanted)]
    assert set(written) == {f"m.{kind}" for kind in kinds}
    assert all(same(floats(written[f"m.{kind}"]), array) for kind, array in zip(kinds, wanted))


def test_the_default_recipe(demo, quantized):
    before, after = read_folder(demo), read_folder(quantized)
    recipe = RECIPES[DEFAULT]
    for name, one in before.items():
        path = name.removesuffix(".weight")
        how = recipe.quantization(path, one[1][-1])
        if how is None:
            assert after.pop(name) == one
            continue
        kinds = ("weight", "scales", "biases")
        for kind, array in zip(kinds, mx.quantize(floats(one), **how)):
            assert same(floats(after.pop(f"{path}.{kind}")), array), path
        assert how == {"group_size": 64, "bits": 4 if ".experts." in path else 8, "mode": "affine"}
    assert not after
    stay = {name for name in before if recipe.quantization(name.removesuffix(".weight"), before[name][1][-1]) is None}
    assert {name for name in before if "vision" in name or "norm" in name or "scalar" in name} <= stay
    config = json.loads((quantized / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    base = {key: config["quantization"][key] for key in ("group_size", "bits", "mode")}
    assert base == {"group_size": 64, "bits": 4, "mode": "affine"}
    overrides = {path: how for path, how in config["quantization"].items() if path not in base}
    assert overrides["model.decoder.embed_tokens"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert not any(".experts." in path for path in overrides)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_stays_near(demo, tmp_path, name):
    report = convert(demo, tmp_path / "out", name, verify=True)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.nbytes == report.nbytes == RECIPES[name].nbytes(Checkpoint.open(demo).shapes)
    assert report.bits_per_weight == pytest.approx(checkpoint.bits_per_weight)
    assert list(report.quantized) == ["experts", "attention", "mlp", "router", "embedding", "self_conditioning"]
    assert report.quantized["experts"] == str(RECIPES[name].experts)
    assert not report.unquantized
    assert not report.nonfinite
    found = report.verification
    assert not found.equal
    assert found.positions == 64
    assert 0 < found.mean_kl < {3: 0.1, 4: 0.05}.get(RECIPES[name].experts.bits, 0.01)
    assert found.argmax_agreement > 0.8
    model = build(checkpoint, "float32")
    tokens = mx.array([[2, 5, 7]])
    assert mx.isfinite(model.logits(model.encode(tokens, model.new_prefix()))).all().item()


def test_groups_that_do_not_divide_give_way_or_leave_floats(demo, tmp_path):
    report = convert(demo, tmp_path / "out", Recipe("wide", Quantization(4, 128), router=None))
    layers = [f"model.decoder.layers.{i}.experts.gate_up_proj" for i in range(6)]
    assert report.regrouped == dict.fromkeys(layers, "4-bit affine, groups of 64")  # its input is 192 wide
    assert report.quantized["experts"] == "4-bit affine, groups of 128; 4-bit affine, groups of 64"
    assert "router" not in report.quantized
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    build(Checkpoint.open(tmp_path / "out"))
    assert config["model.decoder.layers.0.experts.gate_up_proj"]["group_size"] in (64, 128)
    assert Quantization(4, 64).fit(96) == Quantization(4, 32)
    assert Quantization(4, 64).fit(100) is None
    assert Quantization(4, 16, "nvfp4").fit(24) is None


def test_estimates_need_no_weights():
    shapes = {
        "model.decoder.layers.0.experts.down_proj.weight": (4, 10, 704),
        "model.decoder.embed_tokens.weight": (100, 64),
        "model.decoder.norm.weight": (64,),
    }
    packed = 4 * 10 * (704 // 2 + 704 // 64 * 4)
    assert RECIPES["4bit"].nbytes(shapes) == packed + 100 * (64 + 4) + 128
    assert RECIPES["4bit"].nbytes(shapes, 4) == packed + 4 * 10 * 11 * 4 + 100 * (64 + 8) + 256
    assert RECIPES["mxfp4"].nbytes(shapes) == 4 * 10 * (352 + 22) + 100 * 68 + 128


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((7,), "q-bits is 7; with affine it should be 2, 3, 4, 5, 6 or 8."),
        ((4, 16), "q-group-size is 16; with affine it should be 32, 64 or 128."),
        ((4, 64, "mxfp4"), "q-group-size is 64; with mxfp4 it should be 32."),
        ((8, 32, "mxfp4"), "q-bits is 8; with mxfp4 it should be 4."),
        ((4, 32, "nf4"), "q-mode is 'nf4'; it should be one of affine, mxfp4, mxfp8, nvfp4."),
    ],
)
def test_what_mlx_cannot_compute_is_refused(arguments, message):
    with pytest.raises(OptionError) as error:
        Quantization(*arguments)
    assert str(error.value) == message


# --- sources in MLX's layout --------------------------------------------------------------------------------------


def test_our_own_output_again_is_byte_for_byte_the_same(demo, tmp_path):
    report = convert(demo, tmp_path / "out", verify=True)
    assert report.unchanged
    assert report.verification.equal
    assert contents(tmp_path / "out") == contents(demo)


@pytest.mark.parametrize("recipe", [None, DEFAULT])
def test_a_quantized_source_is_copied(quantized, tmp_path, recipe):
    report = convert(quantized, tmp_path / "out", recipe, verify=True)
    assert report.unchanged
    assert report.bits_per_weight == pytest.approx(Checkpoint.open(quantized).bits_per_weight)
    assert report.quantized["experts"] == "4-bit affine, groups of 64"
    assert contents(tmp_path / "out") == contents(quantized)


def test_a_quantized_source_is_not_quantized_otherwise(quantized, tmp_path):
    with pytest.raises(CheckpointError) as error:
        convert(quantized, tmp_path / "out", "8bit")
    assert str(error.value) == (
        f"{quantized} is already quantized at 7.04 bits per weight; start from the original weights to get 8bit."
    )
    assert left_in(tmp_path) == []


def test_a_quantized_source_can_be_cast(quantized, tmp_path):
    report = convert(quantized, tmp_path / "out", dtype="float32")
    before, after = read_folder(quantized), read_folder(tmp_path / "out")
    assert not report.unchanged
    for name, one in before.items():
        assert same(floats(after[name]), floats(one) if one[0] == "U32" else floats(one).astype(mx.float32))
    build(Checkpoint.open(tmp_path / "out"))


def apart(source: Path, folder: Path) -> Path:
    """The older form of mlx-vlm's layout: gate and up as tensors of their own, overrides under their names."""
    tensors = {}
    for name, (dtype, shape, data) in read_safetensors(source / "model.safetensors").items():
        if ".experts.gate_up_proj." not in name:
            continue
        experts, rows, width = shape
        halves = np.frombuffer(data, np.uint8).reshape(experts, 2, -1)
        tensors[name] = None
        for i, part in enumerate(("gate_proj", "up_proj")):
            one = (dtype, [experts, rows // 2, width], halves[:, i].tobytes())
            tensors[name.replace("gate_up_proj", part)] = one
    return changed(source, folder, **tensors)


@pytest.mark.parametrize("which", ["demo", "quantized"])
def test_gate_and_up_apart_are_fused(request, tmp_path, which):
    source = request.getfixturevalue(which)
    convert(apart(source, tmp_path / "older"), tmp_path / "out")
    assert read_folder(tmp_path / "out") == read_folder(source)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_overrides_of_halves_become_the_whole_s(demo, tmp_path):
    convert(demo, tmp_path / "mixed", Recipe("mixed", Quantization(4), mlp=Quantization(4)))
    older = apart(tmp_path / "mixed", tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    how = {"group_size": 64, "bits": 4}
    for part in ("gate_proj", "up_proj"):
        for i in range(6):
            config["quantization"][f"model.decoder.layers.{i}.experts.{part}"] = how
    config["quantization"] |= {"bits": 8}
    for i in range(6):
        config["quantization"][f"model.decoder.layers.{i}.experts.down_proj"] = how
        for part in ("gate_proj", "up_proj", "down_proj"):
            config["quantization"][f"model.decoder.layers.{i}.mlp.{part}"] = how
    config["quantization_config"] = config["quantization"]
    (older / "config.json").write_text(json.dumps(config))
    report = convert(older, tmp_path / "out")
    assert report.quantized["experts"] == report.quantized["mlp"] == "4-bit affine, groups of 64"
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "mixed")
    build(Checkpoint.open(tmp_path / "out"))
    config["quantization"]["model.decoder.layers.3.experts.up_proj"] = {"group_size": 64, "bits": 3}
    (older / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"packs the two halves of model\.decoder\.layers\.3\.experts"):
        convert(older, tmp_path / "again")


# --- all or nothing -----------------------------------------------------------------------------------------------


def test_an_interrupted_run_leaves_nothing_and_can_be_run_again(hf_checkpoint, tmp_path):
    target = tmp_path / "new" / "out"
    seen = []

    def interrupt(done: int, total: int) -> None:
        seen.append(left_in(target.parent))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(hf_checkpoint, target, DEFAULT, progress=interrupt)
    assert seen[0] == [f".out.partial-{os.getpid()}"]
    assert left_in(tmp_path) == []
    convert(hf_checkpoint, target, DEFAULT)
    assert left_in(target.parent) == ["out"]


def test_what_a_killed_run_left_is_swept(demo, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for left in (f".out.partial-{dead.pid}", f".out.partial-{os.getpid()}", ".out.partial-1", ".outer.partial-x"):
        (tmp_path / left).mkdir()
    convert(demo, tmp_path / "out")
    assert left_in(tmp_path) == [".out.partial-1", ".outer.partial-x", "out"]


def test_progress_counts_every_byte_once(hf_checkpoint, tmp_path):
    steps = []
    convert(hf_checkpoint, tmp_path / "out", DEFAULT, progress=lambda done, total: steps.append((done, total)))
    total = sum(len(data) for *_, data in read_folder(hf_checkpoint).values())
    assert steps[-1] == (total, total)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_an_existing_output_is_refused(demo, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OptionError) as error:
        convert(demo, tmp_path / "out")
    assert str(error.value) == f"{tmp_path / 'out'} exists; delete it or choose another --mlx-path."
    assert left_in(tmp_path / "out") == []


def test_a_small_disk_is_noticed_before_anything_is_written(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**7, 7 * 10**6, 3 * 10**6))
    with pytest.raises(DgemmaError) as error:
        convert(demo, tmp_path / "out")
    assert str(error.value) == (
        f"{tmp_path} has 3.0 MB free, but the result takes 13.4 MB; free some space or choose another --mlx-path."
    )
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "number, message",
    [
        (28, "The disk under {} is full, and the result takes 5.9 MB; free some space or choose another --mlx-path."),
        (122, "The disk under {} is full, and the result takes 5.9 MB; free some space or choose another --mlx-path."),
        (5, "{} cannot be used (Input/output error); mend that or choose another --mlx-path."),
    ],
)
def test_a_failing_disk_leaves_nothing(demo, tmp_path, monkeypatch, number, message):
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(DgemmaError) as error:
        convert(demo, tmp_path / "out", DEFAULT)
    assert str(error.value) == message.format(tmp_path)
    assert left_in(tmp_path) == []


def test_a_target_that_cannot_be_written(demo, tmp_path, monkeypatch):
    def refuse(self, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "file").write_text("")
    with pytest.raises(DgemmaError) as error:
        convert(demo, tmp_path / "file" / "out")
    assert str(error.value) == (
        f"{tmp_path / 'file'} cannot be used (File exists); mend that or choose another --mlx-path."
    )
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DgemmaError) as error:
        convert(demo, tmp_path / "out")
    assert str(error.value) == f"{tmp_path} cannot be used (Permission denied); mend that or choose another --mlx-path."


# --- memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from mlx_dgemma.convert import convert, conversion

def peak():
    status = Path("/proc/self/status")  # getrusage's peak is inherited from the parent on Linux
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
convert(sys.argv[1], sys.argv[2], "4bit")
print(peak() - before)
"""


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    """An embedding of 420 MB; the result is checked at its two ends."""
    config = small_config(("full_attention",), vocab_size=262144, hidden_size=800)
    source = tmp_path / "source"
    source.mkdir()
    shapes = {name: a.shape for name, a in tree_flatten(DiffusionGemma(ModelConfig.from_dict(config)).parameters())}
    writer = Writer(source, [[Entry(name, "BF16", shape)] for name, shape in shapes.items()])
    row = np.arange(800, dtype=np.float32).view(np.uint32) >> 16
    rows = np.tile(row.astype(np.uint16), (64, 1))
    embedding = "model.decoder.embed_tokens.weight"
    writer.write(embedding, 0, rows)
    writer.write(embedding, (262144 - 64) * 1600, rows)  # between the two the file is sparse
    writer.write("model.encoder.language_model.layers.0.layer_scalar", 0, np.ones(1, np.uint16))
    for name, shape in shapes.items():
        writer.write(name, 2 * int(np.prod(shape)) - 2, np.zeros(1, np.uint16))
    writer.finish()
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, source, tmp_path / "out"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert (source / "model.safetensors").stat().st_size > 419_000_000
    assert int(done.stdout) < 300_000_000
    held = Checkpoint.open(tmp_path / "out").tensors
    info = held[embedding]
    with info.file.open("rb") as file:
        file.seek(info.start)
        assert (
            file.read(800) == np.array(mx.quantize(floats(("BF16", [64, 800], rows.tobytes())), 32, 8)[0])[0].tobytes()
        )
