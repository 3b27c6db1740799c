"""Runs of the past: rows and events in a store, so that calls about runs find some without any training."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from opd_daemon.home import Home
from opd_daemon.store import Store
from opd_daemon.types import Event, EventKind, Run, RunState

NOW = datetime(2026, 11, 23, 10, 0, 0, tzinfo=UTC)
STATES = {
    "won": RunState.SUCCEEDED,
    "failed": RunState.FAILED,
    "stopped": RunState.STOPPED,
    "broken": RunState.INTERRUPTED,
}
CONFIG = {"base_model_path": "/m/student", "teacher_model_path": "/m/teacher", "prompts_path": "/d/prompts.jsonl"}


def with_past_runs(home: Home) -> None:
    """One run in every resting state, each with some metrics."""
    store = Store(home.database)
    for run_id, state in STATES.items():
        run = Run(run_id=run_id, state=state, config={**CONFIG, "run_id": run_id}, created_at=NOW, step=30)
        [outcome] = store.transact([lambda store, run=run: store.insert_run(run, _events(run), "")])
        if isinstance(outcome, Exception):
            raise outcome
    store.close()


def _events(run: Run) -> list[Event]:
    run_id, state = run.run_id, run.state
    told = [_event(EventKind.METRICS, run_id, step=step, loss=1.0 / step, total_steps=30) for step in range(1, 31)]
    return [*told, _event(EventKind.RUN_STATE, run_id, state=str(state), previous="RUNNING")]


def _event(kind: EventKind, run_id: str, **payload: Any) -> Event:
    return Event(kind, run_id, payload, NOW)
