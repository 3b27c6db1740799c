"""`opd store`: the daemon's memory of runs and events, looked at and copied as a file."""

from __future__ import annotations

from pathlib import Path

import typer

from opd_daemon.cli import exits, output, text
from opd_daemon.home import Home, user_path

app = typer.Typer(help="The daemon's database: check, backup.", no_args_is_help=True)


@app.command("check")
def check(as_json: bool = typer.Option(False, "--json", help="As JSON.")) -> int:
    """Read all of the store and say what is wrong with it; a daemon may be running. Exit code 1 when something is."""
    from opd_daemon.store_check import check_store

    path = Home.default().database
    found = check_store(path)
    if as_json:
        output.show_json(found)
    else:
        output.show_facts(
            [
                ("store", f"{path}, {text.size(found.bytes)}"),
                ("id", found.store_id),
                ("schema", str(found.schema)),
                ("runs", str(found.runs)),
                ("events", f"{found.events}, revisions {found.oldest_revision} to {found.newest_revision}"),
                ("faults", str(len(found.faults) or "none")),
            ]
        )
        for fault in found.faults:
            output.show(f"  {fault}")
    return exits.FAILED if found.faults else exits.OK


@app.command("backup")
def backup(destination: Path = typer.Argument(metavar="DEST", help="The file to write; it must not exist.")) -> int:
    """Copy the store to a file, as it is at one moment; a daemon may be running."""
    from opd_daemon.store_backup import back_up

    back_up(Home.default().database, user_path(str(destination)).absolute())
    output.show(str(destination))
    return exits.OK
