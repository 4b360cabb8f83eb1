"""`mlx-dgemma serve` as a launchd agent, which runs while its user is logged in on a Mac.

The property list and the commands follow launchd.plist(5) and launchctl(1). The tests check both without launchd.

A server that ends by itself is started on demand: launchd holds its sockets, and starts it when someone connects.
Others start at login, and again after a crash.
"""

from __future__ import annotations

import math
import os
import platform
import plistlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..errors import CircumstanceError, DgemmaError, OptionError
from ..files import atomic_file
from ..serving.rendezvous import FOLDER, make_folder

LABEL = "org.mlx-dgemma.serve"
KEY = "MLX_DGEMMA_API_KEY"
NAMES = ("model", "adapter")  # parameters that take a folder or a Hub id
LEFT_OUT = ("install", "uninstall", "status", "logs", "agent", "log_file", "api_key")
INHERITED = ("HF_HOME", "HF_HUB_CACHE", FOLDER)  # folders; launchd passes on no variables of the shell
THROTTLE_SECONDS = 60  # between two starts, so that a failing server does not reload its weights all the time
EXIT_MARGIN = 15  # seconds that launchd waits beyond those that running answers get; its default is 20 in all
STOP_SECONDS = 5  # to wait for an agent to end, beyond its ExitTimeOut
LOG_LINES = 200  # that --logs shows

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Agent:
    """What an agent runs.

    Attributes:
        arguments: of `mlx-dgemma serve`, valid in any folder; see `arguments_of`.
        api_key: the key that clients must send. It is written to a file that only this user can read.
        stop_seconds: that running answers get when the server stops.
        socket: path of the Unix socket at which the agent is started on demand; None: it starts at login.
        address: host and port at which it is started on demand, too; None: it has none.
    """

    arguments: Sequence[str]
    api_key: str | None = None
    stop_seconds: float = 10.0
    socket: str | None = None
    address: tuple[str, int] | None = None


def install(agent: Agent, home: Path | None = None, run: Run = subprocess.run) -> Path:
    """Install an agent, which starts now and at every login, or on demand. An existing agent is replaced.

    Args:
        agent: what it runs.
        home: the user's home folder.
        run: replacement for `subprocess.run`.

    Returns:
        The agent's property list, ~/Library/LaunchAgents/org.mlx-dgemma.serve.plist.

    Raises:
        OptionError: this is not macOS.
        DgemmaError: launchd refused to start the agent.
    """
    home, path = _find(home)
    content = plistlib.dumps(plist(agent, home, os.environ))
    log_folder(home).mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if agent.socket:
        make_folder()
    with atomic_file(path, mode=0o600) as draft:  # it may hold the API key
        draft.write_bytes(content)
    _stop(run, agent.stop_seconds)
    done = _launchctl(run, "bootstrap", _domain(), str(path))
    if done.returncode:
        raise DgemmaError(
            f"launchctl could not start {path} ({_reason(done)}); "
            "mend that and install again, or take the agent away with --uninstall."
        )
    return path


def uninstall(home: Path | None = None, run: Run = subprocess.run) -> Path:
    """Stop the agent and remove its property list. The logs are kept.

    Returns:
        The path of the removed file.

    Raises:
        OptionError: this is not macOS, or there is no agent.
        DgemmaError: the agent does not stop.
    """
    _, path = _find(home)
    stop_seconds = plistlib.loads(path.read_bytes()).get("ExitTimeOut", 0) if path.exists() else 0
    if not _stop(run, stop_seconds) and not path.exists():
        raise CircumstanceError(f"There is no agent at {path}; --install makes one.")
    path.unlink(missing_ok=True)
    return path


def status(home: Path | None = None, run: Run = subprocess.run) -> str:
    """A line that tells whether there is an agent, and whether it runs.

    Raises:
        OptionError: this is not macOS.
    """
    _, path = _find(home)
    done = _launchctl(run, "list", LABEL)
    if done.returncode:
        return f"agent: {path} is not loaded" if path.exists() else "agent: not installed"
    if pid := re.search(r'"PID" = (\d+);', done.stdout):
        return f"agent: runs (process {pid[1]})"
    code = re.search(r'"LastExitStatus" = (\d+);', done.stdout)
    last = f" (last exit code {os.waitstatus_to_exitcode(int(code[1]))})" if code else ""
    return f"agent: waits to be asked{last}"


def logs(home: Path | None = None) -> str:
    """The last lines of the agent's logs, each file under its path.

    Raises:
        OptionError: this is not macOS, or there are none.
    """
    home, _ = _find(home)
    found = [path for path in (_log_of_launchd(home), log_file(home)) if path.exists()]
    if not found:
        raise CircumstanceError(
            f"There are no logs in {log_folder(home)}; `mlx-dgemma serve --install` starts an agent."
        )
    texts = [path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:] for path in found]
    return "".join(f"{path}:\n" + "".join(f"{line}\n" for line in lines) for path, lines in zip(found, texts))


def plist(agent: Agent, home: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """The agent's property list.

    Args:
        agent: what it runs.
        home: the user's home folder.
        environment: environment variables, of which the agent gets those in `INHERITED`.
    """
    variables = {name: _absolute(environment[name]) for name in INHERITED if environment.get(name)}
    if agent.api_key:
        variables[KEY] = agent.api_key
    start = [sys.executable, "-m", "mlx_dgemma", "serve", *agent.arguments, "--log-file", str(log_file(home))]
    content: dict[str, Any] = {
        "Label": LABEL,
        "ProgramArguments": [*start, "--agent", "demand" if agent.socket else "login"],
        "RunAtLoad": not agent.socket,
        "ProcessType": "Interactive",  # otherwise launchd limits CPU and I/O
        "ExitTimeOut": math.ceil(agent.stop_seconds) + EXIT_MARGIN,
        "StandardOutPath": str(_log_of_launchd(home)),
        "StandardErrorPath": str(_log_of_launchd(home)),
    }
    if agent.socket:  # KeepAlive would start it at login: it implies RunAtLoad
        content["Sockets"] = {"local": {"SockPathName": agent.socket, "SockPathMode": 0o600}}
        if agent.address:
            host, port = agent.address
            family = "IPv6" if ":" in host else "IPv4"
            content["Sockets"]["http"] = {"SockNodeName": host, "SockServiceName": str(port), "SockFamily": family}
    else:
        content["KeepAlive"] = {"SuccessfulExit": False}  # restart after a crash, but not after a regular stop
        content["ThrottleInterval"] = THROTTLE_SECONDS
    return {**content, "EnvironmentVariables": variables} if variables else content


def arguments_of(ctx: click.Context, only: Sequence[str] = ()) -> list[str]:
    """The options that a command was given, on its command line or in the environment, valid in any folder.

    With `only`, of these names.

    Raises:
        OptionError: a model or an adapter that is neither a folder nor a Hub id.
    """
    found: list[str] = []
    for param in ctx.command.params:
        source = ctx.get_parameter_source(param.name or "")
        is_default = source in (click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)
        if param.name is None or param.name in LEFT_OUT or source is None or is_default:
            continue
        if only and param.name not in only:
            continue
        flag, value = max(param.opts, key=len), ctx.params[param.name]
        if isinstance(value, bool):
            found += [flag] if value else []
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if param.name in NAMES:
                found += [flag, _absolute_model(flag, str(one))]
            else:
                found += [flag, _absolute(str(one)) if isinstance(param.type, click.Path) else str(one)]
    return found


def _absolute_model(flag: str, name: str) -> str:
    """A folder as an absolute path; a Hub id unchanged."""
    path = _absolute(name)
    if os.path.exists(path):
        return path
    if name.count("/") == 1 and not name.startswith((".", "~", "/")):
        return name
    raise OptionError(f"{flag} is {name}, but {path} does not exist; give a folder or a Hub id.")


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _find(home: Path | None) -> tuple[Path, Path]:
    """The user's home folder and the path of the agent's property list."""
    if platform.system() != "Darwin":
        raise CircumstanceError(
            f"launchd is macOS's, and this is {platform.system()}; have `mlx-dgemma serve` started by its own services."
        )
    home = home or Path.home()
    return home, home / "Library" / "LaunchAgents" / f"{LABEL}.plist"


def log_folder(home: Path) -> Path:
    """Where the agent's logs are."""
    return home / "Library" / "Logs" / "mlx-dgemma"


def log_file(home: Path) -> Path:
    """The server's log, which it rotates itself: launchd does not, and newsyslog asks for an administrator."""
    return log_folder(home) / "serve.log"


def _log_of_launchd(home: Path) -> Path:
    """What the process writes to its standard streams: how it starts, and why it fails."""
    return log_folder(home) / "launchd.log"


def _stop(run: Run, seconds: float) -> bool:
    """Stop the agent and wait until it has ended. Returns whether there was one."""
    service = f"{_domain()}/{LABEL}"
    if _launchctl(run, "print", service).returncode:
        return False
    done = _launchctl(run, "bootout", service)
    for _ in range(math.ceil(seconds + EXIT_MARGIN + STOP_SECONDS) * 5):
        if _launchctl(run, "print", service).returncode:
            return True
        time.sleep(0.2)
    raise DgemmaError(f"The agent {service} does not end ({_reason(done)}); try again.")


def _domain() -> str:
    return f"gui/{os.getuid()}"


def _launchctl(run: Run, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(["/bin/launchctl", *arguments], capture_output=True, text=True)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr or "").strip().rstrip(".") or f"exit code {done.returncode}"
