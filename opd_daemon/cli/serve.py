"""`opd serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from opd_daemon.cli import exits, text
from opd_daemon.cli.teacher import model_argument
from opd_daemon.errors import OpdError, Reason

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from opd_daemon.rpc.assembly import Daemon
    from opd_daemon.rpc.listening import Listener
    from opd_daemon.rpc.meter import CallTally
    from opd_daemon.rpc.server import Door


def serve(
    *,
    home: Path | None = typer.Option(
        None, help="The daemon's folder.  [default: $OPD_HOME or ~/.opd]", show_default=False
    ),
    port: int = typer.Option(
        0, min=0, max=65_535, help="TCP port on 127.0.0.1 besides the unix socket; 0: any free one."
    ),
    listen: str | None = typer.Option(
        None, metavar="HOST:PORT", help="One more address to serve; other machines' need --tls-cert and --tls-key."
    ),
    tls_cert: Path | None = typer.Option(None, metavar="FILE", help="PEM certificate for --listen."),
    tls_key: Path | None = typer.Option(None, metavar="FILE", help="Its PEM key."),
    tls_client_ca: Path | None = typer.Option(
        None, metavar="FILE", help="Only clients whose certificate this CA has signed may connect to --listen."
    ),
    token_file: Path | None = typer.Option(
        None,
        metavar="FILE",
        help="Keep the token in this file; it is made if missing.  [default: a new one each start]",
    ),
    allow_root: list[Path] = typer.Option(
        [], metavar="FOLDER", help="One more folder in which clients may name models, prompts and outputs."
    ),
    web_port: int | None = typer.Option(
        None,
        min=0,
        max=65_535,
        help="Serve a status page and Prometheus figures on this port of 127.0.0.1; 0: any free one.",
    ),
    teacher: str | None = typer.Option(None, metavar="PATH", help="Load this teacher at the start."),
    cache_limit: str = typer.Option("20GB", metavar="SIZE", help="Size the teacher cache may grow to."),
    runs_limit: str = typer.Option("100GB", metavar="SIZE", help="Size that all runs together may keep on disk."),
    max_runs: int = typer.Option(1, min=1, help="Runs that train at the same time; more of them wait."),
    max_watchers: int = typer.Option(4000, min=1, help="Watches that may be open at the same time, besides workers'."),
    keep_days: int = typer.Option(30, min=1, max=36_500, metavar="DAYS", help="Age at which events are forgotten."),
    keep_events: str = typer.Option("256MB", metavar="SIZE", help="Size of the events that are kept, the newest."),
    stop_grace: float = typer.Option(
        60.0, min=0.0, metavar="SECONDS", help="Time workers have for a checkpoint at the end."
    ),
    stall_warning: float = typer.Option(
        10.0, min=0.0, metavar="MINUTES", help="Warn in a run's events when it makes no progress so long; 0: never."
    ),
    stall_limit: float = typer.Option(
        0.0, min=0.0, metavar="MINUTES", help="End a worker that makes no progress so long; 0: never."
    ),
    log_level: str = typer.Option("info", help="debug, info, warning or error."),
    until_stdin_closes: bool = typer.Option(
        False, help="Stop when standard input closes: for programs that start opd."
    ),
) -> int:
    """Run the daemon in the foreground until Ctrl-C or SIGTERM."""
    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(f"{log_level!r} is not debug, info, warning or error", param_hint="--log-level")
    limit = text.parse_size(cache_limit, "--cache-limit")
    run_bytes = text.parse_size(runs_limit, "--runs-limit")
    event_bytes = text.parse_size(keep_events, "--keep-events")
    listener = _listener(listen, tls_cert, tls_key, tls_client_ca)

    from opd_daemon.home import Home
    from opd_daemon.retention import Retention
    from opd_daemon.rpc.server import ServeSettings
    from opd_daemon.rpc.server import serve as serve_until_stopped
    from opd_daemon.runs.stall import StallPolicy

    settings = ServeSettings(
        home=Home(home.expanduser().absolute()) if home else Home.default(),
        port=port,
        listener=listener,
        token_file=token_file.expanduser() if token_file else None,
        allowed_roots=tuple(allow_root),
        until_stdin_closes=until_stdin_closes,
        cache_limit_bytes=limit,
        runs_limit_bytes=run_bytes,
        teacher_path=model_argument(teacher) if teacher else None,
        max_concurrent_runs=max_runs,
        max_watchers=max_watchers,
        retention=Retention(keep_days, event_bytes),
        stop_grace_seconds=stop_grace,
        stall=StallPolicy(60.0 * stall_warning, 60.0 * stall_limit),
        log_level=log_level,
        web=None if web_port is None else _web_door(web_port),
    )
    serve_until_stopped(settings)
    return exits.OK


def _listener(address: str | None, cert: Path | None, key: Path | None, client_ca: Path | None) -> Listener | None:
    """The address of --listen, with what it needs of TLS."""
    if (cert is None) != (key is None):
        raise typer.BadParameter("a certificate and its key go together", param_hint="--tls-cert and --tls-key")
    if (cert or client_ca) and not (address and cert):
        raise typer.BadParameter("TLS is for --listen, with --tls-cert and --tls-key", param_hint="--tls-…")
    if not address:
        return None

    from opd_daemon.rpc.listening import Listener, ServerTls

    return Listener.parse(address, ServerTls(cert, key, client_ca) if cert and key else None)


def _web_door(port: int) -> Door:
    try:
        from opd_daemon.web.server import web_port
    except ImportError as error:
        message = f"--web-port {port}: {error.name} is not installed; pip install 'opd-daemon[web]'"
        raise OpdError(Reason.INVALID_REQUEST, message) from None
    from opd_daemon.rpc.telemetry import Telemetry
    from opd_daemon.web.pages import Shown

    def door(daemon: Daemon, token: str, calls: CallTally) -> AbstractAsyncContextManager[int]:
        shown = Shown(daemon.runs, daemon.teacher.service, Telemetry(daemon, calls).text)
        return web_port(port, token, shown)

    return door
