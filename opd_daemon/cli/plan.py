"""`opd plan`: what a run would take, on this machine or another, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from opd_daemon.cli import exits, output, text
from opd_daemon.cli.distill import daemon_in_use

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from opd_daemon.types import Plan, PlannedBytes

BAR = 24
WIDEST = 100


def plan(
    config: Path = typer.Argument(metavar="CONFIG.yaml", help="The run's configuration.", show_default=False),
    *,
    preset: str = typer.Option("", "--preset", "-p", help="fast, quality or memory; the file's own values win."),
    settings: list[str] = typer.Option(
        [], "--set", "-s", metavar="NAME=VALUE", help="Set one value, as in --set num_steps=200 --set lora.rank=8."
    ),
    machine: str = typer.Option("", "--machine", "-m", help="Plan for another machine, as in 'M4 Max 64 GB'."),
    as_json: bool = typer.Option(False, "--json", help="As JSON."),
) -> int:
    """Show what a run would take: time by phase, memory and disk by part, and what to change. Starts nothing.

    Without a daemon one is run for as long as this takes. The first plan for models of new shapes measures this
    machine for some seconds, unless a run is going on.
    """
    from opd_daemon.cli.elsewhere import as_it_is_there
    from opd_daemon.cli.request import read_request
    from opd_daemon.errors import OpdError

    request = read_request(config, preset, settings)
    valid = request.config()
    with daemon_in_use(serve=True, yes=True) as daemon:
        values = as_it_is_there(daemon.client, valid).model_dump(mode="json", exclude_unset=True)
        try:
            planned, _ = daemon.client.create_run(values, validate_only=True, machine=machine)
        except OpdError as error:
            raise request.placed(error) if error.violations else error from None
    found = planned.plan
    if found is None:
        raise AssertionError("a checked run has a plan")
    if as_json:
        output.show_json({**output.plain(found), "peak_bytes": found.peak_bytes})
    else:
        show(found)
    return exits.OK


def show(plan: Plan) -> None:
    """The whole plan, on stdout."""
    screen = output.console()
    screen.width = min(screen.width, WIDEST)
    how = "measured here" if plan.calibrated else "published rates"
    fits = "[green]fits[/]" if plan.fits else "[bold red]does not fit[/]"
    _print(screen, f"[bold]{text.duration(plan.seconds)}[/] on {plan.machine} [dim]({how})[/]: {fits}")
    _print(screen, _phases(plan))
    peak, there = text.size(plan.peak_bytes), text.size(plan.available_bytes)
    _print(screen, f"[bold]{peak}[/] of memory at the peak, {there} are there")
    _print(screen, _memory(plan))
    _print(screen, f"[bold]{text.size(plan.disk_bytes)}[/] on disk")
    _print(screen, _parts(plan.disk, plan.disk_bytes))
    for title, style, lines in (
        ("assumed", "dim", plan.assumptions),
        ("warning", "yellow", plan.warnings),
        ("advice", "cyan", plan.advice),
    ):
        for line in lines:
            screen.print(f"{title}: ", style=style, end="")
            screen.print(line, markup=False)


def _print(screen: Console, content: RenderableType) -> None:
    screen.print(content)
    if not isinstance(content, str):
        screen.print()


def _phases(plan: Plan) -> Table:
    table = _table()
    for name, seconds in plan.phases:
        share = seconds / max(plan.seconds, 1e-9)
        table.add_row(name, text.duration(seconds), text.percent(share), _bar(share))
    return table


def _memory(plan: Plan) -> Table:
    table = _table()
    whole = max(plan.peak_bytes, plan.available_bytes, 1)
    for process, peak in (("daemon", plan.daemon_peak_bytes), ("worker", plan.worker_peak_bytes)):
        table.add_row(f"[bold]{process}[/]", f"[bold]{text.size(peak)}[/]", text.percent(peak / whole), "")
        for part in plan.memory:
            if part.process == process:
                share = part.bytes / whole
                table.add_row(f"  {part.name}", text.size(part.bytes), text.percent(share), _bar(share))
    return table


def _parts(parts: tuple[PlannedBytes, ...], whole: int) -> Table:
    table = _table()
    for part in parts:
        share = part.bytes / max(whole, 1)
        table.add_row(part.name, text.size(part.bytes), text.percent(share), _bar(share))
    return table


def _table() -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(min_width=22)
    table.add_column(justify="right", min_width=12)
    table.add_column(justify="right", min_width=7, style="dim")
    table.add_column()
    return table


def _bar(share: float) -> str:
    """A bar of eighths of a character."""
    eighths = round(8 * BAR * min(share, 1.0))
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest].strip() if rest else "")
