"""Adapters loaded with a checkpoint, from Python and by the commands."""

import json

import mlx.core as mx
import numpy as np
import pytest
from adapter_models import (
    EXPERTS,
    Q,
    changed,
    gaps,
    logits,
    save_denoising_dora,
    save_lora,
)
from click.testing import CliRunner
from support import refusal

import mlx_dgemma
from mlx_dgemma.adapters import deltas as adapters
from mlx_dgemma.adapters import peft
from mlx_dgemma.checkpoint import memory
from mlx_dgemma.cli import main
from mlx_dgemma.convert import convert
from mlx_dgemma.errors import CheckpointError, OptionError
from mlx_dgemma.model.device import on_cpu

PROMPT = "Write JSON for: Anna is 31 years old and lives in Oslo."


@pytest.fixture(autouse=True)
def no_model_named(monkeypatch):
    monkeypatch.delenv("MLX_DGEMMA_MODEL", raising=False)


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


def test_an_adapter_is_loaded_with_a_checkpoint(demo, adapter, apart):
    plain = mlx_dgemma.load(demo)
    assert plain.adapter is None
    engine, other = mlx_dgemma.load(demo, adapter=adapter), mlx_dgemma.load(demo, adapter=str(apart))
    assert (engine.adapter, other.adapter) == (adapter, apart)
    changes = peft.read(adapter, plain.checkpoint.shapes)
    assert engine.notes[-1] == f"The adapter {adapter} changes {len(changes.changes)} modules, both modes alike."
    assert other.notes[-1].endswith(" modules, encoder and decoder differently.")
    assert max(gaps(logits(engine.model), logits(changed(plain.model, changes.changes)))) < 1e-3
    if on_cpu():  # the base keeps its layout
        for path, kind in ((Q, 2), (EXPERTS, 3)):
            base = adapters._module(engine.model, path).linear.weight
            strides = np.asarray(base).strides
            assert (base.dtype, base.ndim, strides[-2]) == (mx.float32, kind, 4)


def test_a_lora_works_with_products_in_float16_and_a_dora_is_refused(demo, adapter, apart):
    exact, half = (mlx_dgemma.load(demo, "float32", adapter=adapter, compute_dtype=one) for one in (None, "float16"))
    assert half.model.compute_dtype == mx.float16
    assert adapters._module(half.model, Q).linear.compute_dtype == mx.float16
    assert 0 < max(gaps(logits(exact.model), logits(half.model))) < 0.2
    assert refusal(OptionError, mlx_dgemma.load, demo, adapter=apart, compute_dtype="float16") == (
        f"{apart} is a DoRA, whose products follow the dtype of activations; "
        "leave out --compute-dtype (compute_dtype), or fuse it into the checkpoint first."
    )


def test_an_adapter_counts_as_memory(demo, adapter, monkeypatch):
    needed = []
    monkeypatch.setattr(memory, "check", lambda _, need, sizes: needed.append(need.weights))
    engine = mlx_dgemma.load(demo, adapter=adapter)
    mlx_dgemma.load(demo)
    assert needed[0] - needed[1] == peft.read(adapter, engine.checkpoint.shapes).nbytes > 10**5


def test_an_adapter_is_looked_for_on_this_machine_before_the_hub(adapter, demo, tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    asked, answers = [], {True: LocalEntryNotFoundError("not here"), False: str(adapter)}

    def snapshot(repo, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        assert (repo, allow_patterns) == ("some/adapter", ["adapter_config.json", "adapter_model.safetensors"])
        if isinstance(answers[local_files_only], Exception):
            raise answers[local_files_only]
        return answers[local_files_only]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert mlx_dgemma.load(demo, adapter="some/adapter").adapter == adapter
    assert asked == [True, False]
    answers[True] = str(tmp_path)  # an interrupted download
    assert peft.find("some/adapter") == adapter
    answers[True] = str(adapter)
    assert peft.find("some/adapter") == adapter
    assert asked == [True, False] * 2 + [True]
    answers.update(
        {True: LocalEntryNotFoundError("no"), False: RepositoryNotFoundError.__new__(RepositoryNotFoundError)}
    )
    assert refusal(CheckpointError, peft.find, "some/adapter") == (
        "some/adapter is neither a folder here nor a repository on the Hub; check the name, or log in if it is private."
    )
    for name in ("./none", "none", "/nowhere/at/all", "a/b/c"):
        assert refusal(CheckpointError, mlx_dgemma.load, demo, adapter=name) == (
            f"{name} does not exist; give an adapter's folder or its Hub id."
        )
    assert refusal(CheckpointError, mlx_dgemma.load, demo, adapter=demo) == (
        f"{demo} has no adapter_config.json; give a folder that contains a PEFT adapter."
    )


# The commands.


def run(*arguments, data=None):
    return CliRunner().invoke(main.main, [str(one) for one in arguments], input=data, prog_name="mlx-dgemma")


def test_an_adapter_changes_an_answer_and_the_fused_checkpoint_gives_the_same(float32, adapter, tmp_path):
    ask = ("generate", PROMPT, "--seed", 1, "--max-denoising-steps", 4)
    plain, other = run(*ask, "-m", float32), run(*ask, "-m", float32, "--adapter", adapter)
    assert plain.stdout == '{"name": "Anna", "age": 31, "city": "Oslo"}\n'
    assert other.exit_code == 0
    assert other.stdout != plain.stdout
    done = run("fuse", "--adapter", adapter, "--model", float32, tmp_path / "out")
    first, second = done.stdout.splitlines()
    assert (done.exit_code, done.stderr) == (0, "")
    assert first == f"{float32} with {adapter} -> {tmp_path / 'out'}"
    assert second.startswith("62 changed weights, ")
    assert run(*ask, "-m", tmp_path / "out").stdout == other.stdout


def test_a_warning_counts_weights_that_are_quantized_again(demo, adapter, tmp_path):
    convert(demo, tmp_path / "packed", "8bit")
    done = run("fuse", "--adapter", adapter, "--model", tmp_path / "packed", tmp_path / "out")
    assert done.stderr == "Packed again, which rounds: 62 changed weights; --dequantize leaves them unpacked.\n"
    done = run("fuse", "--adapter", adapter, "--model", tmp_path / "packed", tmp_path / "plain", "--dequantize")
    assert (done.exit_code, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "x"),
        ("chat",),
        ("infill", "-"),
        ("edit", "x", "-"),
        ("choose", "x", "a", "b"),
        ("serve", "--port", 0),
    ],
)
def test_every_command_that_answers_takes_an_adapter(command):
    done = run(*command, "--adapter", "./none", data="a <HOLE> b")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == ("Error: ./none does not exist; give an adapter's folder or its Hub id.")


def test_evaluate_and_fuse_take_an_adapter(tmp_path):
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"prompt": "Say a.", "completion": "a"}) + "\n")
    for command in (("evaluate", data), ("fuse", tmp_path / "out")):
        done = run(*command, "--adapter", "./none")
        assert done.stderr.splitlines()[-1] == "Error: ./none does not exist; give an adapter's folder or its Hub id."


def test_a_server_prints_its_adapter(adapter, monkeypatch):
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    done = run("serve", "--port", 0, "--adapter", adapter)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Listening on http://127.0.0.1:")
    assert line.endswith(f"/v1 with the adapter {adapter}; Ctrl-C stops it.")
