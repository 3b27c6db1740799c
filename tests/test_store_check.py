"""A check finds what SQLite can't know; a copy is complete, and a store of its own."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from opd_daemon.errors import OpdError, Reason
from opd_daemon.store import Store
from opd_daemon.store_backup import back_up
from opd_daemon.store_check import check_store
from opd_daemon.types import Event, EventKind, RunState
from tests.test_store import NOW, add_run, checkpoint_event, log_event, make_run, metrics_event


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with a run in order."""
    path = tmp_path / "opd.db"
    (tmp_path / "best").mkdir()
    with closing(Store(path)) as store:
        add_run(store)
        store.apply(replace(make_run(), state=RunState.RUNNING), [state_event("RUNNING")])
        store.apply(None, [metrics_event(1), metrics_event(2)])
        store.apply(None, [checkpoint_event(2, str(tmp_path / "best"), is_best=True)])
    return path


def state_event(state: str) -> Event:
    return Event(EventKind.RUN_STATE, "r1", {"state": state}, NOW)


def spoil(path: Path, statement: str) -> tuple[str, ...]:
    """What a check says after one statement."""
    with closing(Store(path)) as store:
        store._database.execute(statement)
    return check_store(path).faults


def test_a_store_in_order_has_no_faults(path: Path) -> None:
    found = check_store(path)
    assert found.faults == ()
    assert (found.events, found.oldest_revision, found.newest_revision, found.runs) == (5, 1, 5, 1)


def test_a_compacted_store_has_no_faults(path: Path) -> None:
    with closing(Store(path)) as store:
        store.compact(3)
        assert check_store(path).faults == ()
        store.compact(100)
    found = check_store(path)
    assert found.faults == ()
    assert (found.events, found.oldest_revision, found.newest_revision) == (0, 6, 5)


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("DELETE FROM events WHERE revision = 2", "events: after revision 1 comes 3"),
        ("DELETE FROM events WHERE revision = 1", "events: after revision 0 comes 2"),
        ("UPDATE events SET batch_end = 2 WHERE revision = 4", "events: revision 4 breaks the batch"),
        ("UPDATE events SET batch_end = 9 WHERE revision = 5", "events: the batch that ends at 9 is cut after 5"),
        ("UPDATE events SET payload = '{\"a' WHERE revision = 3", "events: payload of 3 is not readable"),
        ("UPDATE runs SET document = 'x'", "runs: document of r1 is not readable"),
        ("UPDATE runs SET state = 'FAILED'", "run r1: its row says FAILED, its last event RUNNING"),
        ("UPDATE events SET run_id = 'other' WHERE revision = 1", "run r1: revision 1, at which it was accepted"),
        ("UPDATE checkpoints SET path = '/gone'", "run r1: the folder of its checkpoint of step 2 is gone: /gone"),
    ],
)
def test_every_broken_promise_is_named(path: Path, statement: str, fault: str) -> None:
    assert any(fault in line for line in spoil(path, statement))


def test_a_damaged_page_is_named(path: Path) -> None:
    with closing(Store(path)) as store:
        root = store._value("SELECT rootpage FROM sqlite_master WHERE name = 'events_by_run'")
    with path.open("rb+") as file:
        file.seek(4096 * (root - 1))
        file.write(b"\xa5" * 4096)
    with pytest.raises(OpdError, match=r"damaged.*opd store backup") as caught:
        check_store(path)
    assert caught.value.reason is Reason.STORE_UNUSABLE


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "opd.db").write_bytes(b"no database at all" * 100)
    for look in (check_store, lambda path: back_up(path, tmp_path / "copy.db")):
        with pytest.raises(OpdError) as caught:
            look(tmp_path / "opd.db")
        assert caught.value.reason is Reason.STORE_UNUSABLE
    assert [entry.name for entry in tmp_path.iterdir()] == ["opd.db"]


def test_a_copy_has_everything_and_an_id_of_its_own(path: Path, tmp_path: Path) -> None:
    back_up(path, tmp_path / "copy.db")
    with closing(Store(path)) as store, closing(Store(tmp_path / "copy.db")) as copy:
        assert copy.events_after(0) == store.events_after(0)
        assert copy.list_runs() == store.list_runs()
        # Put in the place of the first store it would go on with other events: watchers must be told.
        assert copy.store_id != store.store_id


def test_a_copy_is_of_one_moment_while_others_write(path: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        with closing(Store(path)) as store:
            while not stop.is_set():
                store.apply(None, [log_event("x" * 500)] * 3)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(5):
            back_up(path, tmp_path / f"{number}.db")
    finally:
        stop.set()
        writer.join()
    for number in range(5):
        assert check_store(tmp_path / f"{number}.db").faults == ()


def test_a_copy_overwrites_nothing_and_leaves_nothing_half_written(path: Path, tmp_path: Path) -> None:
    (tmp_path / "there.db").write_text("precious")
    for destination in (tmp_path / "there.db", tmp_path / "best", tmp_path / "nowhere" / "copy.db"):
        with pytest.raises(OpdError) as caught:
            back_up(path, destination)
        assert caught.value.reason is Reason.INVALID_REQUEST
        assert str(destination.parent) in str(caught.value)
    assert (tmp_path / "there.db").read_text() == "precious"
    assert not list(tmp_path.glob(".*"))
