"""`mlx-dgemma serve` as a launchd agent, which runs while its user is logged in on a Mac.

The property list and the commands follow launchd.plist(5) and launchctl(1). The tests check both without launchd.
"""

from __future__ import annotations

import os
import platform
import plistlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CircumstanceError, DgemmaError
from ..files import atomic_file

LABEL = "org.mlx-dgemma.serve"
KEY, MODEL = "MLX_DGEMMA_API_KEY", "MLX_DGEMMA_MODEL"
MODEL_OPTIONS = ("-m", "--model", "--adapter")  # take a folder or a Hub id
INHERITED = ("HF_HOME", "HF_HUB_CACHE", MODEL)  # launchd passes on no variables of the shell
THROTTLE_SECONDS = 60  # between two starts, so that a failing server does not reload its weights all the time
STOP_SECONDS = 30  # to wait for an agent to end; launchd kills it after 20

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def install(
    arguments: Sequence[str], api_key: str | None = None, home: Path | None = None, run: Run = subprocess.run
) -> Path:
    """Install the agent, which starts now and at every login. An existing agent is replaced.

    Args:
        arguments: the arguments of `mlx-dgemma serve`; --install and --api-key are removed from them.
        api_key: the key that clients must send. It is written to a file that only this user can read.
        home: the user's home folder.
        run: replacement for `subprocess.run`.

    Returns:
        The agent's property list, ~/Library/LaunchAgents/org.mlx-dgemma.serve.plist.

    Raises:
        OptionError: this is not macOS.
        DgemmaError: launchd refused to start the agent.
    """
    home, path = _find(home)
    content = plistlib.dumps(plist(arguments, api_key, home, os.environ))
    _logs(home).mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, mode=0o600) as draft:  # it may hold the API key
        draft.write_bytes(content)
    _stop(run)
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
    if not _stop(run) and not path.exists():
        raise CircumstanceError(f"There is no agent at {path}; --install makes one.")
    path.unlink(missing_ok=True)
    return path


def plist(arguments: Sequence[str], api_key: str | None, home: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """The agent's property list.

    Args:
        arguments, api_key, home: as for `install`; relative paths are relative to the current folder.
        environment: environment variables, of which the agent gets those in `INHERITED`.
    """
    inherited = {name: environment[name] for name in INHERITED if environment.get(name)}
    variables = {name: (_absolute_model if name == MODEL else _absolute)(value) for name, value in inherited.items()}
    if api_key:
        variables[KEY] = api_key
    log = _logs(home) / "serve.log"
    content = {
        "Label": LABEL,
        "ProgramArguments": [sys.executable, "-m", "mlx_dgemma", "serve", *_absolute_arguments(arguments)],
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},  # restart after a crash, but not after a regular stop
        "ThrottleInterval": THROTTLE_SECONDS,
        "ProcessType": "Interactive",  # otherwise launchd limits CPU and I/O
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
    }
    return {**content, "EnvironmentVariables": variables} if variables else content


def _absolute_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments with absolute paths, so that they are valid in any folder, without --install and --api-key."""
    result, remaining = [], iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        short = argument.startswith("-m") and not argument.startswith("--")
        if name == "--install":
            continue
        if name == "--api-key":
            value = value or ("" if equals else next(remaining, ""))
        elif name in (*MODEL_OPTIONS, "--cache-dir") and not equals:
            result += [name, _absolute_value(name, next(remaining, ""))]
        elif short:
            result += ["-m", _absolute_model(argument[2:])]
        else:
            result.append(f"{name}={_absolute_value(name, value)}" if equals else argument)
    return result


def _absolute_value(name: str, value: str) -> str:
    if name in MODEL_OPTIONS:
        return _absolute_model(value)
    return _absolute(value) if name == "--cache-dir" else value


def _absolute_model(name: str) -> str:
    """A folder as an absolute path; a Hub id unchanged."""
    is_id = name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()
    return name if is_id else _absolute(name)


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


def _logs(home: Path) -> Path:
    return home / "Library" / "Logs" / "mlx-dgemma"


def _stop(run: Run) -> bool:
    """Stop the agent and wait until it has ended. Returns whether there was one."""
    service = f"{_domain()}/{LABEL}"
    if _launchctl(run, "print", service).returncode:
        return False
    done = _launchctl(run, "bootout", service)
    for _ in range(STOP_SECONDS * 5):
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
