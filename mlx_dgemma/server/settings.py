"""Configuration of the server."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import OptionError
from .stored import StoredResponses

LOCAL = ("localhost", "127.0.0.1", "[::1]")
APP_SCHEMES = ("app", "file", "tauri", "vscode-file", "vscode-webview", "capacitor", "capacitor-electron", "ionic")
TAURI = ("http://tauri.localhost", "https://tauri.localhost")  # on Windows and Android
CONTAINER_HOSTS = ("host.docker.internal", "host.containers.internal", "host.lima.internal")  # this machine's names


@dataclass(frozen=True)
class Settings:
    """Configuration of the server.

    Attributes:
        model: name under which the model is served; "default" and no name at all stand for it.
        aliases: further names.
        host: address to listen on.
        api_key: key that clients must send; None requires none.
        allowed_hosts: names that the Host header may have, without a port, in addition to `LOCAL` and `host`.
        desktop_apps: whether apps that are web pages inside may send requests, and containers on this machine.
        cors_origins: web origins that may send requests, such as "http://localhost:3000".
        shutdown_seconds: time that running answers get to finish when the server stops.
        body_bytes: size of the largest request body.
        pictures: maximum number of pictures in a request.
        connections: maximum number of open connections.
        header_seconds: time for the header of a request.
        body_seconds: time between two pieces of a body; a whole body has ten times as much.
        stalled_seconds: time in which a client must read something of what waits for it.
        identity: what is loaded, from `rendezvous.identity`: what commands of this machine ask for.
        stored: responses that later requests may go on from.

    Raises:
        OptionError: a host that other machines can reach without an API key, or an invalid origin.
    """

    model: str = "diffusiongemma"
    host: str = "127.0.0.1"
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    shutdown_seconds: float = 10.0
    body_bytes: int = 32 * 2**20
    pictures: int = 64
    connections: int = 512
    header_seconds: float = 15.0
    body_seconds: float = 30.0
    stalled_seconds: float = 60.0
    aliases: tuple[str, ...] = ()
    desktop_apps: bool = False
    identity: str = ""
    stored: StoredResponses = field(default_factory=StoredResponses, compare=False, repr=False)

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

        for alias in self.aliases:
            if not alias.strip() or alias != alias.strip() or not alias.isprintable():
                raise OptionError(f"The alias is {alias!r}; it should be a name, without blanks around it.")

    @property
    def names(self) -> tuple[str, ...]:
        """The model's name and its aliases."""
        return tuple(dict.fromkeys((self.model, *self.aliases)))

    def allows(self, origin: str) -> bool:
        """Whether pages of another origin may send requests."""
        return origin in self.cors_origins or (self.desktop_apps and is_app(origin))

    @property
    def _is_local(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def hosts(self) -> frozenset[str]:
        """Names that the Host header may have, in lower case."""
        own = f"[{self.host}]" if ":" in self.host else self.host
        containers = CONTAINER_HOSTS if self.desktop_apps else ()
        return frozenset(one.lower() for one in (*LOCAL, own, *containers, *self.allowed_hosts))


def is_app(origin: str) -> bool:
    """Whether an origin is one that only an app on this machine can have."""
    scheme, colon, _ = origin.lower().partition("://")
    return origin.lower() in TAURI or (bool(colon) and scheme in APP_SCHEMES)


def model_name(model: str | os.PathLike | None) -> str:
    """Name under which a checkpoint is served: the Hub id, the folder's last component, or the demo's name."""
    if model is None:
        return "diffusiongemma-demo"
    return Path(model).resolve().name if Path(model).exists() else str(model)
