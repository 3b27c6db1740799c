"""Death at every named point, each followed by a recovery that leaves nothing lost, doubled or half done."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from opd_daemon.distill.checkpoints import latest, read_progress, step_folders
from opd_daemon.failpoints import POINTS, arm, hit
from opd_daemon.models.folder import read_header
from opd_daemon.store import Store
from opd_daemon.types import RunState
from tests.crash import jobs
from tests.crash.life import Life
from tests.crash.model import Findings, examine
from tests.crash.stage import REPOSITORY, Daemon, starter, until

# Reached in the life of a run with the scripted worker, by the daemon or by the worker. A number: at that time only.
IN_A_LIFE = (
    "discovery.write",
    "run.accept.config",
    "run.accept.stored",
    "store.state",
    "store.commit.before",
    "store.commit.before@4",
    "store.commit.after",
    "store.commit.after@4",
    "events.publish@3",
    "worker.started",
    "worker.recorded",
    "disk.write@7",
    "disk.rename@2",
    "checkpoint.saved",
    "folder.filled",
    "folder.placed",
    "run.stop.stored",
    "worker.ended",
    "worker.forgotten",
    "run.resume.stored",
    "store.rewind",
    "drain.health",
    "drain.runs",
    "checkpoint.named",
    "checkpoint.named@2",
    "adapter.copy",
    "worker.outcome.before",
    "worker.outcome.after",
    "adapter.stream",
    "run.delete.stored",
    "run.delete.files",
)
AT_RECOVERY = ("recover.orphans", "recover.interrupted")
ELSEWHERE = {"teacher.load"}  # test_signals.py


def name_of(entry: str) -> str:
    return entry.partition("@")[0]


@pytest.mark.timeout(300)
def test_a_run_survives_death_at_every_point_of_its_life(daemon: Daemon, tmp_path: Path) -> None:
    life, findings = Life(daemon, tmp_path), Findings()
    for entry in (*IN_A_LIFE, *AT_RECOVERY):
        point = name_of(entry)
        if point in AT_RECOVERY:
            daemon.start()
            life.until(RunState.RUNNING)
            daemon.kill()
        name, _, count = entry.partition("@")
        daemon.start(f"{name}=kill@{count or 1}", wait=False)
        if daemon.until_serving():
            assert point not in AT_RECOVERY, "nobody is served before earlier runs are taken up"
            life.until_hit(point)
        daemon.kill()
        assert daemon.points_hit()[-1] == point
        examine(daemon.home, life.promises, findings)
        assert not findings.broken, f"after death at {entry}: {findings.broken}"
    daemon.start()
    lived = life.lived
    while life.lived == lived:
        life.push()
    until(lambda: not daemon.workers(), 10.0, "no worker is left")
    assert daemon.stop() == 0
    examine(daemon.home, life.promises, findings)
    assert not findings.broken
    unfinished = [path for path in (daemon.home.root / "configs").iterdir() if path.suffix != ".yaml"]
    assert not unfinished
    assert {read_header(path) == {} for path in (tmp_path / "downloaded").glob("*.safetensors")} == {True}
    assert {name_of(entry) for entry in IN_A_LIFE} | set(AT_RECOVERY) <= set(daemon.points_hit())


def die_at(point: str, job: Callable[[Path], None], root: Path) -> None:
    process = starter().Process(target=jobs.with_points, args=(f"{point}=kill", job, root))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, f"{point} was not reached: {process.exitcode}"


def test_a_folder_whose_successor_did_not_come_returns(tmp_path: Path) -> None:
    jobs.save_twice(tmp_path)
    die_at("folder.moved", jobs.save_twice, tmp_path)
    assert not (tmp_path / "step_000001").exists()
    jobs.open_checkpoints(tmp_path)
    found = latest(tmp_path)
    assert found is not None
    assert read_progress(found).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_checkpoint_that_was_being_deleted_is_gone(tmp_path: Path) -> None:
    die_at("folder.hidden", jobs.save_two_and_keep_one, tmp_path)
    assert [path.name for path in step_folders(tmp_path)] == ["step_000002"]
    jobs.open_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_a_compaction_cut_short_forgets_nothing(tmp_path: Path) -> None:
    jobs.fill_store(tmp_path)
    die_at("store.compact", jobs.compact, tmp_path)
    store = Store(tmp_path / "opd.db")
    assert (store.oldest_revision(), store.newest_revision()) == (1, 50)
    assert store.compact(40) == 40
    store.close()


def test_a_row_whose_event_was_not_reported_is_dropped_when_the_run_goes_on(tmp_path: Path) -> None:
    die_at("journal.append", jobs.journal_two_steps, tmp_path)
    assert jobs.steps_in_log(tmp_path) == [1]
    jobs.journal_two_steps(tmp_path)
    assert jobs.steps_in_log(tmp_path) == [1, 2]


def test_rollouts_of_half_a_step_are_dropped_when_the_run_goes_on(tmp_path: Path) -> None:
    die_at("rollouts.append", jobs.two_rollouts, tmp_path)
    assert len(jobs.rollouts_in_log(tmp_path)) == 1
    jobs.two_rollouts(tmp_path)
    assert len(jobs.rollouts_in_log(tmp_path)) == 2


def test_a_report_cut_short_is_written_again(tmp_path: Path) -> None:
    die_at("report.page", jobs.report, tmp_path)
    assert [path.name for path in tmp_path.glob("reports/*")] == ["fixture.html"]
    run = starter().Process(target=jobs.report, args=(tmp_path,))
    run.start()
    run.join(120)
    assert {path.name for path in tmp_path.glob("reports/*")} == {"fixture.html", "fixture"}


@pytest.mark.parametrize(("point", "entries"), [("cache.write", 0), ("cache.index", 1)])
def test_an_answer_is_in_the_cache_whole_or_not_at_all(tmp_path: Path, point: str, entries: int) -> None:
    die_at(point, jobs.keep_answer, tmp_path)
    assert jobs.answers_kept(tmp_path) == entries
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    jobs.keep_answer(tmp_path)
    assert jobs.answers_kept(tmp_path) == 1


IN_JOBS = {
    "folder.moved",
    "folder.hidden",
    "store.compact",
    "journal.append",
    "rollouts.append",
    "report.page",
    "cache.write",
    "cache.index",
}


def test_every_point_is_in_the_code_once_named_and_has_its_death_here() -> None:
    source = "".join(path.read_text() for path in (REPOSITORY / "opd_daemon").rglob("*.py"))
    named = set(re.findall(r'\bhit(?:\(|, )"([a-z.]+)"', source))
    assert named == set(POINTS)
    assert {name_of(entry) for entry in IN_A_LIFE} | set(AT_RECOVERY) | IN_JOBS | ELSEWHERE == set(POINTS)


@pytest.mark.parametrize("mark", [{}, {"OPD_TEST_HARNESS": "0"}, {"OPD_TEST_HARNESS": "yes"}])
def test_points_are_inert_without_the_mark_of_the_harness(mark: dict[str, str]) -> None:
    assert arm({"OPD_FAILPOINTS": "disk.write=kill@1+", **mark}) is None
    hit("disk.write")


@pytest.mark.parametrize("written", ["no.such.point=kill", "disk.write=burn", "disk.write=kill@x"])
def test_a_slip_in_the_list_of_points_is_no_silent_pass(written: str) -> None:
    with pytest.raises(ValueError, match=r"failpoint|use kill|invalid literal"):
        arm({"OPD_FAILPOINTS": written, "OPD_TEST_HARNESS": "1"})
    arm({})
