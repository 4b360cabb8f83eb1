"""How this copy was installed: the command that adds an extra to it, and the words that start it from anywhere."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "mlx-dgemma"


@dataclass(frozen=True)
class Installation:
    """One installed copy.

    Attributes:
        way: "brew", "uv tool", "pipx", "uv" or "pip".
        prefix: the environment.
        python: its interpreter.
        source: the folder, file or address that it was installed from; None: an index.
        editable: whether the source is used in place.
        extras: those that uv or pipx noted down. They make the environment anew, so that they must be named again.
    """

    way: str
    prefix: Path
    python: str
    source: str | None = None
    editable: bool = False
    extras: tuple[str, ...] = ()

    def command(self, extra: str) -> str:
        """The shell command that adds an extra."""
        if self.way == "brew":  # the formula holds all extras
            return f"brew reinstall {NAME}"
        kept = sorted({*self.extras, extra})
        wanted = shlex.quote(self._requirement(kept))
        if self.editable:
            wanted = f"-e {wanted}"
        if self.way == "uv tool":
            return f"uv tool install {wanted}"
        if self.way == "pipx":
            return f"pipx install --force {wanted}"
        python = shlex.quote(self.python)
        return f"uv pip install --python {python} {wanted}" if self.way == "uv" else f"{python} -m pip install {wanted}"

    def program(self) -> list[str]:
        """The words that start the command line by absolute paths, also after an upgrade."""
        if self.way == "brew":  # the environment's path holds the version
            prefix = str(self.prefix)
            return [f"{prefix[: prefix.index('/Cellar/')]}/bin/{NAME}"]
        return [self.python, "-m", "mlx_dgemma"]

    def _requirement(self, extras: list[str]) -> str:
        named = f"[{','.join(extras)}]"
        if self.source is None:
            return NAME + named
        if "://" in self.source:
            return f"{NAME}{named} @ {self.source}"
        return self.source + named


def add_extra(extra: str) -> str:
    """The command that adds an extra to this copy."""
    return this_copy().command(extra)


def this_copy() -> Installation:
    """The copy that runs."""
    try:
        found = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return Installation("pip", Path(sys.prefix), sys.executable, str(Path(__file__).parent.parent), True)
    return read_installation(
        Path(sys.prefix), sys.executable, found.read_text("direct_url.json"), found.read_text("INSTALLER")
    )


def read_installation(prefix: Path, python: str, direct_url: str | None, installer: str | None) -> Installation:
    """What an environment's files say.

    Args:
        prefix: the environment.
        python: its interpreter.
        direct_url: the distribution's direct_url.json, as PEP 610 defines it; None without one.
        installer: the distribution's INSTALLER file.
    """
    source, editable = _source(json.loads(direct_url) if direct_url else {})
    extras: tuple[str, ...] = ()
    receipt, notes = prefix / "uv-receipt.toml", prefix / "pipx_metadata.json"
    if "/Cellar/" in str(prefix):
        way = "brew"
    elif receipt.exists():
        way = "uv tool"
        found = re.search(rf'name = "{NAME}", extras = \[([^\]]*)\]', receipt.read_text("utf-8"))
        extras = tuple(re.findall(r'"([^"]+)"', found[1])) if found else ()
    elif notes.exists():
        way = "pipx"
        spec = json.loads(notes.read_text("utf-8")).get("main_package", {}).get("package_or_url") or ""
        found = re.search(r"\[([\w,\s-]+)\]", spec)
        extras = tuple(one.strip() for one in found[1].split(",")) if found else ()
    else:
        way = "uv" if (installer or "").strip() == "uv" else "pip"
    return Installation(way, prefix, python, source, editable, extras)


def _source(origin: dict) -> tuple[str | None, bool]:
    """(where it came from, whether that is used in place)."""
    url = origin.get("url")
    if url is None:
        return None, False
    if "dir_info" in origin:
        return unquote(urlsplit(url).path), bool(origin["dir_info"].get("editable"))
    vcs = origin.get("vcs_info")
    if vcs is None:
        return url, False
    revision = vcs.get("requested_revision")
    return f"{vcs['vcs']}+{url}" + (f"@{revision}" if revision else ""), False
