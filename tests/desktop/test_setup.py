"""`mlx-dgemma setup`: what is proposed, and a first run against a stand-in for the Hub, interrupted and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub import serving_hub
from huggingface_hub import constants, file_download

from mlx_dgemma.check.shapes import raw_config
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.cli.commands import desktop
from mlx_dgemma.cli.main import main
from mlx_dgemma.desktop import setup, user_config
from mlx_dgemma.errors import CheckpointError, DgemmaError, MemoryLimitError, OptionError

GB = 10**9
PIECE = 2**16  # bytes that the Hub's client writes at once, which are 10 MiB otherwise
SMALL_PIECES = f"import huggingface_hub.constants as given; given.DOWNLOAD_CHUNK_SIZE = {PIECE}"


@pytest.fixture
def release(tmp_path):
    """A folder with the config.json of the release without its vision tower, and nothing else."""
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw_config("26b")))
    return folder


@pytest.mark.parametrize(
    ("gives", "recipe"),
    [
        (16 * 2 / 3, "mac-16gb"),
        (24 * 2 / 3, "mac-24gb"),
        (32 * 2 / 3, "4bit"),
        (36 * 3 / 4, "mac-36gb"),
        (48 * 3 / 4, "8bit"),
        (96 * 3 / 4, None),
    ],
)
def test_the_best_that_fits_is_proposed_as_the_readme_says(release, monkeypatch, gives, recipe):
    monkeypatch.setattr(setup.device, "available", lambda: int(gives * 2**30))
    planned = setup.plan(str(release))
    assert planned.chosen.recipe == recipe
    assert [one.recipe for one in planned.choices] == [None, *setup.RANKED]
    assert (planned.target is None) == (recipe is None)


def test_what_does_not_fit_is_refused_before_anything_is_downloaded(release, monkeypatch):
    monkeypatch.setattr(setup.device, "available", lambda: 9 * GB)
    with pytest.raises(MemoryLimitError, match=r"release needs at least \d+\.\d GB and this machine gives 9\.0 GB; "):
        setup.plan(str(release))
    with pytest.raises(MemoryLimitError, match=r"as 8bit needs \d+\.\d GB and this machine gives 9\.0 GB; take a"):
        setup.plan(str(release), "8bit")
    with pytest.raises(OptionError, match=r"^recipe is '5bit'; take one of 3bit,"):
        setup.plan(str(release), "5bit")


def test_a_quantized_checkpoint_is_taken_as_it_is(release, monkeypatch):
    (release / "config.json").write_text(
        json.dumps({**raw_config("26b"), "quantization": {"group_size": 64, "bits": 4, "mode": "affine"}})
    )
    (release / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 15 * GB}}))
    monkeypatch.setattr(setup.device, "available", lambda: 20 * GB)
    planned = setup.plan(str(release))
    assert [(one.recipe, one.weights, one.fits) for one in planned.choices] == [(None, 15 * GB, True)]
    with pytest.raises(CheckpointError, match=r"is quantized already; leave --recipe out"):
        setup.plan(str(release), "4bit")


def goes_on_inside_files():
    """Whether this version of the Hub's client names the part of a file so that a later run finds it."""
    return "uuid4().hex" not in Path(file_download.__file__).read_text()


def test_a_broken_connection_costs_the_rest_of_a_file_alone(hf_checkpoint, tmp_path):
    shard = min(hf_checkpoint.glob("*.safetensors"))
    with serving_hub(hf_checkpoint, "me/tiny") as hub:
        hub.breaks = shard.name
        environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url}
        program = f"{SMALL_PIECES}; from mlx_dgemma.desktop.setup import FILES, HINT, _has_weights, fetch; "
        program += "fetch('me/tiny', FILES, _has_weights, HINT)"
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    ((name, begin),) = hub.ranges
    assert name == shard.name and 0 <= shard.stat().st_size // 2 - begin < PIECE and begin > 0
    assert next(tmp_path.rglob(shard.name)).read_bytes() == shard.read_bytes()


def test_parts_that_a_later_run_can_use_are_kept(tmp_path, monkeypatch):
    """By both ways in which versions of the Hub's client name them."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    blobs = tmp_path / "models--me--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "old.12345678.incomplete").touch()  # of another process
    monkeypatch.setattr(setup.os, "_exit", lambda code: ended.append(code))
    said, ended = [], []
    with setup.interrupts_end_at_once(said.append):
        (blobs / "a.incomplete").touch()
        (blobs / "a.12345678.incomplete").touch()
        signal.raise_signal(signal.SIGINT)
    assert (said, ended) == ([setup.INTERRUPTED], [130])
    assert sorted(one.name for one in blobs.iterdir()) == ["a.incomplete", "old.12345678.incomplete"]


def test_a_first_run_is_interrupted_and_goes_on(hf_checkpoint, tmp_path):
    """Ctrl-C amid the second shard: the next run asks for what is missing alone, converts, and names the default."""
    target, config, cache = tmp_path / "models" / "tiny", tmp_path / "config", tmp_path / "hf"
    environment = {**os.environ, "HF_HOME": str(cache), "XDG_CONFIG_HOME": str(config), "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    words = ["setup", "--yes", "--no-check", "--model", "me/tiny", "--recipe", "4bit", "--folder", str(target)]
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell may have ignored it
    command = [sys.executable, "-c", f"{listen}; {SMALL_PIECES}; from mlx_dgemma.cli.main import main; main()", *words]
    shards = sorted(one.name for one in hf_checkpoint.glob("*.safetensors"))
    with serving_hub(hf_checkpoint, "me/tiny") as hub:
        environment["HF_ENDPOINT"] = hub.url
        hub.stalls = shards[1]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            assert hub.stalled.wait(60)
            while not any(cache.rglob("*.incomplete")):
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
        assert process.returncode == 130, said
        assert said.endswith(f"{setup.INTERRUPTED}\n")
        left = [(shards[1], one.stat().st_size) for one in cache.rglob("*.incomplete")]
        assert goes_on_inside_files() or not left
        assert not config.exists()
        assert not target.exists()
        hub.stalls, before = None, set(hub.asked)
        hub.asked.clear()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert shards[0] in before
        assert set(hub.asked) & before == {shards[1]}
        assert hub.ranges == [one for one in left if one[1]]
        assert {*shards[1:]} <= set(hub.asked)
    assert Checkpoint.open(target).quantization["bits"] == 4
    file = config / "mlx-dgemma" / "config.toml"
    assert file.read_text() == f'model = "{target}"\n'
    assert done.stderr.endswith(f"The default model is {target}, by {file}. Try: mlx-dgemma chat\n")


def test_a_folder_that_is_here_becomes_the_default_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(DEMO.parent)
    words = ["setup", "--yes", "--no-check", "--model", DEMO.name]
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    assert user_config.default_model() == str(DEMO)
    user_config.config_path().unlink()
    done = CliRunner().invoke(main, [*words, "--recipe", "4bit", "--folder", str(DEMO)])
    assert done.exit_code == 1
    assert done.stderr.endswith(f"Error: {DEMO} is another checkpoint; give another --folder, or remove it.\n")
    assert not user_config.config_path().exists()


def test_nothing_is_downloaded_where_the_check_fails_or_the_user_declines(release, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(setup.device, "available", lambda: 40 * GB)
    monkeypatch.setattr(setup, "obtain", None)  # calling it would fail
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(desktop.subprocess, "run", lambda command, **_: asked.append(command[-2:]) or failed)
    asked = []
    done = CliRunner().invoke(main, ["setup", "--model", str(release)], input="n\n")
    assert (done.exit_code, asked) == (1, [])
    assert f"convert it to 8bit (26.8 GB) into {Path.home()}/models/release-8bit? [Y/n]" in done.stderr
    done = CliRunner().invoke(main, ["setup", "--yes", "--model", str(release)])
    assert (done.exit_code, asked) == (1, [["check", "--quick"]])
    assert done.stderr.endswith("The check failed, so nothing was downloaded; report it, or go on with --no-check.\n")
    assert not user_config.config_path().exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = ", "is not TOML ("),
        ("modle = 'x'", "has the key modle; it should have model alone."),
        ("model = 3", "has model = 3; it should be a folder or a Hub id, as text."),
        ("model = ''", "has model = ''; it should be"),
        (b"model = '\xff'", "is not TOML ("),
    ],
)
def test_a_broken_config_is_one_sentence_for_every_command(tmp_path, monkeypatch, text, said):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = user_config.config_path()
    file.parent.mkdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    for words in (["generate", "Hi."], ["info"], ["setup", "--yes"]):
        done = CliRunner().invoke(main, words)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(f"Error: {file} {said}")
        assert done.stderr.count("\n") == 1
    with pytest.raises(DgemmaError):
        user_config.set_default_model("x")
    assert CliRunner().invoke(main, ["generate", "--help"]).exit_code == 0


def test_option_variable_and_config_in_this_order(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    user_config.config_path().parent.mkdir()
    user_config.config_path().write_text("# mine\nmodel = 'old'\n")
    user_config.set_default_model(f'{tmp_path}/"of\\config" \U0001f986')
    assert user_config.config_path().read_text().startswith("# mine\nmodel = ")

    def asked(*words, **variables):
        done = CliRunner().invoke(main, ["info", *words], env={"MLX_DGEMMA_MODEL": None, **variables})
        assert done.exit_code == 1
        return done.stderr

    assert asked().startswith(f'Error: {tmp_path}/"of\\config" \U0001f986 does not exist')
    assert asked(MLX_DGEMMA_MODEL="/of/variable").startswith("Error: /of/variable does not exist")
    assert asked("/of/option", MLX_DGEMMA_MODEL="/of/variable").startswith("Error: /of/option does not exist")
    done = CliRunner().invoke(main, ["generate", "Hi."], env={"MLX_DGEMMA_MODEL": ""})
    assert done.stderr.startswith(f'Error: {tmp_path}/"of\\config"')
