"""The launchd agent: its property list and launchctl's commands, with a stand-in for launchd."""

import ctypes
import os
import plistlib
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from support import refusal

from mlx_dgemma.cli import launchd
from mlx_dgemma.cli.activation import activated
from mlx_dgemma.cli.launchd import Agent
from mlx_dgemma.errors import DgemmaError, OptionError

DOMAIN = f"gui/{os.getuid()}"
SERVICE = f"{DOMAIN}/org.mlx-dgemma.serve"


class Launchd:
    """Answers launchctl as a Mac does; an agent takes `ending` looks to be gone."""

    def __init__(self, loaded=False, ending=0, refuses="", listed=""):
        self.loaded, self.ending, self.refuses, self.listed, self.commands = loaded, ending, refuses, listed, []

    def __call__(self, command, **how):
        assert how == {"capture_output": True, "text": True}
        program, verb, *_ = command
        assert program == "/bin/launchctl"
        self.commands.append(command[1:])
        if verb == "list":
            return self._done(0 if self.loaded else 113, out=self.listed)
        if verb == "print":
            there, self.ending = self.loaded or self.ending > 0, self.ending - (not self.loaded)
            return self._done(0 if there else 113)
        if verb == "bootstrap" and self.refuses:
            return self._done(5, self.refuses)
        self.loaded = verb == "bootstrap"
        return self._done(0)

    @staticmethod
    def _done(code, error="", out=""):
        return subprocess.CompletedProcess([], code, out, error)


@pytest.fixture(autouse=True)
def mac(monkeypatch):
    monkeypatch.setattr(launchd.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(launchd.time, "sleep", lambda seconds: None)
    for name in ("HF_HOME", "HF_HUB_CACHE", launchd.KEY):
        monkeypatch.delenv(name, raising=False)


def read(path):
    return plistlib.loads(path.read_bytes())


@pytest.fixture
def asked(monkeypatch):
    """The agents that `serve --install` would install."""
    found = []
    monkeypatch.setattr(launchd, "install", lambda agent: found.append(agent) or "the agent")
    return found


def test_install_writes_the_whole_agent_and_starts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/Volumes/models")
    monkeypatch.setenv("SECRET_OF_ANOTHER", "x")
    fake = Launchd()
    path = launchd.install(Agent(["--port", "8111"], "key of mine", 30.5), tmp_path, fake)
    assert path == tmp_path / "Library/LaunchAgents/org.mlx-dgemma.serve.plist"
    logs = str(tmp_path / "Library/Logs/mlx-dgemma")
    start = [sys.executable, "-m", "mlx_dgemma", "serve", "--port", "8111", "--log-file", f"{logs}/serve.log"]
    assert read(path) == {
        "Label": "org.mlx-dgemma.serve",
        "ProgramArguments": [*start, "--agent", "login"],
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 60,
        "ProcessType": "Interactive",
        "ExitTimeOut": 46,
        "StandardOutPath": f"{logs}/launchd.log",
        "StandardErrorPath": f"{logs}/launchd.log",
        "EnvironmentVariables": {
            "HF_HOME": "/Volumes/models",
            "MLX_DGEMMA_API_KEY": "key of mine",
            "MLX_DGEMMA_RUNTIME_DIR": os.environ["MLX_DGEMMA_RUNTIME_DIR"],
        },
    }
    assert fake.commands == [["print", SERVICE], ["bootstrap", DOMAIN, str(path)]]
    assert path.stat().st_mode & 0o777 == 0o600
    assert Path(logs).stat().st_mode & 0o777 == 0o700
    assert os.listdir(path.parent) == [path.name]  # no draft is left


def test_an_agent_on_demand_has_its_sockets_from_launchd(tmp_path, sockets):
    agent = Agent(["--idle-exit", "900.0"], socket=f"{sockets}/a.sock", address=("127.0.0.1", 8080))
    found = read(launchd.install(agent, tmp_path, Launchd()))
    assert found["Sockets"] == {
        "local": {"SockPathName": f"{sockets}/a.sock", "SockPathMode": 0o600},
        "http": {"SockNodeName": "127.0.0.1", "SockServiceName": "8080", "SockFamily": "IPv4"},
    }
    assert found["ProgramArguments"][-2:] == ["--agent", "demand"]
    assert found["RunAtLoad"] is False and "KeepAlive" not in found  # which would start it at login
    assert sockets.stat().st_mode & 0o777 == 0o700
    only = launchd.plist(Agent([], socket="/a.sock"), tmp_path, {})
    assert list(only["Sockets"]) == ["local"] and "EnvironmentVariables" not in only


def test_an_agent_that_is_there_ends_before_the_new_one_starts(tmp_path):
    path = launchd.install(Agent([], "old key"), tmp_path, Launchd())
    path.chmod(0o644)
    fake = Launchd(loaded=True, ending=2)
    assert launchd.install(Agent(["--port", "1"]), tmp_path, fake) == path
    looks = [["print", SERVICE]] * 3
    assert fake.commands == [
        ["print", SERVICE],
        ["bootout", SERVICE],
        *looks,
        ["bootstrap", DOMAIN, str(path)],
    ]
    assert path.stat().st_mode & 0o777 == 0o600
    assert "MLX_DGEMMA_API_KEY" not in read(path)["EnvironmentVariables"]  # the old key is gone


def test_the_arguments_are_the_commands_own_in_any_folder(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "models" / "4bit").mkdir(parents=True)
    (tmp_path / "home" / "lora").mkdir(parents=True)
    here = str(tmp_path)

    def lasting(*arguments):
        done = run("serve", "--install", *arguments)
        assert done.exit_code == 0, done.stderr
        return asked[-1].arguments

    assert lasting() == []
    assert lasting("--model", "models/4bit") == ["--model", f"{here}/models/4bit"]
    assert lasting("-mmodels/4bit", "--adapter=~/lora") == [
        "--model", f"{here}/models/4bit", "--adapter", f"{here}/home/lora"
    ]  # fmt: skip
    assert lasting("-m", "google/diffusiongemma") == ["--model", "google/diffusiongemma"]  # a Hub id
    assert lasting("--cache-dir", "kept", "--port=1", "--alias", "a", "--alias=b", "--ignore-memory") == [
        "--ignore-memory", "--port", "1", "--alias", "a", "--alias", "b", "--cache-dir", f"{here}/kept"
    ]  # fmt: skip
    assert lasting("--api-key", "s3cret", "--host", "0.0.0.0") == ["--host", "0.0.0.0"]
    assert asked[-1].api_key == "s3cret" and asked[-1].socket is None
    monkeypatch.setenv("MLX_DGEMMA_MODEL", "models/4bit")
    assert lasting("--idle-exit", "15m", "--shutdown-seconds", "30") == [
        "--model", f"{here}/models/4bit", "--shutdown-seconds", "30.0", "--idle-exit", "900.0"
    ]  # fmt: skip
    assert (asked[-1].address, asked[-1].stop_seconds) == (("127.0.0.1", 8080), 30)
    assert asked[-1].socket.endswith(".sock")
    monkeypatch.setenv("MLX_DGEMMA_MODEL", "4bit")
    done = run("serve", "--install")
    said = f"Error: --model is 4bit, but {here}/4bit does not exist; give a folder or a Hub id.\n"
    assert (done.exit_code, done.stderr.partition("\n\n")[2]) == (2, said)


def test_two_things_at_once_are_refused():
    done = run("serve", "--install", "--logs")
    assert done.exit_code == 2 and "--install and --logs are two things to do; give one." in done.stderr


def test_uninstall_ends_the_agent_and_removes_its_file(tmp_path):
    fake = Launchd()
    path = launchd.install(Agent([]), tmp_path, fake)
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
    assert refusal(DgemmaError, launchd.install, Agent([]), tmp_path, fake) == (
        f"launchctl could not start {path} (Bootstrap failed: 5: Input/output error); "
        "mend that and install again, or take the agent away with --uninstall."
    )
    assert launchd.status(tmp_path, fake) == f"agent: {path} is not loaded"
    assert launchd.uninstall(tmp_path, fake) == path
    stubborn = Launchd(loaded=True, ending=10**6)
    assert refusal(DgemmaError, launchd.uninstall, tmp_path, stubborn) == (
        f"The agent {SERVICE} does not end (exit code 0); try again."
    )


def test_status_and_logs(tmp_path):
    assert launchd.status(tmp_path, Launchd()) == "agent: not installed"
    runs = Launchd(loaded=True, listed='{\n\t"LastExitStatus" = 0;\n\t"PID" = 812;\n};')
    assert launchd.status(tmp_path, runs) == "agent: runs (process 812)"
    failed = Launchd(loaded=True, listed='{\n\t"LastExitStatus" = 256;\n};')
    assert launchd.status(tmp_path, failed) == "agent: waits to be asked (last exit code 1)"
    folder = tmp_path / "Library/Logs/mlx-dgemma"
    said = f"There are no logs in {folder}; `mlx-dgemma serve --install` starts an agent."
    assert refusal(OptionError, launchd.logs, tmp_path) == said
    folder.mkdir(parents=True)
    (folder / "serve.log").write_text("".join(f"line {i}\n" for i in range(500)))
    (folder / "launchd.log").write_text("Listening")
    shown = launchd.logs(tmp_path).splitlines()
    assert shown[:4] == [f"{folder}/launchd.log:", "Listening", f"{folder}/serve.log:", "line 300"]
    assert shown[-1] == "line 499"


def test_elsewhere_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(launchd.platform, "system", lambda: "Linux")
    said = "launchd is macOS's, and this is Linux; have `mlx-dgemma serve` started by its own services."
    assert refusal(OptionError, launchd.install, Agent([]), tmp_path, Launchd()) == said
    assert refusal(OptionError, launchd.uninstall, tmp_path, Launchd()) == said
    assert not any(tmp_path.iterdir())


STAND_IN = """
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int freed = 0;
int launch_activate_socket(const char *name, int **fds, size_t *cnt) {
    if (strcmp(name, "local") && strcmp(name, "late")) return ENOENT;
    if (!strcmp(name, "late")) return EALREADY;
    *fds = malloc(2 * sizeof(int));
    (*fds)[0] = dup(%d), (*fds)[1] = dup(%d);
    *cnt = 2;
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_sockets_that_launchd_holds(tmp_path):
    """With a library of the same interface; launchd itself is a Mac's."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        (tmp_path / "a.c").write_text(STAND_IN % (tcp.fileno(), unix.fileno()))
        subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "a.so", tmp_path / "a.c"], check=True)
        library = ctypes.CDLL(str(tmp_path / "a.so"))
        found = activated("local", library)
        assert [one.family for one in found] == [socket.AF_INET, socket.AF_UNIX]
        assert found[0].getsockname() == tcp.getsockname() and not found[0].get_inheritable()
        for one in found:
            one.close()
        assert activated("http", library) == []
        said = "launchd gives no socket late (Operation already in progress); install the agent again."
        assert refusal(DgemmaError, activated, "late", library) == said


def test_without_launchd_there_are_no_sockets():
    if sys.platform != "darwin":
        with pytest.raises(DgemmaError, match=r"start the server without --agent\.$"):
            activated("local")
