"""What must be true of a home whatever was killed when: its log, states of runs, files, and what was acknowledged."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from opd_daemon.distill.checkpoints import read_progress, step_folders
from opd_daemon.home import Home
from opd_daemon.models.folder import read_header
from opd_daemon.runs.states import TRANSITIONS
from opd_daemon.store import Store
from opd_daemon.types import Event, EventKind, Run, RunState


@dataclass
class Promises:
    """What clients were told: runs by request, deleted runs, states reached after a stop or a resume."""

    created: dict[str, str] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    attempts: dict[str, int] = field(default_factory=dict)
    stopped: set[tuple[str, int]] = field(default_factory=set)


@dataclass
class Findings:
    """How often a promise was checked, and what was found broken."""

    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    disordered: list[str] = field(default_factory=list)
    illegal: list[str] = field(default_factory=list)
    half_written: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    events: int = 0
    acknowledged: int = 0

    @property
    def broken(self) -> list[str]:
        named = {
            "lost": self.lost,
            "twice": self.twice,
            "disordered": self.disordered,
            "illegal": self.illegal,
            "half written": self.half_written,
            "orphan": self.orphans,
        }
        return [f"{name}: {entry}" for name, entries in named.items() for entry in entries]


def examine(home: Home, promises: Promises, findings: Findings) -> None:
    """Look at everything on disk while no daemon runs."""
    store = Store(home.database)
    try:
        events, cursor = [], 0
        while batch := store.events_after(cursor)[0]:
            events += batch
            cursor = batch[-1].revision
        runs = {stored.run.run_id: stored.run for stored in store.list_runs(limit=-1)}
        deleting = set(store.deleted_runs())
    finally:
        store.close()
    findings.events = len(events)
    check_order(events, findings)
    check_numbers(events, home.root.parent / "acknowledged", findings)
    check_states(events, runs, findings)
    check_promises(events, runs, promises, findings)
    check_files(home, set(runs), deleting, findings)


def check_order(events: Sequence[Event], findings: Findings) -> None:
    """Revisions rise by one, from 1."""
    for place, event in enumerate(events, start=1):
        if event.revision != place:
            kind = findings.twice if event.revision < place else findings.lost
            kind.append(f"revision {event.revision} at place {place}")
            return


def check_numbers(events: Sequence[Event], folder: Path, findings: Findings) -> None:
    """Each attempt's numbered events are 1, 2, 3 … without a gap, and reach what was acknowledged."""
    said: dict[tuple[str, int], int] = defaultdict(int)
    for event in events:
        attempt, point, number = str(event.payload.get("text", "")).partition(".")
        if event.kind is not EventKind.LOG or not point or not attempt.isdecimal() or not number.isdecimal():
            continue
        key = (event.run_id, int(attempt))
        if int(number) <= said[key]:
            findings.twice.append(f"{key} said {number} after {said[key]}")
        elif int(number) > said[key] + 1:
            findings.disordered.append(f"{key} said {number} after {said[key]}")
        said[key] = int(number)
    findings.acknowledged = 0
    for path in folder.glob("*"):
        best: dict[int, int] = {}
        for line in path.read_text().split():
            attempt, _, number = line.partition(".")
            best[int(attempt)] = int(number)
        for attempt_number, number_acknowledged in best.items():
            findings.acknowledged += number_acknowledged
            if said[path.name, attempt_number] < number_acknowledged:
                findings.lost.append(f"{path.name} attempt {attempt_number}: {number_acknowledged} was acknowledged")


def check_states(events: Sequence[Event], runs: dict[str, Run], findings: Findings) -> None:
    """Every run goes along the table of transitions, and its row agrees with the last event."""
    states: dict[str, RunState] = {}
    for event in events:
        if event.kind is not EventKind.RUN_STATE:
            continue
        state, before = RunState(event.payload["state"]), states.get(event.run_id)
        named = event.payload["previous"]
        if (before or None) != (RunState(named) if named else None):
            findings.illegal.append(f"{event.run_id}: {state} says it follows {named}, but {before} was there")
        if before and state not in TRANSITIONS[before]:
            findings.illegal.append(f"{event.run_id}: {before} became {state}")
        states[event.run_id] = state
    for run_id, run in runs.items():
        if states.get(run_id) is not run.state:
            findings.illegal.append(f"{run_id}: its row says {run.state}, the log {states.get(run_id)}")


def check_promises(events: Sequence[Event], runs: dict[str, Run], promises: Promises, findings: Findings) -> None:
    """What clients were told is still so."""
    told = {(event.run_id, event.payload["attempt"]) for event in events if event.kind is EventKind.RUN_STATE}
    ended = {
        (event.run_id, event.payload["attempt"])
        for event in events
        if event.kind is EventKind.RUN_STATE and event.payload["state"] in ("STOPPING", "STOPPED")
    }
    for request_id, run_id in promises.created.items():
        if (run_id, 0) not in told:
            findings.lost.append(f"request {request_id}: run {run_id} was accepted")
    by_request: dict[str, list[str]] = defaultdict(list)
    for run in runs.values():
        by_request[run.request_id].append(run.run_id)
    findings.twice += [f"request {name}: runs {ids}" for name, ids in by_request.items() if name and len(ids) > 1]
    findings.lost += [
        f"{run_id}: its attempt {number}"
        for run_id, number in promises.attempts.items()
        if (run_id, number) not in told
    ]
    findings.lost += [f"{entry}: its stop" for entry in promises.stopped if entry not in ended]
    findings.lost += [f"{run_id}: its deletion" for run_id in promises.deleted & set(runs)]


def check_files(home: Home, known: set[str], deleting: set[str], findings: Findings) -> None:
    """What has a final name is complete, and belongs to somebody."""
    names = [path.stem for path in home.root.glob("configs/*.yaml")]
    names += [path.name for path in home.root.glob("checkpoints/*")]
    findings.half_written += [f"{name}: files of no run" for name in names if name not in known | deleting]
    whole: list[tuple[Path, Callable[[Path], object]]] = []
    whole += [(path, read_yaml) for path in home.root.glob("configs/*.yaml")]
    whole += [(path, read_rows) for path in home.root.glob("metrics/*.jsonl")]
    whole += [(path, read_page) for path in home.root.glob("reports/*.html")]
    whole += [(path, read_header) for path in (home.root.parent / "out").glob("*.safetensors")]
    for folder in home.root.glob("checkpoints/*"):
        if folder.name not in deleting:
            whole += [(path, read_progress) for path in step_folders(folder)]
            whole += [(path, read_header) for path in folder.glob("[bf]*/adapters.safetensors")]
    for path, read in whole:
        try:
            read(path)
        except Exception as fault:  # noqa: BLE001 - whatever is wrong with it
            findings.half_written.append(f"{path}: {fault!r}")


def read_yaml(path: Path) -> None:
    if not isinstance(yaml.safe_load(path.read_text()), dict):
        raise TypeError("no mapping")


def read_rows(path: Path) -> None:
    """Every line but the last is a row: that one may be on its way."""
    for line in path.read_text().splitlines()[:-1]:
        json.loads(line)


def read_page(path: Path) -> None:
    if not path.read_text().endswith("</html>"):
        raise ValueError("no end")
