"""`opd serve`: one process, one asyncio loop, from the lock to the last fsync."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from grpc_health.v1 import health_pb2

import opd_daemon
from opd_daemon.addresses import is_loopback
from opd_daemon.errors import OpdError, Reason
from opd_daemon.events import MAX_WATCHERS
from opd_daemon.failpoints import hit
from opd_daemon.home import Home
from opd_daemon.logs import log_to_file, log_to_service_file, log_to_stderr
from opd_daemon.memory_limit import share_heaps
from opd_daemon.paths import AllowedRoots
from opd_daemon.retention import Retention
from opd_daemon.rpc.access import Gate
from opd_daemon.rpc.assembly import Daemon, Limits
from opd_daemon.rpc.front import Front
from opd_daemon.rpc.interceptor import Border
from opd_daemon.rpc.listening import Listener
from opd_daemon.rpc.meter import CallTally, Meter
from opd_daemon.runs.quota import MOST_BYTES
from opd_daemon.runs.stall import USUAL, StallPolicy
from opd_daemon.token_file import kept_token

log = logging.getLogger(__name__)

RPC_GRACE_SECONDS = 2.0

# A way in beside gRPC: given the daemon, its token and its calls, it is open inside the context and gives its port.
Door = Callable[[Daemon, str, CallTally], AbstractAsyncContextManager[int]]


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """How one daemon is run. `port` 0 takes any free loopback port, None serves the unix socket only.

    listener: one more address. token_file: keeps the token from one start to the next; without it each has its own.
    allowed_roots: folders in which clients may name paths, besides those of `AllowedRoots.default`.
    """

    home: Home = field(default_factory=Home.default)
    port: int | None = 0
    listener: Listener | None = None
    token_file: Path | None = None
    allowed_roots: tuple[Path, ...] = ()
    until_stdin_closes: bool = False
    cache_limit_bytes: int = 20 << 30
    runs_limit_bytes: int = MOST_BYTES
    teacher_path: str | None = None
    max_concurrent_runs: int = 1
    max_watchers: int = MAX_WATCHERS
    retention: Retention = field(default_factory=Retention)
    stop_grace_seconds: float = 60.0
    stall: StallPolicy = USUAL
    log_level: str = "info"
    web: Door | None = None


def allowed_roots(settings: ServeSettings) -> AllowedRoots:
    """Where clients of this daemon may name paths: not in the user's own folders if other machines can call."""
    remote = settings.listener is not None and not is_loopback(settings.listener.host)
    return AllowedRoots.default(settings.home, settings.allowed_roots, remote=remote)


def serve(settings: ServeSettings) -> None:
    """Run the daemon until it is asked to stop; should its gRPC server die, end the process with exit code 1.

    Raises:
        OpdError: DAEMON_ALREADY_RUNNING; INVALID_REQUEST when the home can't be written or an address can't be bound;
            WRONG_TOKEN for a token file that won't do.
    """
    share_heaps()
    log_to_stderr(settings.log_level)
    os.environ["OPD_HOME"] = str(settings.home.root)  # for plugins, which know the home by this name
    with _only_daemon(settings.home):
        log_to_service_file(settings.home.logs)
        log_to_file(settings.home.logs)
        asyncio.run(_serve(settings))


async def _serve(settings: ServeSettings) -> None:
    stop = asyncio.Event()
    _watch_for_stop(stop, settings.until_stdin_closes)
    token = kept_token(settings.token_file) if settings.token_file else secrets.token_urlsafe(32)
    limits = Limits(
        cache_bytes=settings.cache_limit_bytes,
        run_bytes=settings.runs_limit_bytes,
        concurrent_runs=settings.max_concurrent_runs,
        stop_grace_seconds=settings.stop_grace_seconds,
        watchers=settings.max_watchers,
        retention=settings.retention,
        stall=settings.stall,
    )
    roots = allowed_roots(settings)
    async with Daemon.open(settings.home, limits, roots) as daemon:
        await daemon.runs.recover()
        calls = CallTally()
        interceptors = [Meter(calls), Border(Gate(token, daemon.runs.run_for_token), settings.home)]
        front = Front(
            daemon, roots, interceptors, refused=calls.refused, port=settings.port, listener=settings.listener
        )
        async with (
            settings.web(daemon, token, calls) if settings.web else contextlib.nullcontext() as web_port,
            _listening(front, settings.home, token, web_port) as address,
        ):
            daemon.begin(address)
            await front.serving.set("", health_pb2.HealthCheckResponse.SERVING)
            died = asyncio.create_task(front.died())
            died.add_done_callback(lambda _: stop.set())
            sys.stdout.write(f"opd {opd_daemon.__version__} serves {settings.home.root} at {address}\n")
            sys.stdout.flush()
            preload = asyncio.create_task(daemon.preload(settings.teacher_path)) if settings.teacher_path else None
            await stop.wait()
            log.info("stopping")
            if preload:
                preload.cancel()
            failed = died.done()
            died.cancel()
            await front.serving.enter_graceful_shutdown()
            hit("drain.health")
            await daemon.end(settings.stop_grace_seconds)
            if not failed:
                await front.server.stop(RPC_GRACE_SECONDS)
    if failed:
        # A dead server can't be stopped, and grpcio may hang for ever where one that wasn't is freed.
        logging.shutdown()
        os._exit(1)


@contextlib.asynccontextmanager
async def _listening(front: Front, home: Home, token: str, web_port: int | None) -> AsyncIterator[str]:
    """Open, publish the discovery file; yields the address; takes socket and file away again."""
    await front.open()
    address = f"unix:{front.socket}"
    facts = {
        "pid": os.getpid(),
        "address": address,
        "socket": str(front.socket),
        "port": front.port,
        "listening": front.listening,
        "web_port": web_port,
        "token": token,
        "store_id": front.daemon.events.store_id,
        "version": opd_daemon.__version__,
    }
    _publish(home.discovery, facts)
    try:
        yield address
    finally:
        home.discovery.unlink(missing_ok=True)
        front.socket.unlink(missing_ok=True)
        if front.socket.parent != home.runtime:
            front.socket.parent.rmdir()


def _publish(path: Path, facts: dict[str, object]) -> None:
    """Write the discovery file so that nobody else can ever read it and nobody sees half of it."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a daemon that was killed just here, with the same pid, as in a container
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(facts, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    hit("discovery.write")
    temporary.replace(path)


@contextlib.contextmanager
def _only_daemon(home: Home) -> Iterator[None]:
    """Hold the home's lock, so that there is one daemon per home; socket and store are touched only under it."""
    try:
        home.make()
        home.runtime.mkdir(mode=0o700, exist_ok=True)
        home.runtime.chmod(0o700)
        lock = home.lock.open("a+")
    except OSError as error:
        message = f"{home.root}: can't be written ({error.strerror}); choose another home with --home or $OPD_HOME"
        raise OpdError(Reason.INVALID_REQUEST, message, home=home.root) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            pid = lock.read().strip() or "unknown"
            message = f"a daemon already serves {home.root} (pid {pid}); use it, or stop it first with 'kill {pid}'"
            raise OpdError(Reason.DAEMON_ALREADY_RUNNING, message, pid=pid, home=home.root) from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _watch_for_stop(stop: asyncio.Event, until_stdin_closes: bool) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop_once, stop)
    # A terminal that closes is no reason to end a night of training.
    loop.add_signal_handler(signal.SIGHUP, log.warning, "SIGHUP: going on; SIGTERM stops the daemon")
    if until_stdin_closes:
        # A thread, as not everything that may be standard input can be polled.
        threading.Thread(target=_stop_at_end_of_input, args=(loop, stop), daemon=True).start()


def _stop_at_end_of_input(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 4096):
            pass
    with contextlib.suppress(RuntimeError):  # the loop is closed already
        loop.call_soon_threadsafe(stop.set)


def _stop_once(stop: asyncio.Event) -> None:
    if stop.is_set():
        log.warning("asked twice to stop: leaving now")
        os._exit(1)
    stop.set()
