"""The command `convert`: its output, its errors, the model card and the upload."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner

from mlx_dgemma.convert import cli as cli_module
from mlx_dgemma.convert import convert, jobs
from mlx_dgemma.errors import DgemmaError, OptionError

ROOT = Path(__file__).parent.parent.parent
RELEASE = "google/diffusiongemma-26B-A4B-it"
RECIPES = "3bit, 4bit, 6bit, 8bit, mxfp4, mxfp8, nvfp4, mac-16gb, mac-24gb, mac-36gb"


def run(*arguments):
    return CliRunner().invoke(cli_module.convert, [str(one) for one in arguments])


@pytest.fixture
def release(hf_checkpoint, tmp_path) -> Path:
    """A copy of the release that a test may break."""
    shutil.copytree(hf_checkpoint, tmp_path / "release")
    return tmp_path / "release"


# --- output -------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_no_mlx():
    code = (
        "import sys; from mlx_dgemma.convert.cli import convert\n"
        "try: convert(['--help'])\n"
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
        r"Nothing was quantized; use -q to quantize\.\n",
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
        r"because the recipe's group size does not divide its input size\n"
        r"\d\.\d\d bits per weight, 5\.9 MB, \d+\.\d s\.\n"
        r"Logits compared with the source's at 64 positions: largest difference \d\.\d+, mean KL 0\.\d+ nats, "
        r"same top token at \d+\.\d%\.\n",
        done.stdout,
    ), done.stdout


def test_an_unchanged_source_is_reported(demo, tmp_path):
    run(demo, "--mlx-path", tmp_path / "first", "-q")
    done = run(tmp_path / "first", "--mlx-path", tmp_path / "second", "-q", "--verify")
    assert (
        f"{tmp_path / 'first'} is already an MLX checkpoint with 7.04 bits per weight: the weights are copied "
        "unchanged.\n" in done.stdout
    )
    assert done.stdout.endswith("Logits compared with the source's at 64 positions: equal bit for bit.\n")


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


def test_a_progress_bar_on_a_terminal(demo, tmp_path):
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
        (["a", "--recipe", "4bit", "--q-bits", "3"], 2, "--recipe and --q-bits cannot be combined."),
        (["a", "--recipe", "5bit"], 2, f"--recipe is '5bit'; take one of {RECIPES}."),
        (["a", "-q", "--q-bits", "9"], 2, "--q-bits is 9; with affine it should be 2, 3, 4, 5, 6 or 8."),
        (["./nowhere"], 1, f"./nowhere does not exist; give a folder or a Hub id such as {RELEASE}."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(tmp_path, arguments, code, message):
    done = run(*arguments, "--mlx-path", tmp_path / "out")
    assert done.exit_code == code
    assert done.stderr.endswith(f"Error: {message}\n")
    assert code == 2 or done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_removes_the_partial_folder(hf_checkpoint, tmp_path, monkeypatch):
    def interrupt(ranges):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "read_ranges", interrupt)
    done = run(hf_checkpoint, "--mlx-path", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr == "Interrupted; no files were left behind.\n"
    assert list(tmp_path.iterdir()) == []


def test_sigterm_removes_the_partial_folder(hf_checkpoint, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(jobs, "read_ranges", lambda ranges: os.kill(os.getpid(), signal.SIGTERM))
    done = run(hf_checkpoint, "--mlx-path", tmp_path / "out")
    assert done.exit_code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_unknown_dtype(demo, tmp_path):
    with pytest.raises(OptionError) as error:
        convert(demo, tmp_path / "out", dtype="int8")
    assert str(error.value) == "dtype is 'int8'; it should be one of float32, bfloat16, float16."


# --- the card and the Hub -----------------------------------------------------------------------------------------


def test_the_model_card(release, tmp_path):
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
def test_a_broken_card_is_ignored(release, tmp_path, text):
    (release / "README.md").write_text(text)
    convert(release, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlibrary_name: mlx\npipeline_tag")


class StubApi:
    """Replaces the Hub; `fails` is raised by an upload."""

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
def test_an_upload_that_cannot_succeed_is_refused_before_converting(demo, tmp_path, monkeypatch, repo, token, message):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    with pytest.raises(OptionError) as error:
        convert(demo, tmp_path / "out", upload_repo=repo)
    assert str(error.value) == message
    assert list(tmp_path.iterdir()) == []
