"""Commands on runs: list, look, stop, resume, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from opd_daemon.cli import exits, output, text
from opd_daemon.cli.progress import measured
from opd_daemon.cli.selection import RUN_HELP, find_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from opd_daemon.client import Client
    from opd_daemon.types import Run

RunArgument = typer.Argument("last", metavar="[RUN]", help=RUN_HELP, show_default=False)
JsonOption = typer.Option(False, "--json", help="As JSON.")


def list_runs(
    as_json: bool = JsonOption,
    limit: int = typer.Option(20, min=1, help="Show at most this many, newest first."),
) -> int:
    """List the runs, newest first."""
    from itertools import islice

    from opd_daemon.client import Client

    with Client.find() as client:
        found = list(islice(client.runs(), limit))
    if as_json:
        output.show_json(found)
        return exits.OK
    columns = ("RUN", "STATE", "STEP", "KL", "AGREEMENT", "ETA", "CREATED")
    output.show_table(columns, map(_row, found), numbers=("STEP", "KL", "AGREEMENT", "ETA"))
    if not found:
        output.say("no runs yet; start one with 'opd distill CONFIG.yaml'")
    return exits.OK


def status(run: str = RunArgument, as_json: bool = JsonOption) -> int:
    """Show one run: state, plan, latest metrics, checkpoints."""
    from opd_daemon.client import Client

    with Client.find() as client:
        found = find_run(client, run)
        if as_json:
            output.show_json({**output.plain(found), "checkpoints": output.plain(client.checkpoints(found.run_id))})
            return exits.OK
        steps = [str(entry.step) + (" (best)" if entry.is_best else "") for entry in client.checkpoints(found.run_id)]
    output.show_facts(_facts(found, steps))
    return exits.OK


def watch(
    run: str = typer.Argument("", metavar="[RUN]", help=RUN_HELP, show_default=False), as_json: bool = JsonOption
) -> int:
    """Follow a run until it rests; without RUN the one that trains now. Ctrl-C leaves it running."""
    from opd_daemon.client import Client

    with Client.find() as client:
        found = find_run(client, run) if run else _live_run(client)
        if found.state.resting:
            return _tell_result(client, found)
        return follow_to_end(client, found, as_json=as_json)


def stop(run: str = RunArgument) -> int:
    """Stop a run after its step, with a checkpoint."""
    from opd_daemon.client import Client

    with Client.find() as client:
        stopped = client.stop(find_run(client, run).run_id)
    output.say(f"{stopped.run_id}: {stopped.state}; go on with: opd resume {stopped.run_id}")
    return exits.OK


def resume(
    run: str = RunArgument,
    detach: bool = typer.Option(False, "--detach", "-d", help="Return at once; 'opd watch' follows the run."),
) -> int:
    """Take a stopped, failed or interrupted run up again from its last checkpoint, and follow it."""
    from opd_daemon.client import Client

    with Client.find() as client:
        resumed, step = client.resume(find_run(client, run).run_id)
        output.say(f"{resumed.run_id}: goes on after step {step} of {resumed.total_steps}")
        return exits.OK if detach else follow_to_end(client, resumed)


def metrics(
    run: str = RunArgument,
    stride: int = typer.Option(0, min=0, help="Every n-th step only; 0 chooses for about 20 lines."),
    as_json: bool = JsonOption,
) -> int:
    """Show a run's metrics by step and its evaluations."""
    from opd_daemon.client import Client

    with Client.find() as client:
        found = find_run(client, run)
        chosen = stride or (1 if as_json else max(1, found.step // 20))
        steps, evaluations, best = client.metrics(found.run_id, chosen)
    if as_json:
        output.show_json({"run_id": found.run_id, "steps": steps, "evaluations": evaluations, "best_checkpoint": best})
        return exits.OK
    columns = ("STEP", "LOSS", "KL", "AGREEMENT", "TOP-5", "H TEACHER", "H STUDENT", "TOK/S", "CACHE")
    output.show_table(columns, map(_metrics_row, steps), numbers=columns)
    if evaluations:
        output.show()
        held_out = (
            "HELD-OUT AFTER STEP",
            "FORWARD KL",
            "REVERSE KL",
            "AGREEMENT",
            "TOP-5",
            "H TEACHER",
            "H STUDENT",
            "OWN SAMPLES: REVERSE KL",
            "ACCEPTANCE",
        )
        output.show_table(held_out, map(_evaluation_row, evaluations), numbers=held_out)
    if best:
        output.say(f"best checkpoint: step {best.step}, {best.path}")
    return exits.OK


def delete(
    run: str = typer.Argument(metavar="RUN", help=RUN_HELP),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask."),
) -> int:
    """Remove a resting run with its checkpoints and metrics."""
    from opd_daemon.client import Client

    with Client.find() as client:
        found = find_run(client, run)
        if not yes and output.can_ask():
            typer.confirm(f"delete {found.run_id} with its checkpoints and metrics?", abort=True, err=True)
        client.delete(found.run_id)
    output.say(f"{found.run_id}: deleted")
    return exits.OK


def follow_to_end(client: Client, run: Run, *, as_json: bool = False) -> int:
    """Follow a run of a daemon that lives on; the exit code. Ctrl-C leaves the run alone and says so."""
    from opd_daemon.cli.follow import follow, show_end

    try:
        progress = follow(client, run, on_interrupt="detach", as_json=as_json)
    except KeyboardInterrupt:
        output.say(f"\nthe run goes on; 'opd watch {run.run_id}' looks again, 'opd stop {run.run_id}' stops it")
        return exits.INTERRUPTED
    return show_end(client, progress)


def _tell_result(client: Client, run: Run) -> int:
    from opd_daemon.cli.follow import end_lines
    from opd_daemon.cli.progress import RunProgress

    progress = RunProgress.of(run)
    progress.evaluations = client.metrics(run.run_id)[1]
    for line in end_lines(run, progress):
        output.say(line)
    return exits.of_state(run.state)


def _live_run(client: Client) -> Run:
    """The run that is furthest on, else the newest one."""
    found = list(client.runs())
    live = [run for run in found if not run.state.resting]
    return live[-1] if live else find_run(client, "last")


def _row(run: Run) -> tuple[str, ...]:
    latest = measured(run.latest_metrics or {})
    eta = "" if run.state.resting or run.seconds_remaining is None else text.duration(run.seconds_remaining)
    return (
        run.run_id,
        str(run.state),
        f"{run.step}/{run.total_steps}",
        _shown(latest, "kl_mean", "{:.3f}".format),
        _shown(latest, "agreement", text.percent),
        eta,
        text.day_and_clock(run.created_at),
    )


def _shown(metrics: dict[str, Any], name: str, write: Callable[[float], str]) -> str:
    """A number as it is written, or nothing where it wasn't measured."""
    return write(metrics[name]) if name in metrics else ""


def _metrics_row(step: dict[str, Any]) -> tuple[str, ...]:
    step = measured(step)
    asked = step["cache_hits"] + step["cache_misses"]
    return (
        str(step["step"]),
        f"{step['loss']:.4f}",
        _shown(step, "kl_mean", "{:.4f}".format),
        _shown(step, "agreement", text.percent),
        _shown(step, "top5_agreement", text.percent),
        _shown(step, "teacher_entropy", "{:.3f}".format),
        _shown(step, "student_entropy", "{:.3f}".format),
        f"{step['tokens_per_second']:.0f}",
        f"{step['cache_hits']}/{asked}" if asked else "",
    )


def _evaluation_row(entry: dict[str, Any]) -> tuple[str, ...]:
    own = entry.get("on_student")
    return (
        f"{entry['step']}{' *' if entry['is_best'] else ''}",
        f"{entry['forward_kl']:.4f}",
        f"{entry['reverse_kl']:.4f}",
        text.percent(entry["agreement"]),
        text.percent(entry["top5_agreement"]),
        f"{entry['teacher_entropy']:.3f}",
        f"{entry['student_entropy']:.3f}",
        f"{own['reverse_kl']:.4f}" if own else "",
        text.percent(own["acceptance"]) if own else "",
    )


def _facts(run: Run, checkpoints: list[str]) -> list[tuple[str, str]]:
    latest, plan = measured(run.latest_metrics or {}), run.plan
    share = f" ({100 * run.step / run.total_steps:.0f} %)" if run.total_steps else ""
    return [
        ("run", run.run_id),
        ("state", f"{run.state}{f', attempt {run.attempt + 1}' if run.attempt else ''}"),
        ("error", f"{run.error_reason}: {run.error_message}" if run.error_reason else ""),
        ("step", f"{run.step}/{run.total_steps}{share}"),
        ("ETA", text.duration(run.seconds_remaining) if run.seconds_remaining and not run.state.resting else ""),
        ("trainer", str(run.config.get("trainer", ""))),
        ("teacher", str(run.config.get("teacher_model_path", ""))),
        ("student", str(run.config.get("base_model_path", ""))),
        ("KL", _shown(latest, "kl_mean", "{:.4f}".format)),
        ("agreement", _shown(latest, "agreement", text.percent)),
        ("plan", f"{text.duration(plan.seconds)}, {text.size(plan.peak_bytes)} of memory" if plan else ""),
        ("checkpoints", ", ".join(checkpoints)),
        ("adapter", run.adapter_path),
        ("report", run.report_path),
        ("created", text.day_and_clock(run.created_at)),
        ("finished", text.day_and_clock(run.finished_at) if run.finished_at else ""),
    ]
