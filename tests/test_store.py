"""The store keeps a run and its events together, numbers events without a gap, and refuses files it can't trust."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from opd_daemon import schema
from opd_daemon.errors import OpdError, Reason
from opd_daemon.store import PAGE_BYTES, Store, WorkerRecord
from opd_daemon.types import Event, EventKind, Plan, PlannedBytes, Run, RunState

NOW = datetime(2026, 11, 23, 10, 0, 0, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "opd.db")
    yield opened
    opened.close()


def make_run(run_id: str = "r1", **changes: Any) -> Run:
    return replace(Run(run_id=run_id, state=RunState.PENDING, config={"seed": 1}, created_at=NOW), **changes)


def log_event(text: str = "hello", run_id: str = "r1") -> Event:
    return Event(EventKind.LOG, run_id, {"level": "info", "text": text}, NOW)


def metrics_event(step: int, loss: float = 0.5, kind: EventKind = EventKind.METRICS) -> Event:
    return Event(kind, "r1", {"step": step, "loss": loss}, NOW)


def checkpoint_event(step: int, path: str, **flags: Any) -> Event:
    return Event(EventKind.CHECKPOINT, "r1", {"step": step, "path": path, "bytes": 10, **flags}, NOW)


def add_run(store: Store, run: Run | None = None, digest: str = "d") -> None:
    run = run or make_run()
    [outcome] = store.transact([lambda store: store.insert_run(run, [log_event("created", run.run_id)], digest)])
    if isinstance(outcome, Exception):
        raise outcome


def test_a_run_comes_back_exactly_as_it_was_stored(tmp_path: Path) -> None:
    run = make_run(
        plan=Plan(1.5, 10, 20, 30, 40, ("a", "b"), ("w",), (("train", 1.0),), (PlannedBytes("daemon", "t", 3),)),
        memory_halvings=2,
        started_at=NOW + timedelta(seconds=1),
        seconds_remaining=12.5,
        latest_metrics={"loss": 1.0},
        best_step=3,
    )
    store = Store(tmp_path / "opd.db")
    add_run(store, run)
    store.close()
    again = Store(tmp_path / "opd.db")
    assert again.get_run("r1") == run
    assert again.store_id == store.store_id
    again.close()


def test_revisions_rise_by_exactly_one(store: Store) -> None:
    first = store.apply(None, [log_event(), log_event()])
    second = store.apply(None, [log_event()])
    assert [event.revision for event in [*first, *second]] == [1, 2, 3]
    assert store.events_after(0) == ([*first, *second], 3)


def test_a_run_and_its_events_are_stored_together_or_not_at_all(store: Store) -> None:
    with pytest.raises(OpdError) as caught:
        store.apply(make_run("unknown"), [log_event()])
    assert caught.value.reason is Reason.RUN_NOT_FOUND
    assert store.newest_revision() == 0


def test_a_failing_action_leaves_the_others_of_its_transaction(store: Store) -> None:
    actions: list[Callable[[Store], list[Event]]] = [
        lambda store: store.write(None, [log_event("a")]),
        lambda store: store.write(make_run("unknown"), [log_event("b")]),
        lambda store: store.write(None, [log_event("c")]),
    ]
    outcomes = store.transact(actions)
    assert isinstance(outcomes[1], OpdError)
    events, _ = store.events_after(0)
    assert [(event.revision, event.payload["text"]) for event in events] == [(1, "a"), (2, "c")]


def test_events_stored_together_are_never_split(store: Store) -> None:
    store.apply(None, [log_event(str(number)) for number in range(5)])
    store.apply(None, [log_event("next")])
    events, cursor = store.events_after(0, limit=2)
    assert len(events) == 5
    assert cursor == 5


def test_a_page_of_large_events_is_one_that_clients_take(store: Store) -> None:
    for number in range(8):
        store.apply(None, [log_event(f"{number}" * (PAGE_BYTES // 3))])
    seen, cursor, pages = [], 0, 0
    while cursor < store.newest_revision():
        events, cursor = store.events_after(cursor)
        assert len(events) == 3 or cursor == 8
        seen += [event.revision for event in events]
        pages += 1
    assert seen == list(range(1, 9))
    assert pages == 3


def test_a_filter_moves_the_cursor_past_strangers(store: Store) -> None:
    store.apply(None, [log_event(run_id="r1")])
    store.apply(None, [log_event(run_id="other") for _ in range(3)])
    events, cursor = store.events_after(0, "r1")
    assert [event.revision for event in events] == [1]
    assert cursor == 4
    assert store.events_after(4, "r1") == ([], 4)


def test_numbers_that_json_lacks_survive(store: Store) -> None:
    store.apply(None, [metrics_event(1, math.nan), metrics_event(2, math.inf)])
    first, second = store.metrics("r1", EventKind.METRICS)
    assert math.isnan(first.payload["loss"])
    assert second.payload["loss"] == math.inf


def test_metrics_of_a_repeated_step_are_those_of_the_last_time(store: Store) -> None:
    store.apply(None, [metrics_event(1, 9.0), metrics_event(1, 1.0), metrics_event(2)])
    assert [event.payload["loss"] for event in store.metrics("r1", EventKind.METRICS)] == [1.0, 0.5]


def test_thinned_metrics_keep_the_first_and_the_last(store: Store) -> None:
    store.apply(None, [metrics_event(step) for step in range(1, 24)])
    thinned = store.metrics("r1", EventKind.METRICS, stride=10)
    assert [event.payload["step"] for event in thinned] == [1, 10, 20, 23]


def test_metrics_come_in_pages_by_step(store: Store) -> None:
    store.apply(None, [metrics_event(step) for step in range(1, 6)])
    page = store.metrics("r1", EventKind.METRICS, after_step=2, limit=2)
    assert [event.payload["step"] for event in page] == [3, 4]


def test_rewinding_forgets_what_a_resumed_run_makes_again(store: Store) -> None:
    store.apply(None, [metrics_event(step) for step in range(1, 6)])
    store.apply(None, [checkpoint_event(3, "/c/step_000003"), checkpoint_event(5, "/c/step_000005")])
    store.transact([lambda store: store.rewind("r1", 3)])
    assert [event.payload["step"] for event in store.metrics("r1", EventKind.METRICS)] == [1, 2, 3]
    assert [entry.step for entry in store.checkpoints("r1")] == [3]


def test_only_one_checkpoint_is_the_best(store: Store) -> None:
    store.apply(
        None,
        [
            checkpoint_event(1, "/c/best", is_best=True, validation_kl=0.5),
            checkpoint_event(1, "/c/step_000001"),
            checkpoint_event(2, "/c/best", is_best=True, validation_kl=0.25),
            checkpoint_event(3, "/c/final", is_final=True),
        ],
    )
    found = [(entry.step, entry.path, entry.is_best, entry.is_final) for entry in store.checkpoints("r1")]
    assert found == [(1, "/c/step_000001", False, False), (2, "/c/best", True, False), (3, "/c/final", False, True)]
    assert store.checkpoints("r1")[1].validation_kl == 0.25


def test_runs_are_listed_newest_first_in_pages_and_by_state(store: Store) -> None:
    for number in range(4):
        # The clock may jump back: the order of creation is the order of acceptance.
        add_run(store, make_run(f"r{number}", created_at=NOW - timedelta(hours=number)))
    store.apply(make_run("r2", state=RunState.STOPPED), [])
    first = store.list_runs(limit=2)
    assert [stored.run.run_id for stored in first] == ["r3", "r2"]
    rest = store.list_runs(limit=2, before=first[-1].revision)
    assert [stored.run.run_id for stored in rest] == ["r1", "r0"]
    pending = store.list_runs({RunState.PENDING}, oldest_first=True)
    assert [stored.run.run_id for stored in pending] == ["r0", "r1", "r3"]


def test_a_request_id_finds_its_run_and_refuses_another_body(store: Store) -> None:
    add_run(store, make_run(request_id="once"), "digest")
    found = store.run_by_request_id("once", "digest")
    assert found is not None
    assert found.run.run_id == "r1"
    assert store.run_by_request_id("never", "digest") is None
    with pytest.raises(OpdError) as caught:
        store.run_by_request_id("once", "another")
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert "'r1'" in str(caught.value)


def test_deleting_a_run_leaves_the_log_without_a_gap(store: Store) -> None:
    add_run(store)
    store.apply(None, [metrics_event(1)])
    store.transact([lambda store: store.delete_run("r1")])
    assert not store.has_run("r1")
    assert store.metrics("r1", EventKind.METRICS) == []
    assert [event.revision for event in store.events_after(0)[0]] == [1, 2]


@pytest.mark.parametrize("again", ["r1", "R1"])
def test_a_new_run_of_a_deleted_ones_name_keeps_its_files(store: Store, again: str) -> None:
    add_run(store)
    store.transact([lambda store: store.delete_run("r1")])
    assert store.deleted_runs() == ["r1"]
    add_run(store, make_run(again))
    assert store.deleted_runs() == []


def test_compacting_forgets_old_events_but_no_metrics(store: Store) -> None:
    store.apply(None, [metrics_event(step) for step in (1, 2)])
    store.apply(None, [metrics_event(step) for step in (3, 4)])
    assert store.compact(3) == 3
    assert [event.revision for event in store.events_after(2)[0]] == [3, 4]
    assert len(store.metrics("r1", EventKind.METRICS)) == 4


def test_compacting_never_cuts_what_was_stored_together(store: Store) -> None:
    store.apply(None, [log_event(), log_event(), log_event()])
    assert store.compact(2) == 1


def test_the_file_shrinks_by_many_pages_at_a_time(store: Store) -> None:
    for _ in range(100):
        store.apply(None, [log_event("x" * 8000)])
    store.compact(1000)
    assert store._value("PRAGMA freelist_count") > 150
    assert not store.shrink()
    assert store._value("PRAGMA freelist_count") == 0


def test_revisions_go_on_after_everything_was_compacted(store: Store, tmp_path: Path) -> None:
    store.apply(None, [log_event()] * 3)
    assert store.compact(100) == 4
    assert (store.oldest_revision(), store.newest_revision()) == (4, 3)
    assert store.apply(None, [log_event()])[0].revision == 4


def test_workers_are_remembered_until_they_are_seen_to_end(store: Store) -> None:
    worker = WorkerRecord("r1", 123, 4.5)
    store.transact([lambda store: store.put_worker(worker)])
    assert store.workers() == [worker]
    store.transact([lambda store: store.forget_worker("r1")])
    assert store.workers() == []


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "opd.db").close()
    database = sqlite3.connect(tmp_path / "opd.db")
    database.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    database.close()
    with pytest.raises(OpdError, match="newer opd") as caught:
        Store(tmp_path / "opd.db")
    assert caught.value.reason is Reason.STORE_UNUSABLE


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 4096])
def test_a_file_that_is_no_store_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "opd.db").write_bytes(content)
    with pytest.raises(OpdError, match=r"opd\.db.*move it away") as caught:
        Store(tmp_path / "opd.db")
    assert caught.value.reason is Reason.STORE_UNUSABLE


def test_a_full_disk_is_said_and_nothing_is_half_stored(store: Store) -> None:
    store.apply(None, [log_event()])
    pages = store._value("PRAGMA page_count")
    store._database.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(OpdError) as caught:
        store.apply(None, [log_event("x" * 100_000)])
    assert caught.value.reason is Reason.DISK_FULL
    assert store.newest_revision() == 1
    store._database.execute("PRAGMA max_page_count = 100000")
    assert store.apply(None, [log_event()])[0].revision == 2


def test_commits_are_flushed_to_the_disk(store: Store) -> None:
    assert store._value("PRAGMA synchronous") == 2
    assert store._value("PRAGMA journal_mode") == "wal"
