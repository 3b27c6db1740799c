"""`opd plugins`, `opd trainers` and `opd divergences`."""

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
            ", ".join((*entry.trainers, *entry.divergences)),
            ", ".join(entry.hooks),
            f"failed: {one_line(entry.error, 300)}" if entry.error else "in use",
        )
        for entry in found
    ]
    output.show_table(("PLUGIN", "PACKAGE", "OFFERS", "HOOKS", "STATE"), rows)
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


def divergences(as_json: bool = JsonOption) -> int:
    """List the divergences that 'divergence:' in a configuration can name, with their signals and options."""
    from opd_daemon.client import Client

    with Client.find() as client:
        found = client.divergences()
    if as_json:
        output.show_json(found)
        return exits.OK
    rows = [
        (
            entry.name,
            ", ".join(entry.signals),
            ", ".join(entry.options_schema.get("properties", {})) or "none",
            entry.summary if not entry.plugin else f"{entry.summary} ({entry.plugin})",
        )
        for entry in found
    ]
    output.show_table(("DIVERGENCE", "SIGNALS", "OPTIONS", "WHAT IT IS"), rows)
    return exits.OK
