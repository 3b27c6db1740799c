"""A disk that is full or fails at the n-th write, for n = 1, 2, 3 … until everything has gone through once."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from opd_daemon import failpoints
from opd_daemon.client import Client
from opd_daemon.distill.checkpoints import Checkpoints, RunProgress, latest
from opd_daemon.errors import OpdError, Reason
from opd_daemon.teacher.cache import TeacherCache
from opd_daemon.teacher.payload import Entry
from opd_daemon.types import RunState
from tests.asynchronous import asynchronous
from tests.asynchronous import until as eventually
from tests.crash import jobs
from tests.crash.model import Findings, Promises, examine
from tests.crash.stage import REPOSITORY, Daemon, run_values, until
from tests.runs.daemon import Daemon as Manager
from tests.runs.daemon import Stage

SOAK = os.environ.get("OPD_SOAK") == "1"
FAULTS = ("ENOSPC", "EIO")
MOST_WRITES = 70
# Of the writes of a whole run these fail; in the long form each of them.
OF_A_WHOLE_RUN = range(2, MOST_WRITES) if SOAK else (3, 10, 19)
REFUSALS = frozenset({Reason.DISK_FULL, Reason.INTERNAL, Reason.INVALID_REQUEST})

MakeDaemon = Callable[..., Daemon]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("opd_daemon.runs.attempt.DISK_RETRY_SECONDS", 0.05)
    yield
    failpoints.arm({})


def fail_write(number: int, fault: str) -> failpoints.Armed:
    armed = failpoints.arm({"OPD_FAILPOINTS": f"disk.write=error:{fault}@{number}", "OPD_TEST_HARNESS": "1"})
    assert armed is not None
    return armed


def every_write(fault: str) -> Iterator[tuple[int, failpoints.Armed]]:
    """Arms the first, second, third … write, until one is not reached any more."""
    for number in range(1, MOST_WRITES):
        armed = fail_write(number, fault)
        yield number, armed
        if armed.reached["disk.write"] < number:
            return
    raise AssertionError("there is no end of writes")


@pytest.mark.parametrize("fault", FAULTS)
@asynchronous
async def test_a_refused_creation_leaves_nothing_and_can_be_repeated(tmp_path: Path, fault: str) -> None:
    stage = Stage(tmp_path)
    async with stage.daemon() as daemon:
        # While it trains, a created run waits: its own writes are all there are.
        await daemon.start()
        for number, _ in every_write(fault):
            values = stage.values(run_id=f"run{number}")
            with contextlib.suppress(OpdError):
                run = await daemon.runs.create(values, request_id=f"r{number}")
                assert run.run_id == f"run{number}"
                continue
            assert not [path for path in (stage.home.root / "configs").iterdir() if f"run{number}" in path.name]
            failpoints.arm({})
            assert (await daemon.runs.create(values, request_id=f"r{number}")).run_id == f"run{number}"
        assert number > 2


@pytest.mark.parametrize("fault", FAULTS)
@asynchronous
async def test_a_run_passes_any_refused_write_of_the_daemon(tmp_path: Path, fault: str) -> None:
    stage = Stage(tmp_path, worker="fail")
    async with stage.daemon() as daemon:
        for number, armed in every_write(fault):
            run_id = f"run{number}"
            await insist(lambda run_id=run_id: daemon.create(run_id=run_id))
            await eventually(lambda run_id=run_id: at_rest(daemon, run_id))
            reached = armed.reached["disk.write"]
            failpoints.arm({})
            run = await daemon.runs.get(run_id)
            assert (run.state, bool(run.error_message)) == (RunState.FAILED, True)
            await insist(lambda run_id=run_id: daemon.runs.resume(run_id))
            await eventually(lambda run_id=run_id: at_rest(daemon, run_id))
            await daemon.runs.delete(run_id)
            assert reached > 3


async def insist(work: Callable[[], object]) -> None:
    """A user who does it again when told that the disk is full."""
    for _ in range(3):
        try:
            await work()  # type: ignore[misc]
        except OpdError as error:
            if error.reason not in REFUSALS:
                raise
            continue
        return
    raise AssertionError("refused three times")


async def at_rest(daemon: Manager, run_id: str) -> bool:
    return (await daemon.runs.get(run_id)).state.resting and daemon.runs._scheduler.attempt(run_id) is None


@pytest.mark.parametrize("fault", FAULTS)
@asynchronous
async def test_resume_and_delete_are_done_or_not_begun(tmp_path: Path, fault: str) -> None:
    stage = Stage(tmp_path, worker="fail")
    async with stage.daemon() as daemon:
        run_id = await daemon.create()
        await eventually(lambda: at_rest(daemon, run_id))
        fail_write(1, fault)
        with pytest.raises(OpdError):
            await daemon.runs.resume(run_id)
        assert (await daemon.runs.get(run_id)).state is RunState.FAILED
        fail_write(1, fault)
        with pytest.raises(OpdError):
            await daemon.runs.delete(run_id)
        assert (await daemon.runs.get(run_id)).state is RunState.FAILED
        assert stage.home.run(run_id).config.exists()
        fail_write(2, fault)  # the run is forgotten, but not that its files have to go
        with pytest.raises(OpdError):
            await daemon.runs.delete(run_id)
        failpoints.arm({})
    async with stage.daemon() as daemon:
        assert await daemon.runs.list() == ([], "")
        assert await daemon.events.read(lambda store: store.deleted_runs()) == []
        assert not stage.home.run(run_id).config.exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_checkpoint_leaves_the_earlier_ones_and_is_made_again(tmp_path: Path, fault: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for number, _ in every_write(fault):
        with contextlib.suppress(OpdError):
            checkpoints.save_step(RunProgress(step=number), jobs.save)
            break
        assert {path.name for path in tmp_path.iterdir()} == {
            f"step_{step:06d}" for step in range(max(1, number - 2), number)
        }
        failpoints.arm({})
        checkpoints.save_step(RunProgress(step=number), jobs.save)
        assert latest(tmp_path) == tmp_path / f"step_{number:06d}"
    assert number > 3


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_the_disk_refuses_is_not_kept_and_the_next_one_is(tmp_path: Path, fault: str) -> None:
    cache = TeacherCache(tmp_path, 1 << 20)
    cache.open()
    fail_write(1, fault)
    for address in ("ab" * 32, "cd" * 32):
        cache.write(address, Entry({"logprobs": np.zeros(4, np.float32)}, 1.0, {}))
    cache.close()
    assert [path.name for path in tmp_path.glob("*/*")] == ["cd" * 32]


@pytest.mark.timeout(3600 if SOAK else 120)
def test_a_whole_run_passes_any_refused_write_of_daemon_and_worker(daemon: Daemon, tmp_path: Path) -> None:
    """Each process counts its own writes: the n-th of either fails, and the user then frees some space."""
    promises, findings = Promises(), Findings()
    for number in OF_A_WHOLE_RUN:
        hits, run_id = len(daemon.points_hit()), f"run{number}"
        daemon.start(f"disk.write=error:{FAULTS[number % 2]}@{number}")
        with daemon.client() as client:
            until(lambda client=client, run_id=run_id: push(client, tmp_path, run_id).resting, 60.0, "it rests")
        assert daemon.stop() == 0
        examine(daemon.home, promises, findings)
        assert not findings.broken, f"write {number}: {findings.broken}"
        daemon.start()
        with daemon.client() as client:
            if client.run(run_id)[0].state.resumable:
                client.resume(run_id)
            until(lambda client=client, run_id=run_id: push(client, tmp_path, run_id) is RunState.SUCCEEDED)
        daemon.kill()
        if len(daemon.points_hit()) == hits:
            assert number > 20
            return
    assert not SOAK, "there is no end of writes"


def push(client: Client, root: Path, run_id: str) -> RunState:
    """Ask for the run, again where a full disk refused it; its state."""
    try:
        client.create_run(run_values(root, run_id=run_id, num_steps=3), request_id=run_id)
        return client.run(run_id)[0].state
    except OpdError as error:
        if error.reason not in REFUSALS:
            raise
        return RunState.PENDING


def test_a_state_folder_deleted_under_the_daemon_is_said_and_nothing_hangs(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with daemon.client() as client:
        assert list(client.runs()) == []  # connected: nobody finds the daemon after this
        shutil.rmtree(daemon.home.root)
        with pytest.raises(OpdError) as refused:
            client.create_run(run_values(tmp_path))
        assert refused.value.reason is Reason.STORE_UNUSABLE
        assert "moved or deleted" in refused.value.message
        assert str(tmp_path) not in refused.value.message
        assert client.teacher()[0]
    assert daemon.stop() == 0


@pytest.mark.parametrize("name", ["opd.db", "configs"])
def test_a_place_that_can_not_be_written_is_named_before_anything_starts(
    daemon: Daemon, tmp_path: Path, name: str
) -> None:
    # A folder where a file should be, or the other way round: also the superuser can't write there.
    if name == "opd.db":
        (daemon.home.root / name).mkdir()
        daemon.start(wait=False)
        assert daemon.wait() == 3
        assert "can't be opened" in daemon.log.read_text()
        return
    (daemon.home.root / name).write_text("in the way")
    daemon.start()
    with daemon.client() as client:
        with pytest.raises(OpdError) as refused:
            client.create_run(run_values(tmp_path, run_id="mine"))
        assert refused.value.reason is Reason.INVALID_REQUEST
        (daemon.home.root / name).unlink()
        assert client.create_run(run_values(tmp_path, run_id="mine"))[0].run_id == "mine"


def test_a_read_only_home_is_refused_in_words(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    command = [sys.executable, "-m", "opd_daemon.cli", "serve", "--home", str(home)]
    if os.geteuid() == 0:  # who may write anywhere but to a file system that nobody can write to
        mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro none "$0" && exec "$@"', str(home)]
        if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
            pytest.skip("the superuser may write anywhere, and no file system can be mounted")
        command = [*mount, *command]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "can't be written" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_with_few_file_descriptors_it_serves_or_refuses_in_words(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon(descriptors=64)
    daemon.start(wait=False)
    if not daemon.until_serving():
        assert "file descriptors" in daemon.log.read_text()
        return
    with daemon.client() as client:
        for number in range(8):  # each with its output, its pipe and its connection
            client.create_run(run_values(tmp_path, run_id=f"run{number}", session_id="segfault"))
        until(lambda: all(run.state.resting for run in client.runs()), 60.0, "all are done")
        assert {run.state for run in client.runs()} <= {RunState.INTERRUPTED, RunState.FAILED}
    assert daemon.stop() == 0
