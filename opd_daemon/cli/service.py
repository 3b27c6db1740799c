"""`opd service`: a daemon that starts at login and comes back after a failure."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from opd_daemon.cli import exits, output
from opd_daemon.cli.keeper import keeper
from opd_daemon.cli.serve import serve
from opd_daemon.cli.unit import Unit
from opd_daemon.errors import OpdError, Reason

app = typer.Typer(help="Keep a daemon running: install, status, uninstall.", no_args_is_help=True)


@app.command("install", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def install(
    context: typer.Context,
    print_only: bool = typer.Option(False, "--print", help="Show the service's file and change nothing."),
) -> int:
    """Start a daemon now, at every login, and again when it fails. Takes the options of 'opd serve'.

    Installing again puts the new options in place of the old ones.
    """
    from opd_daemon.home import Home

    unit, manager = _unit(context.args), keeper()
    content = manager.render(unit)
    if print_only:
        output.show(content.decode().rstrip("\n"))
        return exits.OK
    Home(unit.home).make()
    unit.log.parent.mkdir(mode=0o700, exist_ok=True)
    manager.file.parent.mkdir(parents=True, exist_ok=True)
    earlier = manager.file.read_bytes() if manager.file.exists() else None
    manager.file.write_bytes(content)
    try:
        manager.start()
    except OpdError:
        # A file that nobody has taken up would look like a service at the next login.
        manager.file.unlink() if earlier is None else manager.file.write_bytes(earlier)
        raise
    output.show(f"installed {manager.file}; the log is {unit.log}")
    if sys.platform == "linux":
        output.say("It runs while you are logged in; 'loginctl enable-linger' keeps it running after that.")
    return exits.OK


@app.command("status")
def status(as_json: bool = typer.Option(False, "--json", help="As JSON.")) -> int:
    """Show whether the service is installed and runs. Exit code 3 when it doesn't run."""
    found = keeper().status()
    if as_json:
        output.show_json(found)
    else:
        output.show_facts(
            [
                ("installed", found.file if found.installed else "no; 'opd service install'"),
                ("running", f"yes, pid {found.pid}" if found.running else "no"),
                ("last exit", "" if found.last_exit is None else f"code {found.last_exit}"),
            ]
        )
    return exits.OK if found.running else exits.NO_DAEMON


@app.command("uninstall")
def uninstall() -> int:
    """Stop the service and remove its file. The daemon's folder stays as it is."""
    manager = keeper()
    if not manager.file.exists():
        output.show("not installed")
        return exits.OK
    manager.stop()
    manager.file.unlink(missing_ok=True)
    output.show(f"removed {manager.file}")
    return exits.OK


def _unit(arguments: list[str]) -> Unit:
    """The daemon that `opd serve` with these options would be. Raises usage errors as that command does."""
    from opd_daemon.home import Home

    serving = typer.Typer(add_completion=False)
    serving.command("serve")(serve)
    # Parsed for what it says and for what is wrong with it; the service is given it as it was written.
    options = typer.main.get_command(serving).make_context("opd serve", list(arguments)).params
    if options["until_stdin_closes"]:
        message = "--until-stdin-closes: a service has no standard input, so it would end at once; leave it out"
        raise OpdError(Reason.INVALID_REQUEST, message)
    home = Path(options["home"]).expanduser().absolute() if options["home"] else Home.default().root
    rest = _without_home(arguments)
    command = (sys.executable, "-m", "opd_daemon.cli", "serve", "--home", str(home), *rest)
    return Unit(command, home, float(options["stop_grace"]))


def _without_home(arguments: list[str]) -> list[str]:
    rest, skip = [], False
    for argument in arguments:
        if not skip and argument != "--home" and not argument.startswith("--home="):
            rest.append(argument)
        skip = not skip and argument == "--home"
    return rest
