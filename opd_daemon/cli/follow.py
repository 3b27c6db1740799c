"""Following a run until it rests: live on a terminal, a line per event elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

from opd_daemon.cli import exits, output
from opd_daemon.cli.plain import PlainView
from opd_daemon.cli.progress import RunProgress
from opd_daemon.cli.text import one_line
from opd_daemon.errors import OpdError
from opd_daemon.types import Event, Gauges, Run, RunState

if TYPE_CHECKING:
    from opd_daemon.client import Client

TICK_SECONDS = 1.0
OnInterrupt = Literal["detach", "stop"]


class View(Protocol):
    """What shows a run's progress."""

    def update(self, item: Event | Gauges) -> None:
        """An item the progress has taken."""

    def tick(self) -> None:
        """A second has passed."""

    def line(self, text: str) -> None:
        """One line from the command itself."""


def follow(client: Client, run: Run, *, on_interrupt: OnInterrupt, as_json: bool = False) -> RunProgress:
    """Show the run from its first event until it rests.

    On Ctrl-C: "detach" raises KeyboardInterrupt and leaves the run alone; "stop" stops the run with a checkpoint and
    goes on following it, and only a second Ctrl-C raises.
    """
    progress = RunProgress.of(run)
    with _view(progress, as_json=as_json) as view, _ticking(view), _interrupts(client, run, view, on_interrupt):
        for item in client.watch(
            0, run.run_id, on_lost=lambda error: view.line(f"connection lost, looking again: {error}")
        ):
            progress.take(item)
            view.update(item)
            if progress.finished:
                break
    return progress


def show_end(client: Client, progress: RunProgress) -> int:
    """Say on stderr how a run ended and what can be done next; the exit code."""
    run, _ = client.run(progress.run.run_id)
    for line in end_lines(run, progress):
        output.say(line)
    return exits.of_state(run.state)


def end_lines(run: Run, progress: RunProgress) -> Iterator[str]:
    """How the run ended, what it changed, and the next command."""
    if run.state is RunState.SUCCEEDED:
        yield f"{run.run_id}: done, {run.step} steps"
    else:
        why = f": {one_line(run.error_message, 500)}" if run.error_message else ""
        yield f"{run.run_id}: {run.state} at step {run.step} of {run.total_steps}{why}"
    if len(progress.evaluations) > 1:
        yield from gain_lines(progress.baseline, progress.evaluation)
    if run.adapter_path:
        yield f"adapter: {run.adapter_path}"
        model = run.config.get("base_model_path", "")
        yield f"use it:  mlx_lm.generate --model {model} --adapter-path {run.adapter_path} --prompt '…'"
    if run.report_path:
        yield f"report:  {run.report_path}"
    if run.state.resumable:
        yield f"go on:   opd resume {run.run_id}"


def gain_lines(before: dict[str, float], after: dict[str, float]) -> Iterator[str]:
    """Held-out metrics before and after, by their names."""
    rows = (
        ("forward KL", "forward_kl", "{:.4f}", 1),
        ("reverse KL", "reverse_kl", "{:.4f}", 1),
        ("agreement", "agreement", "{:.1f} %", 100),
        ("top-5 agreement", "top5_agreement", "{:.1f} %", 100),
    )
    for title, name, layout, factor in rows:
        shown = (layout.format(factor * values[name]) for values in (before, after))
        yield f"held-out {title:<15} {' → '.join(shown)}"


@contextmanager
def _view(progress: RunProgress, *, as_json: bool) -> Iterator[View]:
    if as_json:
        yield _JsonView()
    elif output.is_terminal():
        from opd_daemon.cli.live import LiveView

        with LiveView(progress, output.console()) as view:
            yield view
    else:
        yield PlainView(progress, output.show)


class _JsonView:
    """One JSON document a line: events and readings as they come."""

    def update(self, item: Event | Gauges) -> None:
        """Write the item."""
        output.show_json_line(item)

    def tick(self) -> None:
        """Nothing: programs need no sign of life."""

    def line(self, text: str) -> None:
        """Words go to stderr."""
        output.say(text)


@contextmanager
def _ticking(view: View) -> Iterator[None]:
    """Call `view.tick` once a second from a thread of its own, as the watch blocks this one."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(TICK_SECONDS):
            view.tick()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _interrupts(client: Client, run: Run, view: View, what: OnInterrupt) -> AbstractContextManager[None]:
    def stop() -> None:
        view.line("stopping after this step, with a checkpoint; Ctrl-C again leaves at once")
        try:
            client.stop(run.run_id)
        except OpdError as error:
            view.line(f"could not be stopped: {error}")

    def first() -> None:
        # The signal may have come in the middle of a write or a call, which must not be entered again from here.
        threading.Thread(target=stop, daemon=True).start()

    return _on_first_interrupt(first if what == "stop" else None)


@contextmanager
def _on_first_interrupt(action: Callable[[], None] | None) -> Iterator[None]:
    """Run `action` at the first Ctrl-C; from the second on, or without an action, raise KeyboardInterrupt."""
    if action is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        action()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
