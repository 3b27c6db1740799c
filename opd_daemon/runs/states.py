"""The life of a run as one table, and what each step of it changes in the run's row."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import RESTING, Event, EventKind, Run, RunState

S = RunState
TRANSITIONS: dict[RunState, frozenset[RunState]] = {
    S.PENDING: frozenset({S.PLANNING, S.STOPPED}),
    S.PLANNING: frozenset({S.LOADING, S.STOPPING, S.STOPPED, S.FAILED, S.INTERRUPTED}),
    # To LOADING once more: memory ran out, and another worker goes on with smaller micro-batches.
    S.LOADING: frozenset({S.LOADING, S.RUNNING, S.STOPPING, *RESTING}),
    S.RUNNING: frozenset({S.LOADING, S.STOPPING, *RESTING}),
    # A stop may come when the last step is being made: then the run has succeeded.
    S.STOPPING: frozenset(RESTING),
    S.STOPPED: frozenset({S.PENDING}),
    S.FAILED: frozenset({S.PENDING}),
    S.INTERRUPTED: frozenset({S.PENDING}),
    S.SUCCEEDED: frozenset(),
}
LIVE = frozenset({S.PLANNING, S.LOADING, S.RUNNING, S.STOPPING})
UNHAPPY = frozenset({S.FAILED, S.INTERRUPTED})


def moved(run: Run, state: RunState, *, message: str = "", error_reason: str = "") -> tuple[Run, Event]:
    """The run in its next state, and the event that tells of it.

    Raises:
        OpdError: RUN_STATE_CONFLICT when the table has no such transition.
    """
    if state not in TRANSITIONS[run.state]:
        raise conflict(run, f"can't become {state}")
    now = datetime.now(UTC)
    fresh = replace(
        run,
        state=state,
        started_at=run.started_at or (now if state in LIVE else None),
        finished_at=now if state.resting else None,
        seconds_remaining=None if state.resting else run.seconds_remaining,
        error_reason=error_reason if state in UNHAPPY else "",
        error_message=message if state in UNHAPPY else "",
    )
    return fresh, state_event(fresh, previous=run.state, message=message, error_reason=error_reason)


def state_event(run: Run, *, previous: RunState | None = None, message: str = "", error_reason: str = "") -> Event:
    """The RUN_STATE event of a run's present state."""
    payload = {
        "state": str(run.state),
        "previous": str(previous) if previous else None,
        "message": message,
        "error_reason": error_reason,
        "attempt": run.attempt,
    }
    return Event(EventKind.RUN_STATE, run.run_id, payload, datetime.now(UTC))


def conflict(run: Run, why: str) -> OpdError:
    """The error for a wish that the run's state does not allow."""
    message = f"run {run.run_id!r} is {run.state} and {why}"
    return OpdError(Reason.RUN_STATE_CONFLICT, message, run_id=run.run_id, state=run.state)
