"""Runs and events as the store's rows hold them, and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from opd_daemon.types import Event, EventKind, Plan, PlannedBytes, Run, RunState


def time_text(time: datetime) -> str:
    """A time as it is stored: UTC, to the microsecond."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def read_event(row: tuple[Any, ...]) -> Event:
    """The event of a row: revision, run, kind, time, payload."""
    revision, run_id, kind, time, payload = row[:5]
    return Event(EventKind(kind), run_id, json.loads(payload), datetime.fromisoformat(time), revision)


def document_of(run: Run) -> str:
    """A run as it is stored."""
    return json.dumps(asdict(run), default=time_text)


def read_run(document: str) -> Run:
    """The run that was stored as this document."""
    values = json.loads(document)
    for name in ("created_at", "started_at", "finished_at"):
        values[name] = datetime.fromisoformat(values[name]) if values[name] else None
    values["plan"] = _plan(values["plan"]) if values["plan"] else None
    return Run(**{**values, "state": RunState(values["state"])})


def _plan(values: dict[str, Any]) -> Plan:
    """A plan as it was stored; one of an earlier version lacks what that didn't know."""
    sentences = {name: tuple(values.get(name, ())) for name in ("assumptions", "warnings", "advice")}
    parts = {name: tuple(PlannedBytes(**part) for part in values.get(name, ())) for name in ("memory", "disk")}
    phases = tuple((name, seconds) for name, seconds in values.get("phases", ()))
    return Plan(**{**values, **sentences, **parts, "phases": phases})
