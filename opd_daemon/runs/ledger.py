"""Writing down what happens to runs: a run's row and the events that tell of the change, always together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from opd_daemon.errors import invalid
from opd_daemon.events import EventLog
from opd_daemon.plugins import PluginRegistry
from opd_daemon.readable import shortened
from opd_daemon.runs.states import conflict, moved
from opd_daemon.store import Store
from opd_daemon.types import Event, EventKind, Run, RunState

FROM_WORKERS = frozenset(EventKind) - {EventKind.RUN_STATE, EventKind.TEACHER}
STEPPED = frozenset({EventKind.METRICS, EventKind.EVALUATION, EventKind.CHECKPOINT})
# Every watcher gets every event, and lists carry a run's error: what is longer stays in the run's own log.
MOST_CHARACTERS = 8000
LONGEST_REASON = 100
LONGEST_PATH, LONGEST_NAME = 4096, 255


class Ledger:
    """The one writer of run rows. Plugins hear of every run that comes to rest."""

    def __init__(self, events: EventLog, plugins: PluginRegistry) -> None:
        self._events = events
        self._plugins = plugins

    async def get(self, run_id: str) -> Run:
        """The run. Raises RUN_NOT_FOUND."""
        return await self._events.read(lambda store: store.get_run(run_id))

    async def enter(
        self, run_id: str, state: RunState, *, message: str = "", error_reason: str = "", **changes: Any
    ) -> Run:
        """Move a run to another state, with further changes of its row.

        Raises:
            OpdError: RUN_NOT_FOUND, RUN_STATE_CONFLICT.
        """
        return await self.change(
            run_id,
            lambda run: moved(
                replace(run, **changes),
                state,
                message=shortened(message, MOST_CHARACTERS),
                error_reason=error_reason[:LONGEST_REASON],
            ),
        )

    async def change(
        self,
        run_id: str,
        decide: Callable[[Run], tuple[Run, Event] | None],
        also: Callable[[Store], None] = lambda _: None,
    ) -> Run:
        """Decide on the run as it is stored now, and store the decision, in one transaction; None leaves it alone."""

        def action(store: Store) -> tuple[Run, bool]:
            before = store.get_run(run_id)
            decision = decide(before)
            if decision is None:
                return before, False
            run, event = decision
            also(store)
            store.write(run, [event])
            return run, run.state.resting and not before.state.resting

        run, rested = await self._events.commit(action)
        if rested:
            self._events.forget_gauges(run_id)
            self._plugins.after_run_finished(run)
        return run

    async def report(self, run_id: str, *events: Event) -> int:
        """Store events of a run's worker and what they say about the run; returns the revision of the last.

        Long texts are shortened.

        Raises:
            OpdError: RUN_STATE_CONFLICT when the run is not live; INVALID_REQUEST for an event no worker may send.
        """
        for event in events:
            _check(event)
        bounded = [_bounded(event) for event in events]

        def action(store: Store) -> int:
            run = store.get_run(run_id)
            if run.state.resting or run.state is RunState.PENDING:
                raise conflict(run, "takes no events")
            for event in bounded:
                run = told(run, event)
            return store.write(run, bounded)[-1].revision

        return await self._events.commit(action) if events else await self._events.revision()


def told(run: Run, event: Event) -> Run:
    """The run with what one event of its worker says about it."""
    entry = event.payload
    if event.kind is EventKind.METRICS:
        remaining = entry.get("seconds_remaining")
        return replace(
            run,
            step=entry["step"],
            total_steps=entry.get("total_steps") or run.total_steps,
            seconds_remaining=remaining if remaining is not None and math.isfinite(remaining) else None,
            latest_metrics=entry,
        )
    if event.kind is EventKind.CHECKPOINT:
        if entry.get("is_best"):
            return replace(run, best_step=entry["step"])
        if entry.get("is_final"):
            return replace(run, adapter_path=entry["path"])
        return replace(run, checkpoint_step=entry["step"])
    return run


def _check(event: Event) -> None:
    if event.kind not in FROM_WORKERS:
        raise invalid("event.kind", f"{event.kind}: the daemon writes these events itself")
    if event.kind in STEPPED and not isinstance(event.payload.get("step"), int):
        raise invalid("event.step", f"{event.payload.get('step')!r}: a {event.kind} event names its step")
    if event.kind is EventKind.CHECKPOINT:
        check_path("event.path", event.payload.get("path") or "")


def check_path(field: str, path: str) -> None:
    """Raise INVALID_REQUEST for what no disk takes for a path."""
    written = path.encode("utf-8", "surrogateescape")
    sound = written and b"\0" not in written and max(map(len, written.split(b"/"))) <= LONGEST_NAME
    if not sound or len(written) > LONGEST_PATH:
        most = f"of at most {LONGEST_PATH} bytes, with names of at most {LONGEST_NAME}"
        raise invalid(field, f"{shortened(path, LONGEST_REASON)!r}: name a folder, {most}")


def _bounded(event: Event) -> Event:
    """The event with texts that everyone can be sent."""
    payload = {
        name: shortened(value, MOST_CHARACTERS) if isinstance(value, str) else value
        for name, value in event.payload.items()
    }
    return replace(event, payload=payload)
