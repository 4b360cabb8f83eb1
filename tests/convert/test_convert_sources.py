"""Broken sources are refused with one sentence, and `--verify` finds what went wrong."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import changed
from click.testing import CliRunner
from safetensors_files import INDEX, read_safetensors, write_safetensors

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.convert import cli as cli_module
from mlx_dgemma.convert import conversion, convert, verify
from mlx_dgemma.errors import CheckpointError

SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


def run(*arguments):
    return CliRunner().invoke(cli_module.convert, [str(one) for one in arguments])


@pytest.fixture
def release(hf_checkpoint, tmp_path) -> Path:
    """A copy of the release that a test may break."""
    shutil.copytree(hf_checkpoint, tmp_path / "release")
    return tmp_path / "release"


# --- broken sources -----------------------------------------------------------------------------------------------


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(file: Path, **changes) -> None:
    stored = read_safetensors(file)
    stored.update(changes)
    write_safetensors(file, {name: one for name, one in stored.items() if one is not None})


def edit_index(folder: Path, **changes) -> None:
    weight_map = {**json.loads((folder / INDEX).read_text())["weight_map"], **changes}
    weight_map = {name: shard for name, shard in weight_map.items() if shard}
    edit_json(folder / INDEX, weight_map=weight_map)


NORM = "model.decoder.norm.weight"
SCALARS = "model.encoder.language_model.layers.0.layer_scalar"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


BROKEN = {
    "missing shard": (
        lambda p: (p / SHARDS[1]).unlink(),
        "The shard {p}/" + SHARDS[1] + " is missing; download it again.",
    ),
    "truncated shard": (
        lambda p: cut(p / SHARDS[2]),
        "{p}/" + SHARDS[2] + " is truncated: it has 3632812 of 3632822 bytes; download it again.",
    ),
    "no safetensors": (
        lambda p: (p / SHARDS[0]).write_bytes(b"\x08\0\0\0\0\0\0\0not json"),
        "{p}/" + SHARDS[0] + " is not a safetensors file; download it again.",
    ),
    "no shards": (
        lambda p: [(p / name).unlink() for name in (*SHARDS, INDEX)],
        "{p} holds no .safetensors file; point at a folder that holds a whole checkpoint.",
    ),
    "index names a tensor that is not there": (
        lambda p: edit_index(p, **{"model.decoder.extra": SHARDS[0]}),
        INDEX + " names the tensor model.decoder.extra, but " + SHARDS[0] + " does not hold it; download both again.",
    ),
    "unknown tensor": (
        lambda p: (edit_tensors(p / SHARDS[2], extra=("BF16", [1], b"\0\0")), edit_index(p, extra=SHARDS[2])),
        "The checkpoint holds the unknown tensor extra; this is not a DiffusionGemma release.",
    ),
    "missing tensor": (
        lambda p: (edit_tensors(p / SHARDS[2], **{NORM: None}), edit_index(p, **{NORM: None})),
        "The checkpoint lacks " + NORM + "; download it again.",
    ),
    "wrong shape": (
        lambda p: edit_tensors(p / SHARDS[2], **{NORM: ("BF16", [191], bytes(382))}),
        NORM + " has the shape [191], but config.json asks for [192].",
    ),
    "wrong dtype": (
        lambda p: edit_tensors(p / SHARDS[2], **{NORM: ("F64", [192], bytes(8 * 192))}),
        NORM + " has the dtype F64; it should be one of F32, BF16, F16.",
    ),
    "wrong number of bytes": (
        lambda p: edit_tensors(p / SHARDS[2], **{NORM: ("BF16", [192], bytes(380))}),
        NORM + " has 380 bytes, but its shape and dtype need 384.",
    ),
    "no config": (
        lambda p: (p / "config.json").unlink(),
        "{p}/config.json is missing; point at a folder that holds a whole checkpoint.",
    ),
    "broken config": (
        lambda p: (p / "config.json").write_text("{"),
        "{p}/config.json cannot be read as JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)); download it again.",
    ),
    "another model": (
        lambda p: edit_json(p / "config.json", model_type="llama"),
        "This checkpoint's model_type is 'llama'; mlx-dgemma runs 'diffusion_gemma' only.",
    ),
    "the autoregressive sister": (
        lambda p: edit_json(p / "config.json", model_type="gemma4"),
        "This checkpoint's model_type is 'gemma4' (the autoregressive Gemma 4: mlx-lm runs it); "
        "mlx-dgemma runs 'diffusion_gemma' only.",
    ),
    "no tokenizer": (
        lambda p: (p / "tokenizer.json").unlink(),
        "{p} has no tokenizer.json; download it, because the model cannot be used without it.",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_source_is_one_sentence(release, tmp_path, case):
    damage, message = BROKEN[case]
    damage(release)
    done = run(release, "--mlx-path", tmp_path / "out", "-q")
    assert done.exit_code == 1
    assert done.stderr == f"Error: {message.replace('{p}', str(release))}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_scales_without_an_entry_or_with_a_wrong_one(demo, tmp_path):
    convert(demo, tmp_path / "packed", "4bit")
    config = tmp_path / "packed" / "config.json"
    first = "model.decoder.embed_tokens"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in whole.items() if not k.startswith("quantization")}))
    with pytest.raises(
        CheckpointError, match=r"^The checkpoint holds model\.\S+\.scales, but config\.json has no quant"
    ):
        convert(tmp_path / "packed", tmp_path / "out")
    whole["quantization"][first]["bits"] = 7
    config.write_text(json.dumps(whole))
    with pytest.raises(CheckpointError) as error:
        convert(tmp_path / "packed", tmp_path / "out")
    assert str(error.value) == (
        f"config.json gives {first} a quantization that MLX does not support: "
        "q-bits is 7; with affine it should be 2, 3, 4, 5, 6 or 8."
    )
    whole["quantization"][first]["bits"] = 4
    config.write_text(json.dumps(whole))
    with pytest.raises(CheckpointError) as error:
        convert(tmp_path / "packed", tmp_path / "out")
    assert str(error.value) == f"{first}.weight has the shape [2048, 48], but config.json asks for [2048, 24]."


# --- verifying ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, value", [([], np.inf), (["-q"], np.nan), (["--dtype", "float32"], -np.inf)])
def test_weights_that_are_not_finite_are_named(release, tmp_path, options, value):
    name = "model.decoder.layers.2.experts.gate_up_proj"
    shard = json.loads((release / INDEX).read_text())["weight_map"][name]
    dtype, shape, data = read_safetensors(release / shard)[name]
    bits = np.frombuffer(data, np.uint16).copy()
    bits[-5] = np.float32(value).view(np.uint32) >> 16
    edit_tensors(release / shard, **{name: (dtype, shape, bits.tobytes())})
    done = run(release, "--mlx-path", tmp_path / "out", "--verify", *options)
    assert done.exit_code == 0, done.output
    assert done.stderr == f"Warning: {name}.weight contains NaN or infinity.\n"
    if not options:
        again = run(tmp_path / "out", "--mlx-path", tmp_path / "again", "--verify")
        assert again.stderr == done.stderr


def test_an_overflow_of_a_cast_is_named(release, tmp_path):
    large = np.full(192, 1e5, np.float32).view(np.uint32) >> 16
    edit_tensors(release / SHARDS[2], **{NORM: ("BF16", [192], large.astype(np.uint16).tobytes())})
    done = run(release, "--mlx-path", tmp_path / "out", "--verify", "--dtype", "float16")
    assert done.stderr == f"Warning: {NORM} contains NaN or infinity.\n"


def test_a_difference_between_unchanged_weights_is_an_error(hf_checkpoint, tmp_path, monkeypatch):
    def spoil(folder, *arguments):
        stored = read_safetensors(folder / "model.safetensors")
        dtype, shape, data = stored[NORM]
        stored[NORM] = (dtype, shape, data[:-2] + b"\0\0")
        write_safetensors(folder / "model.safetensors", stored, "mlx")

    copy = conversion.copy_metadata
    monkeypatch.setattr(conversion, "copy_metadata", lambda c, folder, *how: (copy(c, folder, *how), spoil(folder)))
    done = run(hf_checkpoint, "--mlx-path", tmp_path / "out", "--verify")
    assert done.exit_code == 1
    assert re.fullmatch(
        r"Error: The result's logits differ from the source's by up to \d[\d.]*, although its weights should be the "
        r"same; convert again, and check the disk and the memory if it happens again\.\n",
        done.stderr,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_cannot_be_used(release, tmp_path):
    (release / "tokenizer.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=rf"^The tokenizer in {release} cannot be used \(.*\); download it again\.$"
    ):
        convert(release, tmp_path / "out", verify=True)


def test_the_kl_divergence_is_of_the_source(demo, monkeypatch):
    """Two tokens, probabilities (1/2, 1/2) before and (3/4, 1/4) after."""
    logits = iter([mx.log(mx.array([[0.5, 0.5]])), mx.log(mx.array([[0.75, 0.25]])) + 3])
    monkeypatch.setattr(verify, "_logits", lambda checkpoint, prompt: next(logits))
    found = verify.verify_conversion(*[Checkpoint.open(demo)] * 2, exact=False)
    assert found.mean_kl == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25), abs=1e-6)
    assert found.max_difference == pytest.approx(3 + np.log(1.5), abs=1e-6)
    assert (found.argmax_agreement, found.positions, found.equal) == (1, 1, False)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.encoder.language_model.embed_tokens.weight"])
def test_a_copy_of_a_tied_weight_goes_if_it_is_equal_and_is_refused_if_not(demo, tmp_path, name):
    """With `--verify` too: source and result would both be computed without it, and would agree."""
    dtype, shape, data = read_safetensors(demo / "model.safetensors")["model.decoder.embed_tokens.weight"]
    convert(changed(demo, tmp_path / "copied", **{name: (dtype, shape, data)}), tmp_path / "out")
    assert name not in Checkpoint.open(tmp_path / "out").tensors
    other = changed(demo, tmp_path / "other", **{name: (dtype, shape, data[:-2] + bytes([data[-2] ^ 1, data[-1]]))})
    result = run("--hf-path", other, "--mlx-path", tmp_path / "refused", "--verify")
    assert result.exit_code == 1
    assert f"Error: {name} differs from model.decoder.embed_tokens.weight, " in result.output
    assert not (tmp_path / "refused").exists()
