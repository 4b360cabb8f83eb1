"""`mlx-dgemma serve` as a launchd agent, so that it answers whenever its user is logged in on a Mac.

Nothing here ran on a Mac: the property list and the commands follow launchd.plist(5) and launchctl(1), and the tests
check both without launchd.
"""

from __future__ import annotations

import os
import platform
import plistlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DgemmaError, OptionError

LABEL = "org.mlx-dgemma.serve"
KEY, MODEL = "MLX_DGEMMA_API_KEY", "MLX_DGEMMA_MODEL"
NAMED = ("-m", "--model", "--adapter")  # a folder or a Hub id
INHERITED = ("HF_HOME", "HF_HUB_CACHE", MODEL)  # launchd hands on nothing that a shell has set
THROTTLE = 60  # seconds between two starts: a server that cannot start should not read its weights all day
LEAVE = 30  # seconds to wait for an agent to end; launchd kills it after 20

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def install(
    arguments: Sequence[str], api_key: str | None = None, home: Path | None = None, run: Run = subprocess.run
) -> Path:
    """Write the agent, start it now and at every login; one that is there already is replaced.

    Args:
        arguments: what stood behind `mlx-dgemma serve`; --install and --api-key are left out of them.
        api_key: the key that clients must send; only this user can read the file it is written to.
        home: the user's folder.
        run: as `subprocess.run`.

    Returns:
        The agent's property list, ~/Library/LaunchAgents/org.mlx-dgemma.serve.plist.

    Raises:
        OptionError: this is no Mac.
        DgemmaError: launchd refused, in its own words.
    """
    home, path = _find(home)
    content = plistlib.dumps(plist(arguments, api_key, home, os.environ))
    _logs(home).mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{LABEL}.")  # its mode is 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    _stop(run)
    done = _launchctl(run, "bootstrap", _domain(), str(path))
    if done.returncode:
        raise DgemmaError(
            f"launchctl could not start {path} ({_reason(done)}); "
            "mend that and install again, or take the agent away with --uninstall."
        )
    return path


def uninstall(home: Path | None = None, run: Run = subprocess.run) -> Path:
    """End the agent and remove its property list; the logs stay.

    Returns:
        The path of the file that was removed.

    Raises:
        OptionError: this is no Mac, or there is no agent.
        DgemmaError: the agent does not end.
    """
    _, path = _find(home)
    if not _stop(run) and not path.exists():
        raise OptionError(f"There is no agent at {path}; --install makes one.")
    path.unlink(missing_ok=True)
    return path


def plist(arguments: Sequence[str], api_key: str | None, home: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """The agent's property list.

    Args:
        arguments, api_key, home: as `install` takes them; relative paths are seen from the current folder.
        environment: where the few variables come from that the agent gets.
    """
    given = {name: environment[name] for name in INHERITED if environment.get(name)}
    variables = {name: (_model if name == MODEL else _absolute)(value) for name, value in given.items()}
    if api_key:
        variables[KEY] = api_key
    log = _logs(home) / "serve.log"
    found = {
        "Label": LABEL,
        "ProgramArguments": [sys.executable, "-m", "mlx_dgemma", "serve", *_lasting(arguments)],
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},  # again after a crash, not after a server that was asked to end
        "ThrottleInterval": THROTTLE,
        "ProcessType": "Interactive",  # else launchd slows its processor and its reading down
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
    }
    return {**found, "EnvironmentVariables": variables} if variables else found


def _lasting(arguments: Sequence[str]) -> list[str]:
    """Arguments that mean the same in another folder, without what the agent is not to be told."""
    made, rest = [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        short = argument.startswith("-m") and not argument.startswith("--")
        if name == "--install":
            continue
        if name == "--api-key":
            value = value or ("" if equals else next(rest, ""))
        elif name in (*NAMED, "--cache-dir") and not equals:
            made += [name, _rooted(name, next(rest, ""))]
        elif short:
            made += ["-m", _model(argument[2:])]
        else:
            made.append(f"{name}={_rooted(name, value)}" if equals else argument)
    return made


def _rooted(name: str, value: str) -> str:
    if name in NAMED:
        return _model(value)
    return _absolute(value) if name == "--cache-dir" else value


def _model(name: str) -> str:
    """A folder from its root on; a Hub id as it is."""
    is_id = name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()
    return name if is_id else _absolute(name)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _find(home: Path | None) -> tuple[Path, Path]:
    """The user's folder and the agent's file in it."""
    if platform.system() != "Darwin":
        raise OptionError(
            f"launchd is macOS's, and this is {platform.system()}; have `mlx-dgemma serve` started by its own services."
        )
    home = home or Path.home()
    return home, home / "Library" / "LaunchAgents" / f"{LABEL}.plist"


def _logs(home: Path) -> Path:
    return home / "Library" / "Logs" / "mlx-dgemma"


def _stop(run: Run) -> bool:
    """End the agent and wait until it is gone; returns whether there was one."""
    service = f"{_domain()}/{LABEL}"
    if _launchctl(run, "print", service).returncode:
        return False
    done = _launchctl(run, "bootout", service)
    for _ in range(LEAVE * 5):
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
