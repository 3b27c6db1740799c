"""`opd cache`: the teacher's results on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from opd_daemon.cli import exits, output, text

if TYPE_CHECKING:
    from opd_daemon.types import CacheStats

app = typer.Typer(help="The teacher's results on disk: stats, prune.", invoke_without_command=True)


@app.callback()
def cache(context: typer.Context) -> None:
    """The teacher's results on disk: stats, prune."""
    if context.invoked_subcommand is None:
        stats(as_json=False)


@app.command("stats")
def stats(as_json: bool = typer.Option(False, "--json", help="As JSON.")) -> int:
    """Show what the cache holds and what it has saved since the daemon started."""
    from opd_daemon.client import Client

    with Client.find() as client:
        _show(client.cache_stats(), as_json=as_json)
    return exits.OK


@app.command("prune")
def prune(
    keep: str | None = typer.Option(
        None, metavar="SIZE", help="Shrink to this size; 0 empties it.  [default: its limit]"
    ),
    as_json: bool = typer.Option(False, "--json", help="As JSON."),
) -> int:
    """Remove the entries that were not used for longest."""
    limit = None if keep is None else text.parse_size(keep, "--keep")

    from opd_daemon.client import Client

    with Client.find() as client:
        _show(client.prune_cache(limit), as_json=as_json)
    return exits.OK


def _show(found: CacheStats, *, as_json: bool) -> None:
    if as_json:
        output.show_json(found)
        return
    lookups = found.hits + found.misses
    share = f" ({100 * found.hits / lookups:.0f} %)" if lookups else ""
    output.show_facts(
        [
            ("entries", f"{found.entries}, {text.size(found.bytes)} of {text.size(found.limit_bytes)}"),
            ("hits", f"{found.hits} of {lookups} lookups{share}"),
            ("time saved", text.duration(found.milliseconds_saved / 1000)),
            ("evicted", str(found.evicted)),
            ("damaged", f"{found.corrupt} (dropped and computed anew)" if found.corrupt else "0"),
        ]
    )
