"""The gRPC server: bound to its addresses, with every service."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.paths import AllowedRoots
from opd_daemon.rpc.assembly import Daemon
from opd_daemon.rpc.catalog_service import CatalogServicer
from opd_daemon.rpc.core_server import core_server
from opd_daemon.rpc.listening import Listener
from opd_daemon.rpc.run_service import RunServicer
from opd_daemon.rpc.teacher_service import TeacherServicer
from opd_daemon.rpc.worker_service import WorkerServicer
from opd_daemon.types import Event, EventKind, TeacherState
from opd_daemon.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    run_pb2,
    run_pb2_grpc,
    teacher_pb2,
    teacher_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 64 << 20
# macOS allows 104 bytes including the final zero; Linux 108.
MAX_SOCKET_PATH = 103
# In a gRPC address these part a list, escape, or begin a query or a fragment.
READ_OTHERWISE = frozenset(",%?#")
# How long a server may be dead before it is noticed.
ALIVE_SECONDS = 1.0

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    # Two daemons must never share a port in silence.
    ("grpc.so_reuseport", 0),
    # Whatever keepalive a client is set to, it is not thrown out for it.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
]


TEACHER = teacher_pb2.DESCRIPTOR.services_by_name["TeacherService"].full_name


class Front:
    """The gRPC server. socket, port, listening: where it is bound, once it is open.

    Health is that of the daemon, and under the teacher service's name that of the teacher: serving while it is READY.
    """

    server: grpc.aio.Server
    serving: health.aio.HealthServicer

    def __init__(
        self,
        daemon: Daemon,
        roots: AllowedRoots,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        *,
        refused: Callable[[], None],
        port: int | None,
        listener: Listener | None,
    ) -> None:
        self.daemon = daemon
        self.socket = _socket_path(daemon.home)
        self.port = port
        self.listening: str | None = None
        self._roots = roots
        self._interceptors = interceptors
        self._refused = refused
        self._listener = listener
        self._telling: set[asyncio.Task[None]] = set()
        daemon.events.add_listener(self._heard)

    async def open(self) -> None:
        """Bind and start. Raises INVALID_REQUEST when that can't be done."""
        self.socket.unlink(missing_ok=True)
        self.server = core_server(OPTIONS, self._interceptors, self._refused)
        self.serving = _add_services(self.server, self.daemon, self._roots)
        # It would say SERVING by itself, before workers can start.
        await self.serving.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._tell_of_teacher()
        self.port = _bind(self.server, self.socket, self.port)
        if self._listener:
            self.listening = self._listener.bind(self.server)
        await self.server.start()
        self.socket.chmod(0o600)

    async def died(self) -> None:
        """Return once the server has ended by itself, which grpcio tells only to those who ask; until cancelled."""
        while True:
            # A task of its own: cancelling the wait itself would cancel the server's stop as well.
            ended = asyncio.create_task(self.server.wait_for_termination(ALIVE_SECONDS))
            await asyncio.wait({ended})
            fault = ended.exception()
            if fault or not ended.result():  # its result says that the time is over
                log.critical("the gRPC server died: %s: %s", type(fault).__name__, fault)
                return

    def _heard(self, events: Sequence[Event]) -> None:
        if any(event.kind is EventKind.TEACHER for event in events):
            task = asyncio.create_task(self._tell_of_teacher())
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell_of_teacher(self) -> None:
        ready = self.daemon.teacher.service.state is TeacherState.READY
        status = health_pb2.HealthCheckResponse
        await self.serving.set(TEACHER, status.SERVING if ready else status.NOT_SERVING)


def _add_services(server: grpc.aio.Server, daemon: Daemon, roots: AllowedRoots) -> health.aio.HealthServicer:
    teacher = TeacherServicer(daemon.teacher, daemon.teacher_users, roots)
    teacher_pb2_grpc.add_TeacherServiceServicer_to_server(teacher, server)
    runs = RunServicer(daemon.runs, daemon.events, daemon.comparisons, uploads=daemon.uploads, roots=roots)
    run_pb2_grpc.add_RunServiceServicer_to_server(runs, server)
    catalog = CatalogServicer(daemon.plugins, daemon.home, daemon.all_runs, roots)
    catalog_pb2_grpc.add_CatalogServiceServicer_to_server(catalog, server)
    worker = WorkerServicer(daemon.runs, daemon.events, daemon.comparisons)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
    serving = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(serving, server)
    files = (teacher_pb2, run_pb2, catalog_pb2, worker_pb2, health_pb2)
    names = [service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    return serving


def _bind(server: grpc.aio.Server, socket: Path, port: int | None) -> int | None:
    try:
        server.add_insecure_port(f"unix:{socket}")
    except RuntimeError:
        message = f"{socket.parent} takes no unix socket; choose another home with --home or $OPD_HOME"
        raise OpdError(Reason.INVALID_REQUEST, message) from None
    if port is None:
        return None
    try:
        return server.add_insecure_port(f"127.0.0.1:{port}")
    except RuntimeError:
        message = f"--port {port}: in use on 127.0.0.1; choose another, or 0 for any free one"
        raise OpdError(Reason.INVALID_REQUEST, message, port=port) from None


def _socket_path(home: Home) -> Path:
    """The home's own socket path, or one in a fresh private folder where that is too long, or no gRPC address."""
    if len(os.fsencode(home.socket)) <= MAX_SOCKET_PATH and not READ_OTHERWISE & set(str(home.socket)):
        return home.socket
    return Path(tempfile.mkdtemp(prefix="opd-")) / "opd.sock"
