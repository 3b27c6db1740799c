"""`opd plugins` and `opd trainers`."""

from __future__ import annotations

import typer

from opd_daemon.cli import exits, output
from opd_daemon.cli.text import one_line

JsonOption = typer.Option(False, "--json", help="As JSON.")


def plugins(as_json: bool = JsonOption) -> int:
    """List the plugins, also those that failed to load and why. Exit code 1 when one failed."""
    from opd_daemon.client import Client

    with Client.find() as client:
        found = client.plugins()
    failed = any(entry.error for entry in found)
    if as_json:
        output.show_json(found)
        return exits.FAILED if failed else exits.OK
    rows = [
        (
            entry.name,
            f"{entry.distribution} {entry.version}".strip(),
            ", ".join(entry.trainers),
            ", ".join(entry.hooks),
            f"failed: {one_line(entry.error, 300)}" if entry.error else "in use",
        )
        for entry in found
    ]
    output.show_table(("PLUGIN", "PACKAGE", "TRAINERS", "HOOKS", "STATE"), rows)
    return exits.FAILED if failed else exits.OK


def trainers(as_json: bool = JsonOption) -> int:
    """List the trainers that 'trainer:' in a configuration can name, with their options."""
    from opd_daemon.client import Client

    with Client.find() as client:
        found = client.trainers()
    if as_json:
        output.show_json(found)
        return exits.OK
    rows = [
        (
            entry.name,
            f"{entry.plugin} {entry.version}".strip(),
            ", ".join(entry.options_schema.get("properties", {})) or "none",
            entry.summary,
        )
        for entry in found
    ]
    output.show_table(("TRAINER", "PLUGIN", "OPTIONS", "WHAT IT DOES"), rows)
    return exits.OK
