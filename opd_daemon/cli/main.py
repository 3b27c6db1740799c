"""`opd`: the commands, and the one place where errors become lines and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from opd_daemon.cli import (
    cache,
    compare,
    demo,
    distill,
    doctor,
    exits,
    look,
    output,
    plan,
    plugins,
    report,
    runs,
    serve,
    service,
    store,
    sweep,
    teacher,
    web,
)
from opd_daemon.errors import OpdError

app = typer.Typer(
    name="opd",
    help="On-policy distillation for MLX: a daemon keeps the teacher in memory, trainers lift the student.",
    epilog=f"{exits.HELP} The daemon's folder is $OPD_HOME, by default ~/.opd.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("demo", rich_help_panel="Begin here")(demo.demo)
app.command("distill", rich_help_panel="Begin here")(distill.distill)
app.command("sweep", rich_help_panel="Begin here")(sweep.sweep)

app.command("runs", rich_help_panel="Runs")(runs.list_runs)
app.command("status", rich_help_panel="Runs")(runs.status)
app.command("plan", rich_help_panel="Runs")(plan.plan)
app.command("watch", rich_help_panel="Runs")(runs.watch)
app.command("stop", rich_help_panel="Runs")(runs.stop)
app.command("resume", rich_help_panel="Runs")(runs.resume)
app.command("metrics", rich_help_panel="Runs")(runs.metrics)
app.command("report", rich_help_panel="Runs")(report.report)
app.command("compare", rich_help_panel="Runs")(compare.compare)
app.command("delete", rich_help_panel="Runs")(runs.delete)

app.command("serve", rich_help_panel="Daemon and teacher")(serve.serve)
app.command("web", rich_help_panel="Daemon and teacher")(web.web)
app.add_typer(service.app, name="service", rich_help_panel="Daemon and teacher")
app.command("doctor", rich_help_panel="Daemon and teacher")(doctor.doctor)
app.add_typer(teacher.app, name="teacher", rich_help_panel="Daemon and teacher")
app.command("score", rich_help_panel="Daemon and teacher")(look.score)
app.command("generate", rich_help_panel="Daemon and teacher")(look.generate)
app.add_typer(cache.app, name="cache", rich_help_panel="Daemon and teacher")
app.add_typer(store.app, name="store", rich_help_panel="Daemon and teacher")
app.command("trainers", rich_help_panel="Daemon and teacher")(plugins.trainers)
app.command("divergences", rich_help_panel="Daemon and teacher")(plugins.divergences)
app.command("plugins", rich_help_panel="Daemon and teacher")(plugins.plugins)


def _show_version(wanted: bool) -> None:
    if wanted:
        import opd_daemon

        output.show(f"opd {opd_daemon.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def opd(
    context: typer.Context,
    _version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
    *,
    address: str = typer.Option(
        "", metavar="HOST:PORT", help="A daemon elsewhere.  [$OPD_ADDRESS]", show_default=False
    ),
    token_file: str = typer.Option("", metavar="FILE", help="Its token.  [$OPD_TOKEN_FILE]", show_default=False),
    ca: str = typer.Option(
        "", metavar="FILE", help="Who signs its certificate, as PEM.  [$OPD_CA]", show_default=False
    ),
    client_cert: str = typer.Option(
        "", metavar="FILE", help="Our certificate, if it asks for one.  [$OPD_CLIENT_CERT]", show_default=False
    ),
    client_key: str = typer.Option("", metavar="FILE", help="Its key.  [$OPD_CLIENT_KEY]", show_default=False),
) -> None:
    """Show the help when no command is given."""
    # Every command finds its daemon by the environment.
    if token_file:
        os.environ.pop("OPD_TOKEN", None)
    given = {
        "OPD_ADDRESS": address,
        "OPD_TOKEN_FILE": token_file,
        "OPD_CA": ca,
        "OPD_CLIENT_CERT": client_cert,
        "OPD_CLIENT_KEY": client_key,
    }
    os.environ.update({name: value for name, value in given.items() if value})
    if context.invoked_subcommand is None:
        output.show(context.get_help())


def main() -> None:
    """Entry point of the command `opd`."""
    # What goes wrong is told by us, in one line; gRPC's core would add its own. Read when grpc is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code. Whatever goes wrong is told in lines, never as a traceback.

    `OPD_DEBUG=1` lets exceptions through.
    """
    try:
        return app(list(arguments), prog_name="opd", standalone_mode=False) or exits.OK
    except (KeyboardInterrupt, typer.Abort):
        return exits.INTERRUPTED
    except OpdError as error:
        if _debugging():
            raise
        output.show_error(error)
        return exits.of_error(error)
    except BrokenPipeError:  # the reader of our output has gone, as in `opd runs | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.OK
    except Exception as error:  # noqa: BLE001 - the last border: people get a line
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if hasattr(error, "format_message"):  # typer's usage errors, whose base class has moved between its versions
        command = getattr(getattr(error, "ctx", None), "command_path", "opd")
        output.say(f"{command}: {_usage(error)}; see '{command} --help'")
        return exits.USAGE
    if _debugging():
        raise error
    output.say(f"opd: unexpected {type(error).__name__}: {error} (OPD_DEBUG=1 shows where)")
    return exits.FAILED


def _usage(error: Any) -> str:
    message = " ".join(str(error.format_message()).split()).rstrip(".")
    return message[:1].lower() + message[1:]


def _debugging() -> bool:
    return bool(os.environ.get("OPD_DEBUG"))
