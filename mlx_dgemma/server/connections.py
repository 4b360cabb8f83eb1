"""The server's connections: how long a client may take, how many there may be, and how all of them end.

uvicorn limits the time between two requests alone, so its protocol is extended here.
"""

from __future__ import annotations

import asyncio
import json
import socket
from http import HTTPStatus

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .idle import Idle
from .settings import Settings

READ_AT_LEAST = 2**14  # bytes of an answer in `Settings.stalled_seconds`
MAX_BODY_TIME = 10  # times `Settings.body_seconds` for a whole body
GRACE = 1.0  # seconds after `Settings.shutdown_seconds` in which the last events are sent


class Connection(H11Protocol):
    """A connection that ends where its client is too slow to send a request or to read the answer."""

    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _awaited = ""  # what the client is to send: "header", "body" or nothing
    _since = 0.0  # the loop's time when that began

    @property
    def _settings(self) -> Settings:
        return self.config.app.state.settings  # type: ignore[union-attr]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected. Where there are too many, the one that has waited longest without a request goes."""
        super().connection_made(transport)
        if transport.get_extra_info("socket").family == socket.AF_UNIX:
            self.app_state = {**self.app_state, "local": True}  # becomes the state of each request's scope
        transport.set_write_buffer_limits(0)  # so that `pause_writing` tells of every byte that is not read
        self._watch()
        if len(self.connections) > self._settings.connections:
            others = [one for one in self.connections if isinstance(one, Connection) and one is not self]
            idle = [one for one in others if one._is_idle and not one.transport.is_closing()]
            most = f"The server has {self._settings.connections} connections, which is all it takes; try again later."
            min(idle, key=lambda one: one._since, default=self)._refuse(503, most)

    def data_received(self, data: bytes) -> None:
        """A client sent something."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """The client does not read as fast as the answer is written."""
        super().pause_writing()
        self._check_reading(self.transport.get_write_buffer_size() + READ_AT_LEAST)

    def resume_writing(self) -> None:
        """The client has read all."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def shutdown(self) -> None:
        """The server stops: requests that are not yet whole are refused."""
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body:
            self._refuse(503, "The server is stopping; ask again later.", "stopping")
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(400, msg)

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        """Limit the time for what the client is to send next."""
        awaited = "header" if self._is_idle else "body" if self.cycle.more_body else ""
        now, settings = self.loop.time(), self._settings
        if not awaited or awaited != self._awaited:
            self._awaited, self._since = awaited, now
        if self._timer is not None:
            self._timer.cancel()
        end = self._since + settings.header_seconds
        if awaited == "body":
            end = min(now + settings.body_seconds, self._since + MAX_BODY_TIME * settings.body_seconds)
        if awaited:
            why = f"The {awaited} of the request took too long; send it at once."
            self._timer = self.loop.call_at(end, self._refuse, 408, why)

    def _check_reading(self, before: int) -> None:
        """End the connection if less than `READ_AT_LEAST` was read since `before` bytes waited; else look again."""
        waiting = self.transport.get_write_buffer_size()
        if waiting > before - READ_AT_LEAST:
            self.transport.abort()
        else:
            self._stalled = self.loop.call_later(self._settings.stalled_seconds, self._check_reading, waiting)

    def _refuse(self, status: int, why: str, code: str | None = None) -> None:
        """Answer with an error and close."""
        if not self.transport.is_closing():
            body = json.dumps(ApiError(why, status=status, code=code).body()).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            self.transport.close()


class Server(uvicorn.Server):
    """An application's HTTP server. At its end every request is answered, every stream told, within the time limit.

    Args:
        app: from `create_app`.
        idle: when the server ends by itself; None: never.
    """

    def __init__(self, app: Starlette, idle: Idle | None = None):
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                loop="asyncio",  # which takes Unix sockets and TCP alike
                log_config=None,
                access_log=False,
                server_header=False,
            )
        )
        self._state, self._idle = app.state, idle
        app.state.stopping = lambda: self.should_exit

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. Returns whether the server should end."""
        if await super().on_tick(counter):
            return True
        if self._idle is None or self.server_state.tasks:
            return False
        return self._idle.is_over(self._state.scheduler.load())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: the scheduler refuses what waits at once, and ends what still runs when its time is over."""
        seconds = self._state.settings.shutdown_seconds
        closing = asyncio.create_task(asyncio.to_thread(self._state.scheduler.close, seconds))
        asyncio.get_running_loop().call_later(seconds + GRACE, self._abort)
        await super().shutdown(sockets)
        await closing

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]
