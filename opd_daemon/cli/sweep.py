"""`opd sweep`: the same distillation with several settings, side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from opd_daemon.cli import exits, output, text
from opd_daemon.errors import FieldViolation, OpdError, Reason

if TYPE_CHECKING:
    from opd_daemon.cli.distill import DaemonInUse
    from opd_daemon.client import Client
    from opd_daemon.client.sweep import Cell, Outcome
    from opd_daemon.config import RunConfig
    from opd_daemon.types import Plan, Run


def sweep(
    config: Path = typer.Argument(metavar="CONFIG.yaml", help="What all runs have in common.", show_default=False),
    *,
    vary: list[str] = typer.Option(
        ...,
        "--vary",
        "-v",
        metavar="NAME=V1,V2,…",
        help="A setting and its values; several make a grid.",
        show_default=False,
    ),
    settings: list[str] = typer.Option([], "--set", "-s", metavar="NAME=VALUE", help="Set one value for all runs."),
    preset: str = typer.Option("", "--preset", "-p", help="fast, quality or memory; the file's own values win."),
    name: str = typer.Option("", help="The runs are NAME-1, NAME-2 …  [default: the file's name]", show_default=False),
    folder: Path | None = typer.Option(
        None, "--output", "-o", metavar="DIR", help="Where table and picture go.  [default: NAME]", show_default=False
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the runs and their plan; start nothing."),
    serve: bool = typer.Option(False, "--serve", help="Run a daemon for as long as this command takes, if none runs."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Answer every question with yes."),
) -> int:
    """Distil with every combination of some settings and compare what comes out.

    All runs use one teacher cache, so what the teacher said once is not computed again (with signal sparse or sampled:
    at the same temperature). Ctrl-C leaves the runs to the daemon; with --serve it stops them. The same command again
    goes on where the sweep was. A daemon on another machine gets the prompts sent, and the adapters come back.
    """
    from opd_daemon.cli.distill import daemon_in_use
    from opd_daemon.cli.elsewhere import all_as_they_are_there
    from opd_daemon.client.sweep import check_name

    called = check_name(name or re.sub(r"[^A-Za-z0-9._-]+", "_", config.stem).strip("._-") or "sweep")
    cells = read_cells(config, preset, settings, read_variations(vary), called)
    with daemon_in_use(serve=serve, yes=yes) as daemon:
        here = [cell.config for cell in cells]
        there = all_as_they_are_there(daemon.client, here)
        cells = [replace(cell, config=config) for cell, config in zip(cells, there, strict=True)]
        too_large = show_plans(daemon.client, cells)
        if too_large and not dry_run:
            message = f"{', '.join(too_large)} will not fit; 'opd plan' shows why. Nothing was started"
            raise OpdError(Reason.OUT_OF_MEMORY, message)
        if dry_run or not (yes or not output.can_ask() or typer.confirm("start?", default=True, err=True)):
            return exits.OK
        code = _run_all(daemon, cells)
        if code is not None:
            return code
        return finish(daemon.client, called, cells, here, folder or Path(called))


def read_variations(written: Sequence[str]) -> dict[str, list[Any]]:
    """Settings with their values, each written like a list in YAML without its brackets.

    Raises:
        OpdError: INVALID_RUN_CONFIG naming what can't be read.
    """
    import yaml

    variations: dict[str, list[Any]] = {}
    for entry in written:
        name, _, values = entry.partition("=")
        name = name.strip().replace("-", "_")
        try:
            found = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            found = []
        if not name or not found or None in found:
            message = f"--vary {entry}: write it as name=value,value, as in --vary temperature=1,2,4"
            raise OpdError(Reason.INVALID_RUN_CONFIG, message)
        if name in variations or name == "run_id":
            message = f"--vary {entry}: {name} {'names the runs' if name == 'run_id' else 'was given before'}"
            raise OpdError(Reason.INVALID_RUN_CONFIG, message)
        variations[name] = found
    return variations


def read_cells(
    config: Path, preset: str, settings: Sequence[str], variations: dict[str, list[Any]], name: str
) -> list[Cell]:
    """The runs of the sweep, each checked by itself.

    Raises:
        OpdError: INVALID_RUN_CONFIG, every fault of the first run that has one.
    """
    import json

    from opd_daemon.cli.request import read_request
    from opd_daemon.client.sweep import Cell, grid

    cells = []
    for number, chosen in enumerate(grid(variations), start=1):
        run_id = f"{name}-{number}"
        own = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
        request = read_request(config, preset, [*settings, *own, f"run_id={run_id}"])
        try:
            valid = request.config()
        except OpdError as error:
            raise _as_varied(error, own) from None
        if valid.output_adapter_path:
            valid = valid.model_copy(update={"output_adapter_path": str(Path(valid.output_adapter_path) / run_id)})
        cells.append(Cell(run_id, chosen, valid))
    return cells


def _as_varied(error: OpdError, own: Sequence[str]) -> OpdError:
    """The error, naming the flag by which the values were given."""
    flags = {f"--set {entry}": f"--vary {entry}" for entry in own}
    violations = [FieldViolation(flags.get(entry.field, entry.field), entry.description) for entry in error.violations]
    return OpdError(error.reason, error.message, violations=violations, **error.metadata)


def show_plans(client: Client, cells: Sequence[Cell]) -> list[str]:
    """Show what there is to do; the runs that will not fit."""
    from opd_daemon.client.sweep import known_runs

    known = known_runs(client, cells)
    plans: list[Plan] = []
    too_large: list[str] = []
    rows = []
    for cell in cells:
        run = known.get(cell.run_id)
        if run is None:
            plan = client.create_run(cell.values, validate_only=True)[0].plan
            plans += [plan] if plan else []
            too_large += [cell.run_id] if plan and not plan.fits else []
            rows.append((cell.run_id, cell.label, "new", *_planned(plan)))
        else:
            rows.append((cell.run_id, cell.label, str(run.state), f"{run.step}/{run.total_steps} steps", ""))
    output.show_table(("RUN", "SETTINGS", "STATE", "PLAN", "MEMORY"), rows, numbers=("PLAN", "MEMORY"))
    if plans:
        seconds = sum(plan.seconds for plan in plans)
        output.say(
            f"plan:   {text.duration(seconds)} for {len(plans)} runs one after another; less, as what the teacher said "
            "in one run is found in its cache by the next"
        )
        output.say(f"memory: {text.size(max(plan.peak_bytes for plan in plans))} at most at a time")
    for line in sorted({line for plan in plans for line in plan.warnings}):
        output.say(f"  warning: {line}")
    return too_large


def _planned(plan: Plan | None) -> tuple[str, str]:
    return (text.duration(plan.seconds), text.size(plan.peak_bytes)) if plan else ("", "")


def _run_all(daemon: DaemonInUse, cells: Sequence[Cell]) -> int | None:
    """Start every run, then follow one after another; an exit code when the sweep ends before its end."""
    from opd_daemon.cli.follow import follow
    from opd_daemon.client.sweep import start

    client = daemon.client
    runs = [start(client, cell) for cell in cells]
    try:
        for number, (cell, run) in enumerate(zip(cells, runs, strict=True), start=1):
            if run.state.resting:
                continue
            output.say(f"\nrun {number} of {len(cells)}, {cell.run_id}: {cell.label}")
            progress = follow(client, run, on_interrupt="stop" if daemon.ours else "detach")
            if daemon.ours and progress.state.resumable and progress.state != "FAILED":
                _stop_rest(client, runs[number:])
                output.say("stopped; the same command goes on from here")
                return exits.STOPPED
    except KeyboardInterrupt:
        output.say("\nthe runs go on; the same command looks again, 'opd runs' lists them, 'opd stop RUN' stops one")
        return exits.INTERRUPTED
    return None


def _stop_rest(client: Client, runs: Sequence[Run]) -> None:
    for run in runs:
        try:
            client.stop(run.run_id)
        except OpdError as error:
            if error.reason is not Reason.RUN_STATE_CONFLICT:  # it rests already
                raise


def finish(client: Client, name: str, cells: Sequence[Cell], here: Sequence[RunConfig], folder: Path) -> int:
    """Compare the runs: a table here, and table and picture in the folder. The exit code says whether all are done.

    here: the configurations with paths of this machine, where the adapters go.
    """
    from opd_daemon.cli.elsewhere import fetch_adapter
    from opd_daemon.client.sweep import outcome, ranked

    found = [outcome(client, cell) for cell in cells]
    for entry, config in zip(found, here, strict=True):
        if entry.state == "SUCCEEDED":
            fetch_adapter(client, config, entry.cell.run_id)
    outcomes = ranked(found)
    show_outcomes(outcomes)
    for path in write_outcomes(name, outcomes, folder):
        output.say(f"written: {path}")
    failed = [entry for entry in outcomes if entry.state != "SUCCEEDED"]
    return max((exits.of_state(entry.state) for entry in failed), default=exits.OK)


def show_outcomes(outcomes: Sequence[Outcome]) -> None:
    """The table, and what can be concluded from it."""
    from opd_daemon.client.sweep import SHOWN
    from opd_daemon.distill.report.measures import BY_NAME

    titles = [BY_NAME[name].title.upper() + (" %" if BY_NAME[name].share else "") for name in SHOWN]
    rows = [
        (entry.cell.run_id, entry.cell.label, *(_shown(outcomes, entry, name) for name in SHOWN), _ended(entry))
        for entry in outcomes
    ]
    output.show_table(("RUN", "SETTINGS", *titles, "TIME"), rows, numbers=(*titles, "TIME"))
    for line in conclusions(outcomes):
        output.show(line)


def _shown(outcomes: Sequence[Outcome], entry: Outcome, name: str) -> str:
    from opd_daemon.client.sweep import best
    from opd_daemon.distill.report.measures import BY_NAME

    found, measure = entry.estimates.get(name), BY_NAME[name]
    if found is None:
        return "–"
    width = "" if found.half_width is None else f" ± {measure.show(found.half_width)}"
    first, near = best(outcomes, name)
    mark = " *" if entry is first else " ≈" if entry in near else "  "
    return f"{measure.show(found.value)}{width}{mark}"


def _ended(entry: Outcome) -> str:
    if entry.state == "SUCCEEDED":
        return text.duration(entry.seconds) if entry.seconds is not None else ""
    return f"{str(entry.state).lower()} at step {entry.steps}"


def conclusions(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Which runs did best by each measure, and whether that means anything; why runs have no result."""
    from opd_daemon.client.sweep import SHOWN, best, comparable
    from opd_daemon.distill.report.measures import BY_NAME

    if not comparable(outcomes):
        yield "the validation KLs are different divergences, or on different completions; none is best by them"
    for name in SHOWN:
        first, near = best(outcomes, name)
        if first is None:
            continue
        measure = BY_NAME[name]
        word = "lowest" if measure.better < 0 else "highest"
        others = ", ".join(entry.cell.run_id for entry in near)
        verdict = f"; within noise of it: {others}" if near else ""
        yield f"{word} {measure.title}: {first.cell.run_id} ({first.cell.label}){verdict}"
    for entry in outcomes:
        if entry.state != "SUCCEEDED":
            why = f": {text.one_line(entry.error, 300)}" if entry.error else ""
            yield f"{entry.cell.run_id} is {entry.state}{why}"
    if any(entry.estimates for entry in outcomes):
        yield "* best, ≈ within noise of it; ±: 95 % interval on held-out prompts, at each run's best evaluation"


def write_outcomes(name: str, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """sweep.json, sweep.csv, sweep.png and sweep.svg."""
    import json

    from opd_daemon.client.sweep import MEASURES, best, to_csv, to_json
    from opd_daemon.distill.report.drawing import to_png, to_standalone_svg
    from opd_daemon.distill.report.sweep_chart import SweepRow, sweep_chart

    winners = {measure: best(outcomes, measure) for measure in MEASURES}
    rows = [
        SweepRow(
            entry.cell.label,
            entry.estimates if entry.state == "SUCCEEDED" else {},
            "" if entry.state == "SUCCEEDED" else str(entry.state).lower(),
            frozenset(measure for measure, (first, near) in winners.items() if entry is first or entry in near),
        )
        for entry in outcomes
    ]
    shown = [measure for measure, (first, _) in winners.items() if first is not None]
    files = {
        "sweep.json": json.dumps(output.plain(to_json(name, outcomes)), indent=2, ensure_ascii=False).encode(),
        "sweep.csv": to_csv(outcomes).encode(),
    }
    if shown:
        chart = sweep_chart(f"{name}: held-out prompts, 95 % intervals", rows, shown)
        files |= {"sweep.svg": to_standalone_svg(chart).encode(), "sweep.png": to_png(chart)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
    except OSError as fault:
        raise OpdError(Reason.INVALID_REQUEST, f"--output {folder}: can't be written: {fault.strerror}") from None
    return [folder / file for file in files]
