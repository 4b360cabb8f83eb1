"""What a server is told at its start."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import OptionError

LOCAL = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Settings:
    """How a server answers and whom.

    Raises:
        OptionError: a host that others can reach without a key, an origin that is none.
    """

    model: str = "diffusiongemma"  # the name it is served under; "default" means the same
    host: str = "127.0.0.1"
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()  # that the Host header may name beside LOCAL and `host`, without a port
    cors_origins: tuple[str, ...] = ()  # pages that may ask, such as "http://localhost:3000"
    shutdown_seconds: float = 10.0  # that running answers get to finish
    body_bytes: int = 32 * 2**20  # the largest body
    pictures: int = 64  # of a request, at most

    def __post_init__(self):
        if self.api_key == "":
            raise OptionError("The API key is empty; give one, or leave it out.")
        if self.api_key is None and not self._is_local:
            raise OptionError(
                f"The host is {self.host}, which other machines can reach: give an API key (--api-key or "
                "$MLX_DGEMMA_API_KEY), or leave the host out."
            )
        for origin in self.cors_origins:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", origin):
                raise OptionError(f"The origin is {origin!r}; it should be like http://localhost:3000, without a path.")

    @property
    def _is_local(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def hosts(self) -> frozenset[str]:
        """Lower-case names that the Host header may have."""
        own = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset(one.lower() for one in (*LOCAL, own, *self.allowed_hosts))


def model_name(model: str | os.PathLike | None) -> str:
    """The name that a checkpoint is served under: a Hub id as it is, a folder's last part, or the demo's."""
    if model is None:
        return "diffusiongemma-demo"
    return Path(model).resolve().name if Path(model).exists() else str(model)
