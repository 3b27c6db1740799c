"""`opd store`: works with and without a daemon, says what is wrong, and overwrites nothing."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from opd_daemon.cli import exits
from opd_daemon.store import Store
from tests.cli.conftest import Opd
from tests.test_store import log_event


def test_check_and_backup_work_beside_a_running_daemon(opd: Opd, tmp_path: Path) -> None:
    checked = opd("store", "check", "--json")
    assert checked.code == exits.OK
    assert checked.json["faults"] == []
    assert checked.json["events"] >= 1
    copied = opd("store", "backup", tmp_path / "copy.db")
    assert (copied.code, copied.out.strip()) == (exits.OK, str(tmp_path / "copy.db"))
    with closing(Store(tmp_path / "copy.db")) as copy:
        assert copy.newest_revision() >= checked.json["newest_revision"]


def test_faults_are_listed_and_end_with_exit_code_1(opd_alone: Opd, tmp_path: Path) -> None:
    with closing(Store(tmp_path / "home" / "opd.db")) as store:
        store.apply(None, [log_event()] * 3)
        store._database.execute("DELETE FROM events WHERE revision = 2")
    checked = opd_alone("store", "check")
    assert checked.code == exits.FAILED
    assert "faults  " in checked.out
    assert "after revision 1 comes 3" in checked.out


def test_a_home_without_a_store_is_said_in_one_line(opd_alone: Opd, tmp_path: Path) -> None:
    for command in (["check"], ["backup", tmp_path / "copy.db"]):
        outcome = opd_alone("store", *command)
        assert outcome.code == exits.FAILED
        assert "opd.db: can't be opened" in outcome.err
        assert outcome.err.count("\n") == 1
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "copy.db").exists()


def test_backup_refuses_to_overwrite_with_exit_code_2(opd: Opd, tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_text("precious")
    outcome = opd("store", "backup", tmp_path / "copy.db")
    assert outcome.code == exits.USAGE
    assert "never overwrites" in outcome.err
    assert (tmp_path / "copy.db").read_text() == "precious"
