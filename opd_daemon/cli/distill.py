"""`opd distill`: check, plan, start and follow a run; the same command again takes an unfinished one up."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from opd_daemon.cli import exits, output, text
from opd_daemon.errors import OpdError, Reason

if TYPE_CHECKING:
    from opd_daemon.cli.request import DistillRequest
    from opd_daemon.client import Client
    from opd_daemon.config import RunConfig
    from opd_daemon.types import Plan, Run


def distill(
    config: Path = typer.Argument(metavar="CONFIG.yaml", help="The run's configuration.", show_default=False),
    *,
    preset: str = typer.Option("", "--preset", "-p", help="fast, quality or memory; the file's own values win."),
    settings: list[str] = typer.Option(
        [], "--set", "-s", metavar="NAME=VALUE", help="Set one value, as in --set num_steps=200 --set lora.rank=8."
    ),
    check: bool = typer.Option(False, "--check", help="Check and plan only; start nothing."),
    serve: bool = typer.Option(False, "--serve", help="Run a daemon for as long as this command takes, if none runs."),
    detach: bool = typer.Option(False, "--detach", "-d", help="Return once the run is accepted."),
    again: bool | None = typer.Option(
        None, "--resume/--new", help="If this configuration has an unfinished run: take it up, or start anew."
    ),
    force: bool = typer.Option(False, "--force", help="Start although the plan says that memory won't do."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Answer every question with yes."),
) -> int:
    """Distil: check everything, show the plan, train, and show how KL and agreement change.

    Paths in the file are relative to the file. Ctrl-C leaves the run to the daemon; with --serve it stops the run with
    a checkpoint. The same command again takes the run up from there. A daemon on another machine gets the prompts
    sent, and the adapter comes back; models are named by their absolute paths there.
    """
    from opd_daemon.cli.elsewhere import as_it_is_there, fetch_adapter
    from opd_daemon.cli.request import read_request

    request = read_request(config, preset, settings)
    valid = request.config()
    if serve and detach:
        raise typer.BadParameter("a daemon that ends with this command can't be left alone", param_hint="--detach")
    with daemon_in_use(serve=serve, yes=yes) as daemon:
        choices = Choices(again=again, yes=yes, check=check, force=force)
        chosen = choose_run(daemon.client, request, as_it_is_there(daemon.client, valid), choices)
        if isinstance(chosen, int):
            return chosen
        if detach:
            output.say(f"{chosen.run_id}: accepted; 'opd watch {chosen.run_id}' follows it")
            return exits.OK
        code = _follow(daemon, chosen)
        if code == exits.OK:
            fetch_adapter(daemon.client, valid, chosen.run_id)
        return code


@dataclass(frozen=True, slots=True)
class Choices:
    """Answers given beforehand on the command line."""

    again: bool | None
    yes: bool
    check: bool
    force: bool = False


@dataclass(frozen=True, slots=True)
class DaemonInUse:
    """The daemon of this command; `ours` when it ends with the command."""

    client: Client
    ours: bool


@contextmanager
def daemon_in_use(*, serve: bool, yes: bool) -> Iterator[DaemonInUse]:
    """The running daemon, or one of our own when that is wanted.

    Raises:
        OpdError: DAEMON_NOT_RUNNING when there is none and none is wanted.
    """
    from opd_daemon.client import Client, LocalDaemon
    from opd_daemon.home import Home

    try:
        client = Client.find()
    except OpdError as error:
        if error.reason is not Reason.DAEMON_NOT_RUNNING:
            raise
        if not serve and not _wants_daemon(error, yes=yes):
            raise OpdError(error.reason, f"{error.message}, or add --serve to run one for this command") from None
    else:
        with client:
            yield DaemonInUse(client, ours=False)
        return
    home = Home.default()
    output.say(f"starting a daemon for {home.root} that ends with this command")
    with LocalDaemon(home, stop_patience=90.0) as daemon, daemon.client() as client:
        yield DaemonInUse(client, ours=True)


def _wants_daemon(error: OpdError, *, yes: bool) -> bool:
    if yes:
        return True
    if not output.can_ask():
        return False
    output.say(error.message)
    return typer.confirm("run one for this command?", default=True, err=True)


def choose_run(client: Client, request: DistillRequest, valid: RunConfig, choices: Choices) -> Run | int:
    """The run to follow: one under way, one taken up again, or a new one; an exit code when there is none to follow."""
    earlier = None if choices.check or choices.again is False else same_run(client, valid)
    if earlier is not None and not earlier.state.resting:
        output.say(f"{earlier.run_id} runs this configuration already (--new starts another)")
        return earlier
    if earlier is not None and earlier.state.resumable:
        decision = _resume_or_not(earlier, choices)
        if decision is None:
            return exits.STOPPED
        if decision:
            run, step = client.resume(earlier.run_id)
            output.say(f"{run.run_id}: goes on after step {step} of {run.total_steps}")
            return run
    return _create(client, request, valid, choices)


def same_run(client: Client, config: RunConfig) -> Run | None:
    """The newest run of this very configuration, whatever its name."""
    wanted = _identity(config)
    return next((run for run in client.runs() if _identity_of(run) == wanted), None)


def _identity(config: RunConfig) -> dict[str, object]:
    return config.model_dump(mode="json", exclude={"run_id"})


def _identity_of(run: Run) -> dict[str, object] | None:
    from opd_daemon.config import parse_config

    try:
        return _identity(parse_config(run.config))
    except OpdError:  # a run of another version, whose configuration means something else today
        return None


def _resume_or_not(run: Run, choices: Choices) -> bool | None:
    """Whether to take the run up again; None when nobody can say."""
    if choices.again or choices.yes:
        return True
    where = f"{run.run_id} of this configuration is {run.state} at step {run.step} of {run.total_steps}"
    if not output.can_ask():
        output.say(f"{where}; take it up with: opd resume {run.run_id} (or repeat with --resume or --new)")
        return None
    output.say(where)
    return typer.confirm("take it up from there?", default=True, err=True)


def _create(client: Client, request: DistillRequest, valid: RunConfig, choices: Choices) -> Run | int:
    values = valid.model_dump(mode="json", exclude_unset=True)
    try:
        planned, _ = client.create_run(values, validate_only=True)
        if planned.plan:
            show_plan(planned.plan)
        if choices.check:
            return exits.OK
        risky = bool(planned.plan and planned.plan.warnings) and not choices.yes
        if risky and output.can_ask() and not typer.confirm("start nevertheless?", default=True, err=True):
            return exits.OK
        return client.create_run(values, request_id=str(uuid.uuid4()), force=choices.force)[0]
    except OpdError as error:
        raise request.placed(error) if error.violations else error from None


def show_plan(plan: Plan) -> None:
    """What the run will take, in short, on stderr; 'opd plan' shows all of it."""
    phases = ", ".join(f"{name} {text.duration(seconds)}" for name, seconds in plan.phases if seconds >= 1)
    memory = f"{text.size(plan.daemon_peak_bytes)} daemon + {text.size(plan.worker_peak_bytes)} worker"
    output.say(f"plan:   {text.duration(plan.seconds)} ({phases})")
    output.say(f"memory: {text.size(plan.peak_bytes)} ({memory}) of {text.size(plan.available_bytes)}")
    output.say(f"disk:   {text.size(plan.disk_bytes)}")
    for name, lines in (("assumed", plan.assumptions), ("warning", plan.warnings), ("advice", plan.advice)):
        for line in lines if name != "advice" or plan.warnings else ():
            output.say(f"  {name}: {line}")


def _follow(daemon: DaemonInUse, run: Run) -> int:
    from opd_daemon.cli.follow import follow, show_end
    from opd_daemon.cli.runs import follow_to_end

    if not daemon.ours:
        return follow_to_end(daemon.client, run)
    return show_end(daemon.client, follow(daemon.client, run, on_interrupt="stop"))
