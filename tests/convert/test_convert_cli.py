"""The command `convert`: what it prints, how it fails, what it refuses of a source; verifying and uploading."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import INDEX, read_safetensors, write_safetensors

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.convert import cli as cli_module
from mlx_dgemma.convert import conversion, convert, verify
from mlx_dgemma.errors import CheckpointError, DgemmaError, OptionError

ROOT = Path(__file__).parent.parent.parent
SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
RELEASE = "google/diffusiongemma-26B-A4B-it"
RECIPES = "3bit, 4bit, 6bit, 8bit, mxfp4, mxfp8, nvfp4"


def run(*arguments):
    return CliRunner().invoke(cli_module.command, [str(one) for one in arguments])


@pytest.fixture
def release(hf_checkpoint, tmp_path) -> Path:
    """A release that may be broken."""
    shutil.copytree(hf_checkpoint, tmp_path / "release")
    return tmp_path / "release"


# --- what it prints -----------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_no_mlx():
    code = (
        "import sys; from mlx_dgemma.convert.cli import command\n"
        "try: command(['--help'])\n"
        "except SystemExit: print(sorted({'mlx', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("\n[]\n")
    for (
        flag
    ) in "--hf-path --mlx-path -q --quantize --q-bits --q-group-size --q-mode --dtype --upload-repo --recipe".split():
        assert flag in done.stdout
    assert RECIPES in re.sub(r"\s+", " ", done.stdout)


def test_floats(hf_checkpoint, tmp_path):
    done = run("--hf-path", hf_checkpoint, "--mlx-path", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert re.fullmatch(
        rf"{hf_checkpoint} -> {tmp_path}/out\n"
        r"  all weights        bfloat16\n"
        r"16\.00 bits per weight, 13\.4 MB, \d+\.\d s\.\n"
        r"Nothing is quantized; -q quantizes\.\n",
        done.stdout,
    )


def test_quantizing_and_verifying(demo, tmp_path):
    done = run(demo, "--mlx-path", tmp_path / "out", "-q", "--q-group-size", 128, "--verify")
    assert done.exit_code == 0, done.output
    assert re.fullmatch(
        rf"{demo} -> {tmp_path}/out\n"
        r"  experts            4-bit affine, groups of 128; 4-bit affine, groups of 64\n"
        r"  attention          8-bit affine, groups of 64\n"
        r"  mlp                8-bit affine, groups of 64\n"
        r"  router             8-bit affine, groups of 64\n"
        r"  embedding          8-bit affine, groups of 64\n"
        r"  self-conditioning  8-bit affine, groups of 64\n"
        r"  the rest           bfloat16\n"
        r"  model\.decoder\.layers\.\*\.experts\.gate_up_proj: 4-bit affine, groups of 64, "
        r"as the recipe's groups do not divide its input\n"
        r"\d\.\d\d bits per weight, 5\.9 MB, \d+\.\d s\.\n"
        r"Logits against the source's, over 64 positions: largest difference \d\.\d+, mean KL 0\.\d+ nats, "
        r"same best token at \d+\.\d%\.\n",
        done.stdout,
    ), done.stdout


def test_it_says_that_there_was_nothing_to_do(demo, tmp_path):
    run(demo, "--mlx-path", tmp_path / "first", "-q")
    done = run(tmp_path / "first", "--mlx-path", tmp_path / "second", "-q", "--verify")
    assert (
        f"{tmp_path / 'first'} is already an MLX checkpoint at 7.04 bits per weight: weights are copied unchanged.\n"
        in done.stdout
    )
    assert done.stdout.endswith("Logits against the source's, over 64 positions: equal bit for bit.\n")


def test_the_flags_of_the_experts(demo, tmp_path):
    done = run(demo, "--mlx-path", tmp_path / "out", "-q", "--q-mode", "mxfp8")
    assert (
        "  experts            8-bit mxfp8, groups of 32\n  attention          8-bit affine, groups of 64\n"
        in done.stdout
    )
    assert "recipe `mxfp8`" in (tmp_path / "out" / "README.md").read_text()
    done = run(demo, "--mlx-path", tmp_path / "five", "-q", "--q-bits", 5, "--q-group-size", 32)
    assert "  experts            5-bit affine, groups of 32\n" in done.stdout
    assert "-q --q-bits 5 --q-group-size 32 --q-mode affine" in (tmp_path / "five" / "README.md").read_text()


def test_a_bar_on_a_terminal(demo, tmp_path):
    import pty

    reader, writer = pty.openpty()
    command = [sys.executable, "-m", "mlx_dgemma.convert", str(demo), "--mlx-path", str(tmp_path / "out"), "-q"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, cwd=ROOT, check=True)
    os.close(writer)
    shown = os.read(reader, 100_000).decode()
    os.close(reader)
    assert "Converting" in shown
    assert "100%" in shown
    assert b"Converting" not in done.stdout


# --- wrong usage and failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "Give one checkpoint: --hf-path or the argument SOURCE."),
        (["a", "--hf-path", "b"], 2, "Give one checkpoint: --hf-path or the argument SOURCE."),
        (["a", "--q-bits", "4"], 2, "--q-bits needs -q."),
        (["a", "--q-mode", "mxfp4"], 2, "--q-mode needs -q."),
        (["a", "--recipe", "4bit", "--q-bits", "3"], 2, "--recipe and --q-bits exclude each other."),
        (["a", "--recipe", "5bit"], 1, f"There is no recipe '5bit'; take one of {RECIPES}."),
        (["a", "-q", "--q-bits", "9"], 1, "q-bits is 9; with affine it should be 2, 3, 4, 5, 6 or 8."),
        (["./nowhere"], 1, f"./nowhere does not exist; give a folder or a Hub id such as {RELEASE}."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(tmp_path, arguments, code, message):
    done = run(*arguments, "--mlx-path", tmp_path / "out")
    assert done.exit_code == code
    assert done.stderr.endswith(f"Error: {message}\n")
    assert code == 2 or done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c(hf_checkpoint, tmp_path, monkeypatch):
    def interrupt(ranges):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "read", interrupt)
    done = run(hf_checkpoint, "--mlx-path", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr == "Interrupted; nothing was left behind.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_polite_kill(hf_checkpoint, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(conversion, "read", lambda ranges: os.kill(os.getpid(), signal.SIGTERM))
    done = run(hf_checkpoint, "--mlx-path", tmp_path / "out")
    assert done.exit_code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_unknown_dtype(demo, tmp_path):
    with pytest.raises(OptionError) as error:
        convert(demo, tmp_path / "out", dtype="int8")
    assert str(error.value) == "dtype is 'int8'; it should be one of float32, bfloat16, float16."


# --- broken sources -----------------------------------------------------------------------------------------------


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(file: Path, **changes) -> None:
    held = read_safetensors(file)
    held.update(changes)
    write_safetensors(file, {name: one for name, one in held.items() if one is not None})


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
    "stray shard": (
        lambda p: shutil.copy(p / SHARDS[0], p / "other.safetensors"),
        "The shard {p}/other.safetensors is not in " + INDEX + "; remove it or download the index again.",
    ),
    "no index": (
        lambda p: (p / INDEX).unlink(),
        "{p} holds 3 shards but no " + INDEX + "; download the index.",
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
        NORM + " has 380 bytes, but its shape asks for another number.",
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
        "{p} holds no tokenizer.json; download it, for nothing can be answered without a tokenizer.",
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
        f"config.json has a quantization of {first} that MLX cannot compute "
        "(q-bits is 7; with affine it should be 2, 3, 4, 5, 6 or 8.)"
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
    assert done.stderr == f"Warning: {name}.weight holds NaN or infinity.\n"
    if not options:
        again = run(tmp_path / "out", "--mlx-path", tmp_path / "again", "--verify")
        assert again.stderr == done.stderr


def test_an_overflow_of_a_cast_is_named(release, tmp_path):
    large = np.full(192, 1e5, np.float32).view(np.uint32) >> 16
    edit_tensors(release / SHARDS[2], **{NORM: ("BF16", [192], large.astype(np.uint16).tobytes())})
    done = run(release, "--mlx-path", tmp_path / "out", "--verify", "--dtype", "float16")
    assert done.stderr == f"Warning: {NORM} holds NaN or infinity.\n"


def test_a_difference_where_none_may_be_fails(hf_checkpoint, tmp_path, monkeypatch):
    def spoil(folder, *arguments):
        held = read_safetensors(folder / "model.safetensors")
        dtype, shape, data = held[NORM]
        held[NORM] = (dtype, shape, data[:-2] + b"\0\0")
        write_safetensors(folder / "model.safetensors", held, "mlx")

    carry = conversion.carry
    monkeypatch.setattr(conversion, "carry", lambda c, folder, *how: (carry(c, folder, *how), spoil(folder)))
    done = run(hf_checkpoint, "--mlx-path", tmp_path / "out", "--verify")
    assert done.exit_code == 1
    assert re.fullmatch(
        r"Error: The result's logits differ from the source's by up to \d[\d.]*, although its weights should be the "
        r"same; convert again, and if it stays so, check disk and memory\.\n",
        done.stderr,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_cannot_be_used(release, tmp_path):
    (release / "tokenizer.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=rf"^The tokenizer in {release} cannot be used \(.*\); download it again\.$"
    ):
        convert(release, tmp_path / "out", verify=True)


def test_divergence_is_measured_from_the_source(demo, monkeypatch):
    """Two tokens, probabilities (1/2, 1/2) before and (3/4, 1/4) after."""
    logits = iter([mx.log(mx.array([[0.5, 0.5]])), mx.log(mx.array([[0.75, 0.25]])) + 3])
    monkeypatch.setattr(verify, "_logits", lambda checkpoint, prompt: next(logits))
    found = verify.verify_conversion(*[Checkpoint.open(demo)] * 2, exact=False)
    assert found.mean_kl == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25), abs=1e-6)
    assert found.max_difference == pytest.approx(3 + np.log(1.5), abs=1e-6)
    assert (found.argmax_agreement, found.positions, found.equal) == (1, 1, False)


# --- the card and the Hub -----------------------------------------------------------------------------------------


def test_the_card(release, tmp_path):
    (release / "README.md").write_text(
        "---\nlicense: apache-2.0\nlibrary_name: transformers\nbase_model: a/b\n---\n# x\n"
    )
    convert(release, tmp_path / "out", "4bit", verify=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith(
        "---\nbase_model: a/b\nbase_model_relation: quantized\nlibrary_name: mlx\nlicense: apache-2.0\n"
        "pipeline_tag: image-text-to-text\ntags:\n- mlx\n- diffusion_gemma\n---\n\n# out\n\n[a/b](https://huggingface.co/a/b)"
    )
    assert "6.7 M parameters, 5.9 MB, 7.04 bits per weight." in card
    assert "`mlx-dgemma convert --hf-path a/b --mlx-path out --recipe 4bit --dtype bfloat16`" in card
    assert "| experts | 4-bit affine, groups of 64 |\n" in card
    assert "| vision tower, projector, norms, scalars | bfloat16 |\n" in card
    assert "over 64 positions of two denoising steps: mean KL" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("text", ["", "no front matter", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense: x"])
def test_a_broken_card_says_nothing(release, tmp_path, text):
    (release / "README.md").write_text(text)
    convert(release, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlibrary_name: mlx\npipeline_tag")


class StubApi:
    """Stands for the Hub; `fails` is raised when it is asked to upload."""

    calls: list = []  # noqa: RUF012
    fails: Exception | None = None

    def create_repo(self, repo_id, exist_ok=False):
        self.calls.append(("create", repo_id, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.fails:
            raise self.fails
        self.calls.append(("upload", repo_id, sorted(file.name for file in Path(folder_path).iterdir())))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(StubApi, "calls", [])
    monkeypatch.setattr(StubApi, "fails", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", StubApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return StubApi


def test_uploading(demo, tmp_path, api):
    done = run(demo, "--mlx-path", tmp_path / "out", "--upload-repo", "me/model")
    assert done.stdout.endswith("Uploaded to https://huggingface.co/me/model.\n")
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert api.calls == [("create", "me/model", True), ("upload", "me/model", files)]
    assert "model.safetensors" in files


def test_an_upload_that_fails_keeps_the_result(demo, tmp_path, api):
    api.fails = ConnectionError("no route to host\nmore")
    target = tmp_path / "out"
    with pytest.raises(DgemmaError) as error:
        convert(demo, target, upload_repo="me/model")
    assert str(error.value) == (
        f"The checkpoint is in {target}, but uploading it to me/model failed (no route to host); "
        f"try again with `hf upload me/model {target}`."
    )
    assert (target / "model.safetensors").exists()


@pytest.mark.parametrize(
    "repo, token, message",
    [
        ("model", "t", "--upload-repo is 'model'; it should be a Hub id such as your-name/diffusiongemma-mlx."),
        ("a/b/c", "t", "--upload-repo is 'a/b/c'; it should be a Hub id such as your-name/diffusiongemma-mlx."),
        ("me/model", None, "--upload-repo needs a Hub token; run `hf auth login` or set HF_TOKEN."),
    ],
)
def test_an_upload_that_cannot_succeed_is_refused_first(demo, tmp_path, monkeypatch, repo, token, message):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    with pytest.raises(OptionError) as error:
        convert(demo, tmp_path / "out", upload_repo=repo)
    assert str(error.value) == message
    assert list(tmp_path.iterdir()) == []
