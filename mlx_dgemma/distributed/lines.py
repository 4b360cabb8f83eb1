"""`Lines`: messages between processes that watch each other, one JSON object a line."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any

MOST = 2**16  # bytes of a line; nobody of ours sends longer ones


class Lines:
    """One end of a connection.

    Args:
        connection: a stream socket.

    Attributes:
        open: whether the other end may still send.
    """

    def __init__(self, connection: socket.socket):
        self._socket, self._begun, self.open = connection, b"", True

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    @property
    def local(self) -> bool:
        """Whether both ends are on this machine: they have one address."""
        try:
            return self._socket.getpeername()[0] == self._socket.getsockname()[0]
        except OSError:
            return False

    def send(self, **message: Any) -> None:
        """Send a message; where nobody takes it, it is lost: the end of the connection tells."""
        with suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, most: int | None = None) -> list[dict[str, Any]]:
        """The messages that have come; waits for bytes of one. After the last, and after nonsense, `open` is false.

        Args:
            most: messages to return; those behind them are returned with the next that come.
        """
        try:
            data = self._socket.recv(MOST)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        *whole, self._begun = (self._begun + data).split(b"\n")
        if most is not None:
            whole, self._begun = whole[:most], b"\n".join([*whole[most:], self._begun])
        try:
            messages = [json.loads(line) for line in whole]
        except ValueError:
            messages, data = [], b""
        self.open = bool(data) and len(self._begun) < MOST and all(isinstance(one, dict) for one in messages)
        return messages if self.open else [one for one in messages if isinstance(one, dict)]

    def close(self) -> None:
        """End the connection."""
        self.open = False
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
