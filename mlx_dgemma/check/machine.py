"""The machine as it tells itself: system, Python, MLX's wheel, device and memory limits, and known traps."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import mlx.core as mx

from .. import __version__
from ..errors import human
from ..model import device
from .lines import PASSED, WARNING, Line, attempt

PACKAGES = ("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "transformers", "numpy")


def lines() -> Iterator[Line]:
    """The lines of this section."""
    for name, make in (
        ("system", _system),
        ("python", _python),
        ("packages", _packages),
        ("device", _device),
        ("memory limits", _limits),
    ):
        yield attempt(name, make)
    yield attempt("known traps", lambda: _traps(facts()))


def facts() -> dict[str, Any]:
    """What the traps are judged by."""
    return {
        "system": platform.system(),
        "macos": platform.mac_ver()[0],
        "machine": platform.machine(),
        "rosetta": _sysctl("sysctl.proc_translated") == "1",
        "wheel_tags": wheel_tags("mlx-metal") or wheel_tags("mlx"),
    }


def traps(found: dict[str, Any]) -> list[str]:
    """What is known to go wrong on such a machine, a sentence each.

    Args:
        found: as `facts` returns it.
    """
    if found["system"] != "Darwin":
        return []
    version = tuple(int(part) for part in found["macos"].split(".")[:2] if part.isdigit())
    sentences = []
    if found["rosetta"] or found["machine"] == "x86_64":
        sentences.append("Python runs under Rosetta or on Intel; MLX needs an arm64 Python.")
    if version and version < (15,):
        sentences.append(
            f"macOS is {found['macos']}; before 15 a wired limit does nothing, so weights may be paged out."
        )
    if (26,) <= version < (26, 2) and any("macosx_26" in tag for tag in found["wheel_tags"]):
        sentences.append(
            f"macOS is {found['macos']}, but this wheel of MLX was built for 26.2; update macOS to 26.2 or newer."
        )
    return sentences


def wheel_tags(package: str) -> list[str]:
    """The tags of the wheel that a package was installed from; none where it is missing."""
    try:
        text = metadata.distribution(package).read_text("WHEEL") or ""
    except metadata.PackageNotFoundError:
        return []
    return [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Tag:")]


def device_name() -> str:
    """MLX's name of its default device."""
    return str(mx.device_info().get("device_name", mx.default_device()))


def _system() -> Line:
    mac = platform.mac_ver()[0]
    name = f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"
    chip = _sysctl("machdep.cpu.brand_string") or platform.processor()
    says = f"{name}, {platform.machine()}, {os.cpu_count()} cores" + (f", {chip}" if chip else "")
    return Line("system", PASSED, says, {"system": name, "machine": platform.machine(), "chip": chip})


def _python() -> Line:
    rosetta = _sysctl("sysctl.proc_translated") == "1"
    says = f"{platform.python_version()}, {platform.machine()}" + (" under Rosetta" if rosetta else "")
    return Line("python", PASSED, says, {"version": platform.python_version(), "rosetta": rosetta})


def _packages() -> Line:
    found = {"mlx-dgemma": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    tags = wheel_tags("mlx-metal") or wheel_tags("mlx")
    says = ", ".join(f"{name} {version}" for name, version in found.items()) + f"; wheel {' '.join(tags) or 'unknown'}"
    return Line("packages", PASSED, says, {"versions": found, "wheel_tags": tags})


def _device() -> Line:
    info = {key: value for key, value in mx.device_info().items() if isinstance(value, (int, str))}
    kind = "CPU" if device.on_cpu() else "Metal GPU" if mx.metal.is_available() else "CUDA GPU"
    shown = ", ".join(
        f"{key} {human(value) if isinstance(value, int) and value > 2**20 else value}" for key, value in info.items()
    )
    return Line("device", PASSED, f"{kind}: {shown}", {"kind": kind, **info})


def _limits() -> Line:
    """The limits as they are: most can only be read by setting them, so each is set back at once."""
    found: dict[str, Any] = {
        "available": device.available(),
        "memory_limit": mx.get_memory_limit(),
        "cache_limit": _read_back(mx.set_cache_limit),
    }
    if mx.metal.is_available():
        found["wired_limit"] = _read_back(mx.set_wired_limit)
        if text := _sysctl("iogpu.wired_limit_mb"):
            found["iogpu.wired_limit_mb"] = int(text)
    names = {"iogpu.wired_limit_mb": "set by sysctl"}
    says = ", ".join(
        f"{names.get(key, key.replace('_', ' '))} {value if key.startswith('iogpu') else human(value)}"
        for key, value in found.items()
    )
    return Line("memory limits", PASSED, says, found)


def _read_back(setter: Callable[[int], int]) -> int:
    old = setter(0)
    setter(old)
    return old


def _traps(found: dict[str, Any]) -> Line:
    sentences = traps(found)
    return Line("known traps", WARNING if sentences else PASSED, " ".join(sentences) or "none", {"facts": found})


def _sysctl(name: str) -> str:
    """A value of macOS's `sysctl`, or nothing."""
    if platform.system() != "Darwin":
        return ""
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False, timeout=10)
    return done.stdout.strip()
