"""Quick Actions in ~/Library/Services: written, listed and removed. Bundles of others are left alone."""

from __future__ import annotations

import os
import platform
import plistlib
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import DgemmaError, OptionError
from ..files import atomic_folder
from ..installation import this_copy
from .actions import Action
from .shell import script
from .workflow import MARK, document, info_plist

INHERITED = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")  # a GUI session has none of them
PBS = "/System/Library/CoreServices/pbs"  # keeps the list of services
Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@dataclass(frozen=True)
class Installed:
    """A bundle of this package.

    Attributes:
        key: the action's.
        title: its menu item.
        version: of the package that wrote it.
        path: the bundle.
    """

    key: str
    title: str
    version: str
    path: Path


def services_folder(folder: Path | None = None) -> Path:
    """The given folder, or ~/Library/Services.

    Raises:
        DgemmaError: no folder is given, and this is not macOS.
    """
    if folder is not None:
        return folder
    if platform.system() != "Darwin":
        raise OptionError(
            f"Quick Actions are macOS's, and this is {platform.system()}; --folder writes them elsewhere."
        )
    return Path.home() / "Library" / "Services"


def bundles(actions: Sequence[Action], model: str | None = None) -> dict[str, dict[str, bytes]]:
    """{name of the bundle: {name of a file in its Contents: bytes}}."""
    environment = {name: os.path.abspath(os.path.expanduser(os.environ[name])) for name in _inherited(os.environ)}
    program = this_copy().program()
    return {
        f"{action.title}.workflow": {
            "Info.plist": plistlib.dumps(info_plist(action)),
            "document.wflow": plistlib.dumps(document(action, script(action, program, environment, model))),
        }
        for action in actions
    }


def install(actions: Sequence[Action], folder: Path, model: str | None = None, run: Run = subprocess.run) -> list[Path]:
    """Write the bundles of actions. Earlier ones of this package with the same key or name are replaced.

    Args:
        actions: what to write.
        folder: the folder of services, which is made if it is missing.
        model: folder or Hub id that they name; None leaves it to config.toml.
        run: replacement for `subprocess.run`.

    Returns:
        The bundles.

    Raises:
        DgemmaError: a bundle of that name is not this package's, and nothing was written; the folder cannot be written.
    """
    written = bundles(actions, model)
    own = {one.path: one for one in installed(folder)}
    for name in written:
        if os.path.lexists(folder / name) and folder / name not in own:
            raise DgemmaError(f"{folder / name} is not of mlx-dgemma; rename it, or give the action another title.")
    keys = {action.key for action in actions}
    for name, files in written.items():
        with atomic_folder(folder / name, sum(map(len, files.values())), "--folder", replace=True) as draft:
            (draft / "Contents").mkdir()
            for file, content in files.items():
                (draft / "Contents" / file).write_bytes(content)
    for path, one in own.items():  # the same action under an earlier title
        if one.key in keys and path.name not in written:
            shutil.rmtree(path)
    _update_services(run)
    return [folder / name for name in written]


def uninstall(folder: Path, keys: Sequence[str] = (), dry_run: bool = False, run: Run = subprocess.run) -> list[Path]:
    """Remove bundles of this package: those with these keys, or all. With `dry_run` they are only returned.

    Raises:
        OptionError: a key that is not installed.
    """
    own = installed(folder)
    missing = sorted({*keys} - {one.key for one in own})
    if missing:
        raise OptionError(f"{folder} has no Quick Action {missing[0]} of mlx-dgemma; `quick-actions list` shows them.")
    found = [one.path for one in own if not keys or one.key in keys]
    if not dry_run:
        for path in found:
            shutil.rmtree(path)
        _update_services(run)
    return found


def installed(folder: Path) -> list[Installed]:
    """The bundles of this package in a folder, by name."""
    found = []
    for path in sorted(folder.glob("*.workflow")):
        try:
            info = plistlib.loads((path / "Contents" / "Info.plist").read_bytes())
            identifier = info.get("CFBundleIdentifier", "")
        except (OSError, ValueError, AttributeError, plistlib.InvalidFileException):
            continue
        if isinstance(identifier, str) and identifier.startswith(MARK) and not path.is_symlink():
            title, version = str(info.get("CFBundleName", path.stem)), str(info.get("CFBundleShortVersionString", "?"))
            found.append(Installed(identifier.removeprefix(MARK), title, version, path))
    return found


def _inherited(environment: Mapping[str, str]) -> list[str]:
    return [name for name in INHERITED if environment.get(name)]


def _update_services(run: Run) -> None:
    """Have macOS read the services again; it does so by itself at the next login."""
    if platform.system() == "Darwin":
        with suppress(OSError):  # the workflows are written already
            run([PBS, "-update"], capture_output=True, check=False)
