"""The web port in the daemon's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from opd_daemon.errors import OpdError, Reason
from opd_daemon.web.guard import Guard
from opd_daemon.web.pages import Pages, Shown
from opd_daemon.web.sessions import Sessions

HOST = "127.0.0.1"
# Whoever connects has said within this time what is wanted.
REQUEST_SECONDS = 10.0
IDLE_SECONDS = 5
MOST_CONNECTIONS = 256
LARGEST_HEADERS = 16 << 10
BACKLOG = 128


@contextlib.asynccontextmanager
async def web_port(port: int, token: str, shown: Shown) -> AsyncIterator[int]:
    """Serve the pages on a loopback port, 0 for any free one; yields the port.

    Raises:
        OpdError: INVALID_REQUEST when the port is in use.
    """
    listener = _listen(port)
    port = listener.getsockname()[1]
    app = Guard(Pages(shown, Sessions(token)).app(), port)
    server = _Server(_config(app))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield port
    finally:
        server.should_exit = True
        await serving


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        # From here on connections wait; those made before the server runs are answered when it does.
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        message = f"--web-port {port}: can't be had on {HOST}; choose another, or 0 for any free one"
        raise OpdError(Reason.INVALID_REQUEST, message, port=port) from None
    return listener


def _config(app: Guard) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        # A warning for everyone who sends nonsense would let them fill the log.
        log_level="error",
        # Nobody stands between a client and this port, so nobody speaks for a client.
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=LARGEST_HEADERS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=1,
        backlog=BACKLOG,
    )


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the daemon."""
        yield


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that waits for a request, but not for ever, and on no more than so many connections.

    uvicorn by itself never gives up on a client that sends its headers byte by byte, or none.
    """

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, if there is room."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._stop_waiting()
        if not self.transport.is_closing():
            self._wait_for_request()

    def _wait_for_request(self) -> None:
        self._waiting = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # type: ignore[redundant-expr]  # None at first
            self.transport.abort()
