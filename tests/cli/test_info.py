"""`mlx-dgemma info`: the figures of a checkpoint."""

import json

import pytest
from commands import run

from mlx_dgemma import engine, errors
from mlx_dgemma.checkpoint import memory
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.cli import info
from mlx_dgemma.cli.calls import answers
from mlx_dgemma.model import device


def test_info_tells_what_loading_would_do(monkeypatch):
    seen = []
    need = memory.need

    def recorded(*arguments):
        seen.append(need(*arguments))
        return seen[-1]

    monkeypatch.setattr(memory, "need", recorded)
    engine.load(DEMO)
    told = json.loads(run("info", DEMO, "--json").stdout)
    assert told["memory"]["total"] == seen[-1].total == seen[0].total
    assert told["memory"]["context"] == 4096
    assert told["parameters"]["total"] == 6_717_772
    assert told["bits_per_weight"] == pytest.approx(16, abs=0.01)
    named = ["3bit", "4bit", "6bit", "8bit", "mxfp4", "mxfp8", "nvfp4", "mac-16gb", "mac-24gb", "mac-36gb"]
    assert list(told["recipes"]) == named
    assert told["best_recipe"] == "8bit"


def test_convert_then_info(tmp_path, monkeypatch):
    small = tmp_path / "small"
    done = run("convert", DEMO, "-q", "--mlx-path", small)
    assert done.exit_code == 0, done.stderr
    seen = []
    check = memory.check
    monkeypatch.setattr(memory, "check", lambda held, need, sizes: seen.append(need) or check(held, need, sizes))
    engine.load(small)
    told = json.loads(run("info", small, "--json").stdout)
    assert told["memory"]["total"] == seen[0].total
    assert told["quantization"]["bits"] == 4 and told["recipes"] is None
    assert told["bits_per_weight"] < 10


def test_info_for_people():
    done = run("info", "--context", 1024)
    assert done.stderr == answers.DEMO_NOTICE + "\n"
    lines = done.stdout.splitlines()
    assert lines[0] == f"model         {DEMO}"
    assert "layers        6: 5 sliding (window 96), 1 full" in lines
    assert "experts       8, 2 a token" in lines
    assert "sampler       max-denoising-steps 48, entropy-bound 0.1, t-min 0.4, t-max 0.8" in lines
    assert [line.split()[0] for line in lines if line.endswith(" fits")][:2] == ["1024", "4096"]


def test_info_counts_a_quantized_prefix():
    plain, small = (info.describe(Checkpoint.open(DEMO), 4096, kv_bits=bits) for bits in (None, 4))
    saved = plain["memory"]["prefix"] - small["memory"]["prefix"]
    assert 0 < saved == plain["memory"]["total"] - small["memory"]["total"]
    assert small["memory"]["by_context"]["4096"] == small["memory"]["total"]
    assert any(f"prefix {errors.human(small['memory']['prefix'])} in 4 bits" in line for line in info.lines(small))


def test_info_says_when_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(device, "available", lambda: 10_000_000)
    about = info.describe(Checkpoint.open(DEMO))
    assert not about["memory"]["fits"]
    missing = errors.human(about["memory"]["total"] - 10_000_000)
    assert f"{'':14}does not fit: {missing} are missing" in info.lines(about)


def test_info_proposes_the_largest_recipe_that_fits(monkeypatch):
    checkpoint = Checkpoint.open(DEMO)
    sizes = {name: one["total"] for name, one in info.describe(checkpoint)["recipes"].items()}
    monkeypatch.setattr(device, "available", lambda: sizes["4bit"])
    assert f"{'best fit':14}4bit" in info.lines(info.describe(checkpoint))
    monkeypatch.setattr(device, "available", lambda: min(sizes.values()) - 1)
    assert info.lines(info.describe(checkpoint))[-1].startswith("best fit      none; `convert --target-size SIZE`")


def test_info_advises_for_the_machine(monkeypatch):
    assert "advice" not in run("info", DEMO).stdout
    monkeypatch.setattr(device, "lacks_bfloat16", lambda: True)
    for version, warned in (("26.0", True), ("26.1.2", True), ("26.2", False), ("26.10", False), ("15.6", False)):
        monkeypatch.setattr(info.platform, "mac_ver", lambda version=version: (version, ("", "", ""), "arm64"))
        lines = [line for line in run("info", DEMO).stdout.splitlines() if line.startswith("advice")]
        assert "--compute-dtype float16" in lines[0] and "check --ranges" in lines[0]
        assert len(lines) == 1 + warned
        assert not warned or (f"macOS {version}," in lines[1] and lines[1].endswith("update macOS"))
    told = json.loads(run("info", DEMO, "--json").stdout)["machine"]
    assert told["lacks_bfloat16"] is True and told["macos"] == "15.6"
