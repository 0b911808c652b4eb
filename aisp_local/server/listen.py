"""Where the server listens, how long it waits for a request's head, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_SECONDS = 20
_GRACE = 30  # seconds that answers have when the server ends


class _Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Closes a connection whose next request has not begun in time: uvicorn waits for ever for the end of a head."""

    seconds: float = HEAD_SECONDS
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timer is not None:
            self.timer.cancel()

    def _wait(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(self.seconds, self._close, self.cycle)

    def _close(self, cycle: Any) -> None:
        # The next request may have come with the one before, and be answered by now.
        if self.cycle is cycle and (cycle is None or cycle.response_complete):
            self.transport.close()


class Server(uvicorn.Server):
    """Of an application of ``make_app``. ``started_at``: told the address and port of each socket once it listens."""

    def __init__(
        self,
        app: Starlette,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        head_seconds: float = HEAD_SECONDS,
        started_at: Callable[[str, int], None] = lambda host, port: None,
    ) -> None:
        protocol = type("Protocol", (_Impatient,), {"seconds": head_seconds})
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=protocol,
                ws="none",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=_GRACE,
            )
        )
        self._desk, self._started_at = app.state.desk, started_at

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [socket.getsockname()[:2] for one in self.servers for socket in one.sockets]

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for host, port in self.addresses:
            self._started_at(host, port)

    async def shutdown(self, sockets: Any = None) -> None:
        # uvicorn waits for the answers first, and only then tells the application that there will be no more.
        await asyncio.to_thread(self._desk.end)
        await super().shutdown(sockets)
