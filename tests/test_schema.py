"""A store of any earlier version opens with all that was in it; whatever the file looks like, it is used or refused."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from opd_daemon import schema, store
from opd_daemon.errors import OpdError, Reason
from opd_daemon.store import Store
from opd_daemon.store_check import check_store
from opd_daemon.types import EventKind
from tests.test_store import add_run, log_event, make_run, metrics_event


def version_1(path: Path) -> str:
    """A store as the first version left it, with a run and its events; returns its id."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript(f"{schema.MIGRATIONS[0].script} PRAGMA user_version = 1; PRAGMA journal_mode = WAL;")
        made = Store.__new__(Store)  # today's writing, without today's migrations
        made.path, made._database, made._file = path, database, store._identity(path)
        add_run(made, make_run(request_id="once"))
        made.apply(make_run(request_id="once"), [metrics_event(step) for step in (1, 2, 3)])
        return str(made._value("SELECT value FROM facts WHERE name = 'store_id'"))


def test_a_store_of_version_1_keeps_everything_and_learns_to_shrink(tmp_path: Path) -> None:
    store_id = version_1(tmp_path / "opd.db")
    with closing(Store(tmp_path / "opd.db")) as store:
        assert store.store_id == store_id
        assert [event.revision for event in store.events_after(0)[0]] == [1, 2, 3, 4]
        assert store.get_run("r1") == make_run(request_id="once")
        assert store.run_by_request_id("once", "d") is not None
        assert len(store.metrics("r1", EventKind.METRICS)) == 3
        assert store._value("PRAGMA user_version") == schema.VERSION
        assert store._value("PRAGMA auto_vacuum") == 2


def test_a_migration_that_was_cut_short_is_finished_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version_1(tmp_path / "opd.db")
    broken = schema.Migration("CREATE TABLE half (x); SELECT no_such_function();")
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, broken))
        patch.setattr(schema, "VERSION", schema.VERSION + 1)
        with pytest.raises(OpdError):
            Store(tmp_path / "opd.db")
    with closing(Store(tmp_path / "opd.db")) as store:
        assert store._rows("SELECT name FROM sqlite_master WHERE name = 'half'") == []
        assert store.newest_revision() == 4


def test_every_new_store_has_an_id_of_its_own(tmp_path: Path) -> None:
    ids = set()
    for name in "ab":
        with closing(Store(tmp_path / name)) as store:
            ids.add(store.store_id)
    assert len(ids) == 2
    assert all(len(name) == 32 for name in ids)


def filled(path: Path, events: int = 400) -> None:
    with closing(Store(path)) as store:
        add_run(store)
        for _ in range(events // 20):
            store.apply(None, [log_event("x" * 200) for _ in range(20)])


@pytest.mark.parametrize("page", [2, 3, 5, -1])
def test_a_damaged_page_is_found_before_the_daemon_serves(tmp_path: Path, page: int) -> None:
    path = tmp_path / "opd.db"
    filled(path)
    pages = path.stat().st_size // 4096
    with path.open("rb+") as file:
        file.seek(4096 * (page - 1 if page > 0 else pages - 1))
        file.write(b"\xa5" * 4096)
    with pytest.raises(OpdError, match=r"damaged.*opd store backup") as caught:
        Store(path)
    assert caught.value.reason is Reason.STORE_UNUSABLE


def test_a_truncated_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "opd.db"
    filled(path)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(OpdError) as caught:
        Store(path)
    assert caught.value.reason is Reason.STORE_UNUSABLE


def after_a_kill(path: Path, into: Path) -> Path:
    """The files as a kill leaves them: what was committed is in the WAL, nothing was checkpointed."""
    with closing(Store(path)) as store:
        for number in range(10):
            store.apply(None, [log_event(f"{number}")] * 2)
        into.mkdir()
        for name in ("opd.db", "opd.db-wal"):
            shutil.copyfile(path.with_name(name), into / name)
    return into / "opd.db"


def test_a_kill_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    path = after_a_kill(tmp_path / "opd.db", tmp_path / "killed")
    assert check_store(path).newest_revision == 20  # also before a daemon has taken it up again
    with closing(Store(path)) as store:
        assert store.newest_revision() == 20


@pytest.mark.parametrize("torn", [1, 500, 4096, 9000])
def test_a_torn_end_of_the_journal_loses_whole_transactions_only(tmp_path: Path, torn: int) -> None:
    path = after_a_kill(tmp_path / "opd.db", tmp_path / "killed")
    journal = path.with_name("opd.db-wal")
    with journal.open("rb+") as file:
        file.truncate(journal.stat().st_size - torn)
    with closing(Store(path)) as store:
        kept = store.newest_revision()
        assert 0 < kept < 20
        assert kept % 2 == 0
        assert [event.revision for event in store.events_after(0)[0]] == list(range(1, kept + 1))


def test_garbage_in_the_journal_is_not_taken_for_events(tmp_path: Path) -> None:
    path = after_a_kill(tmp_path / "opd.db", tmp_path / "killed")
    with path.with_name("opd.db-wal").open("rb+") as file:
        file.seek(-6000, 2)
        file.write(b"\xa5" * 100)
    with closing(Store(path)) as store:
        kept = store.newest_revision()
        assert kept % 2 == 0
        assert [event.revision for event in store.events_after(0)[0]] == list(range(1, kept + 1))


def test_damage_that_appears_while_the_daemon_runs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "opd.db"
    filled(path)
    with closing(Store(path)) as store:
        store._database.execute("PRAGMA cache_size = 1")
        with path.open("rb+") as file:
            file.seek(4096)
            file.write(b"\xa5" * (path.stat().st_size - 4096))
        with pytest.raises(OpdError, match="opd store check") as caught:
            store.ask(lambda store: store.events_after(0))
    assert caught.value.reason is Reason.STORE_UNUSABLE


def test_a_folder_in_the_place_of_the_store_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "opd.db").mkdir()
    with pytest.raises(OpdError, match=r"opd\.db: can't be opened") as caught:
        Store(tmp_path / "opd.db")
    assert caught.value.reason is Reason.STORE_UNUSABLE
