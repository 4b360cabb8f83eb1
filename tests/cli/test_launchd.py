"""The launchd agent: its property list and launchctl's commands, with a stand-in for launchd."""

import os
import plistlib
import subprocess
import sys
from pathlib import Path

import pytest
from support import refusal

from mlx_dgemma.cli import launchd
from mlx_dgemma.errors import DgemmaError, OptionError

DOMAIN = f"gui/{os.getuid()}"
SERVICE = f"{DOMAIN}/org.mlx-dgemma.serve"


class Launchd:
    """Answers launchctl as a Mac does; an agent takes `ending` looks to be gone."""

    def __init__(self, loaded=False, ending=0, refuses=""):
        self.loaded, self.ending, self.refuses, self.commands = loaded, ending, refuses, []

    def __call__(self, command, **how):
        assert how == {"capture_output": True, "text": True}
        program, verb, *_ = command
        assert program == "/bin/launchctl"
        self.commands.append(command[1:])
        if verb == "print":
            there, self.ending = self.loaded or self.ending > 0, self.ending - (not self.loaded)
            return self._done(0 if there else 113)
        if verb == "bootstrap" and self.refuses:
            return self._done(5, self.refuses)
        self.loaded = verb == "bootstrap"
        return self._done(0)

    @staticmethod
    def _done(code, error=""):
        return subprocess.CompletedProcess([], code, "", error)


@pytest.fixture(autouse=True)
def mac(monkeypatch):
    monkeypatch.setattr(launchd.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(launchd.time, "sleep", lambda seconds: None)
    for name in (*launchd.INHERITED, launchd.KEY):
        monkeypatch.delenv(name, raising=False)


def read(path):
    return plistlib.loads(path.read_bytes())


def test_install_writes_the_whole_agent_and_starts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/Volumes/models")
    monkeypatch.setenv("SECRET_OF_ANOTHER", "x")
    fake = Launchd()
    path = launchd.install(["--port", "8111", "--install"], "key of mine", tmp_path, fake)
    assert path == tmp_path / "Library/LaunchAgents/org.mlx-dgemma.serve.plist"
    log = str(tmp_path / "Library/Logs/mlx-dgemma/serve.log")
    assert read(path) == {
        "Label": "org.mlx-dgemma.serve",
        "ProgramArguments": [sys.executable, "-m", "mlx_dgemma", "serve", "--port", "8111"],
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 60,
        "ProcessType": "Interactive",
        "StandardOutPath": log,
        "StandardErrorPath": log,
        "EnvironmentVariables": {"HF_HOME": "/Volumes/models", "MLX_DGEMMA_API_KEY": "key of mine"},
    }
    assert fake.commands == [["print", SERVICE], ["bootstrap", DOMAIN, str(path)]]
    assert path.stat().st_mode & 0o777 == 0o600
    assert Path(log).parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(path.parent) == [path.name]  # no draft is left


def test_an_agent_that_is_there_ends_before_the_new_one_starts(tmp_path):
    path = launchd.install([], "old key", tmp_path, Launchd())
    path.chmod(0o644)
    fake = Launchd(loaded=True, ending=2)
    assert launchd.install(["--port", "1"], None, tmp_path, fake) == path
    looks = [["print", SERVICE]] * 3
    assert fake.commands == [
        ["print", SERVICE],
        ["bootout", SERVICE],
        *looks,
        ["bootstrap", DOMAIN, str(path)],
    ]
    assert path.stat().st_mode & 0o777 == 0o600
    assert "EnvironmentVariables" not in read(path)  # the old key is gone


def test_the_key_stands_in_the_environment_alone(tmp_path):
    for given in (["--api-key", "s3cret"], ["--api-key=s3cret"]):
        found = launchd.plist([*given, "--host", "0.0.0.0"], "s3cret", tmp_path, {})
        assert found["ProgramArguments"][4:] == ["--host", "0.0.0.0"]
        assert found["EnvironmentVariables"] == {"MLX_DGEMMA_API_KEY": "s3cret"}


def test_paths_mean_the_same_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/Users/a")
    (tmp_path / "models" / "4bit").mkdir(parents=True)

    def lasting(*arguments):
        return launchd.plist(arguments, None, tmp_path, {})["ProgramArguments"][4:]

    here = str(tmp_path)
    assert lasting("--model", "models/4bit") == ["--model", f"{here}/models/4bit"]
    assert lasting("--model=./later") == [f"--model={here}/later"]
    assert lasting("-m", "later") == ["-m", f"{here}/later"]
    assert lasting("-mmodels/4bit") == ["-m", f"{here}/models/4bit"]
    assert lasting("--model=~/4bit") == ["--model=/Users/a/4bit"]
    assert lasting("--model", "google/diffusiongemma") == ["--model", "google/diffusiongemma"]  # a Hub id
    assert lasting("--adapter", "some/adapter", "--adapter=./a") == ["--adapter", "some/adapter", f"--adapter={here}/a"]
    assert lasting("--cache-dir", "kept", "--port=1") == ["--cache-dir", f"{here}/kept", "--port=1"]
    assert lasting("--cache-dir=a/b") == [f"--cache-dir={here}/a/b"]
    given = {"MLX_DGEMMA_MODEL": "models/4bit", "HF_HOME": "hub", "HF_HUB_CACHE": "", "PATH": "/bin"}
    assert launchd.plist([], None, tmp_path, given)["EnvironmentVariables"] == {
        "MLX_DGEMMA_MODEL": f"{here}/models/4bit",
        "HF_HOME": f"{here}/hub",
    }


def test_uninstall_ends_the_agent_and_removes_its_file(tmp_path):
    fake = Launchd()
    path = launchd.install([], None, tmp_path, fake)
    fake.commands.clear()
    assert launchd.uninstall(tmp_path, fake) == path
    assert fake.commands == [["print", SERVICE], ["bootout", SERVICE], ["print", SERVICE]]
    assert not path.exists()
    assert refusal(OptionError, launchd.uninstall, tmp_path, fake) == (
        f"There is no agent at {path}; --install makes one."
    )


def test_what_launchd_refuses_is_told(tmp_path):
    fake = Launchd(refuses="Bootstrap failed: 5: Input/output error\n")
    path = tmp_path / "Library/LaunchAgents/org.mlx-dgemma.serve.plist"
    assert refusal(DgemmaError, launchd.install, [], None, tmp_path, fake) == (
        f"launchctl could not start {path} (Bootstrap failed: 5: Input/output error); "
        "mend that and install again, or take the agent away with --uninstall."
    )
    assert launchd.uninstall(tmp_path, fake) == path
    stubborn = Launchd(loaded=True, ending=10**6)
    assert refusal(DgemmaError, launchd.uninstall, tmp_path, stubborn) == (
        f"The agent {SERVICE} does not end (exit code 0); try again."
    )


def test_elsewhere_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(launchd.platform, "system", lambda: "Linux")
    said = "launchd is macOS's, and this is Linux; have `mlx-dgemma serve` started by its own services."
    assert refusal(OptionError, launchd.install, [], None, tmp_path, Launchd()) == said
    assert refusal(OptionError, launchd.uninstall, tmp_path, Launchd()) == said
    assert not any(tmp_path.iterdir())
