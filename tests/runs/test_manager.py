"""What users of runs may count on, with real worker processes that obey, die or hang."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import Awaitable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from opd_daemon import failpoints
from opd_daemon.errors import FieldViolation, OpdError, Reason
from opd_daemon.runs.ledger import MOST_CHARACTERS
from opd_daemon.store import Store, WorkerRecord
from opd_daemon.trainer import RunRefused
from opd_daemon.types import TEACHER_CACHE, Event, EventKind, Gauges, PlannedBytes, Run, RunState
from tests.asynchronous import asynchronous, until
from tests.runs.daemon import PLAN, Stage, checkpoint, metrics, with_run, write_checkpoint

S = RunState


async def refusal(awaitable: Awaitable[object]) -> OpdError:
    with pytest.raises(OpdError) as caught:
        await awaitable
    return caught.value


# Accepting


@asynchronous
async def test_an_accepted_run_has_a_plan_a_file_and_an_event(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run = await daemon.runs.create(daemon.stage.values(session_id="s1"))
        assert run.run_id.startswith("distill_2")
        assert (run.state, run.plan, run.total_steps, run.session_id) == (S.PENDING, PLAN, 10, "s1")
        saved = yaml.safe_load(daemon.stage.home.run(run.run_id).config.read_text())
        assert saved == run.config
        assert (await daemon.states(run.run_id))[0] == "PENDING"


@asynchronous
async def test_names_that_one_disk_in_two_takes_for_the_same_are_one(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        await daemon.create(run_id="Night")
        fault = await refusal(daemon.create(run_id="night"))
        assert [violation.field for violation in fault.violations] == ["config.run_id"]


@asynchronous
async def test_every_fault_is_told_at_once_and_nothing_is_kept(tmp_path: Path) -> None:
    stage = Stage(tmp_path, faults=[FieldViolation("config.prompts_path", "line 3: not JSON")])
    async with stage.daemon() as daemon:
        fault = await refusal(daemon.create(batch_size=0, learning_rate=-1.0, nonsense=1))
        assert fault.reason is Reason.INVALID_RUN_CONFIG
        assert {violation.field for violation in fault.violations} == {
            "config.batch_size",
            "config.learning_rate",
            "config.nonsense",
            "config.prompts_path",
        }
        assert await daemon.runs.list() == ([], "")
        assert not (stage.home.root / "configs").exists()


@asynchronous
async def test_an_unknown_trainer_is_a_fault_that_names_the_known(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        fault = await refusal(daemon.create(trainer="magic"))
        assert [violation.field for violation in fault.violations] == ["config.trainer"]
        assert "on_policy" in str(fault)


@asynchronous
async def test_a_taken_run_id_is_refused_and_its_file_is_kept(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        await daemon.create(run_id="mine", num_steps=7)
        fault = await refusal(daemon.create(run_id="mine"))
        assert fault.violations[0].field == "config.run_id"
        assert yaml.safe_load(daemon.stage.home.run("mine").config.read_text())["num_steps"] == 7


@asynchronous
async def test_a_run_id_whose_checkpoints_lie_around_is_taken(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.home.run("old").checkpoints.mkdir(parents=True)
    async with stage.daemon() as daemon:
        assert (await refusal(daemon.create(run_id="old"))).violations[0].field == "config.run_id"


@asynchronous
async def test_runs_created_in_one_second_get_names_of_their_own(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        names = await asyncio.gather(*(daemon.create() for _ in range(5)))
        assert len(set(names)) == 5


@asynchronous
async def test_a_repeated_request_answers_with_the_same_run(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        values = daemon.stage.values()
        runs = await asyncio.gather(*(daemon.runs.create(values, request_id="once") for _ in range(3)))
        assert len({run.run_id for run in runs}) == 1
        fault = await refusal(daemon.runs.create({**values, "seed": 7}, request_id="once"))
        assert fault.reason is Reason.REQUEST_ID_REUSED


@asynchronous
async def test_validating_keeps_nothing(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run = await daemon.runs.create(daemon.stage.values(), request_id="r", validate_only=True)
        assert (run.run_id, run.plan) == ("", PLAN)
        assert await daemon.runs.list() == ([], "")


@asynchronous
async def test_a_run_that_will_not_fit_is_refused_with_advice_unless_it_is_forced(tmp_path: Path) -> None:
    plan = replace(PLAN, fits=False, warnings=("it will not fit",), advice=("batch_size 1: 1 instead of 3",))
    async with Stage(tmp_path, plan=plan).daemon() as daemon:
        fault = await refusal(daemon.create())
        assert fault.reason is Reason.OUT_OF_MEMORY
        assert "it will not fit" in fault.message
        assert "batch_size 1: 1 instead of 3" in fault.message
        assert await daemon.runs.list() == ([], "")
        assert (await daemon.runs.create(daemon.stage.values(), validate_only=True)).plan == plan
        assert (await daemon.runs.create(daemon.stage.values(), force=True)).plan == plan


@asynchronous
async def test_a_plan_knows_whether_the_teacher_is_loaded(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.daemon() as daemon:
        for loaded in ("", "/m/another", stage.values()["teacher_model_path"]):
            stage.teacher = loaded
            await daemon.runs.create(stage.values(), validate_only=True)
    assert [request.teacher_loaded for request in stage.plan_requests] == [False, False, True]


@asynchronous
async def test_another_machine_is_planned_for_but_not_run_on(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        values = daemon.stage.values()
        await daemon.runs.create(values, validate_only=True, machine="M4 Max 64 GB")
        assert daemon.stage.plan_requests[-1].machine == "M4 Max 64 GB"
        fault = await refusal(daemon.runs.create(values, machine="M4 Max 64 GB"))
        assert fault.violations[0].field == "machine"


@asynchronous
async def test_an_idle_machine_may_be_measured_and_a_busy_one_not(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        values = daemon.stage.values()
        await daemon.runs.create(values, validate_only=True)
        assert daemon.stage.plan_requests[-1].measure
        await daemon.start()
        assert not daemon.stage.plan_requests[-1].measure
        await daemon.runs.create(values, validate_only=True)
        assert not daemon.stage.plan_requests[-1].measure


@asynchronous
async def test_a_plugin_refuses_a_run_before_it_exists(tmp_path: Path) -> None:
    def refuse(run: Run) -> None:
        raise RunRefused(f"no {run.config['trainer']} here")

    async with Stage(tmp_path, refuse=refuse).daemon() as daemon:
        fault = await refusal(daemon.create())
        assert (fault.reason, "no on_policy here" in str(fault)) == (Reason.RUN_REFUSED, True)
        assert await daemon.runs.list() == ([], "")


@asynchronous
async def test_runs_are_listed_in_pages(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        for number in range(5):
            await daemon.create(run_id=f"r{number}")
        first, token = await daemon.runs.list(page_size=3)
        second, end = await daemon.runs.list(page_size=3, page_token=token)
        assert [run.run_id for run in [*first, *second]] == ["r4", "r3", "r2", "r1", "r0"]
        assert end == ""
        for forged in ("x", "-1", "9" * 30, "٣"):
            assert (await refusal(daemon.runs.list(page_token=forged))).reason is Reason.INVALID_PAGE_TOKEN


# Doing


@asynchronous
async def test_a_run_goes_through_its_states_to_success(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        await daemon.runs.report(run_id, metrics(1), metrics(2))
        await daemon.runs.finish(run_id, S.SUCCEEDED, adapter_path="/out")
        run = await daemon.runs.get(run_id)
        assert (run.state, run.step, run.adapter_path, run.seconds_remaining) == (S.SUCCEEDED, 2, "/out", None)
        assert run.started_at is not None
        assert run.finished_at is not None
        assert await daemon.states(run_id) == ["PENDING", "PLANNING", "LOADING", "RUNNING", "SUCCEEDED"]
        assert daemon.stage.loads == ["/m/teacher"]


@asynchronous
async def test_the_worker_learns_where_and_who(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        said = daemon.stage.home.run(run_id).worker_log.read_text()
        address, home, token = said.split("environment ")[1].split()[:3]
        assert (address, home) == ("unix:nowhere", str(daemon.stage.home.root))
        assert daemon.runs.run_for_token(token) == run_id
        assert daemon.runs.run_for_token("guess") is None
        await daemon.runs.finish(run_id, S.SUCCEEDED)
        os.killpg((await daemon.events.read(lambda store: store.workers()))[0].pid, signal.SIGTERM)

        async def revoked() -> bool:
            return daemon.runs.run_for_token(token) is None

        await until(revoked)


@asynchronous
async def test_one_run_at_a_time_the_oldest_first(tmp_path: Path) -> None:
    async with Stage(tmp_path, worker="fail").daemon() as daemon:
        names = [await daemon.create(run_id=f"r{number}") for number in range(3)]
        for name in names:
            await daemon.reach(name, S.FAILED)
        events, _ = await daemon.events.read(lambda store: store.events_after(0))
        order = [
            (entry.run_id, entry.payload["state"])
            for entry in events
            if entry.payload.get("state", "PENDING") != "PENDING"
        ]
        assert order == [(name, state) for name in names for state in ("PLANNING", "LOADING", "FAILED")]


@asynchronous
async def test_concurrent_runs_share_one_teacher_and_others_wait(tmp_path: Path) -> None:
    async with Stage(tmp_path, max_concurrent_runs=3).daemon() as daemon:
        first, second = await daemon.start(), await daemon.start()
        other = await daemon.create(teacher_model_path="/m/another")
        await asyncio.sleep(0.2)
        assert (await daemon.runs.get(other)).state is S.PENDING
        for run_id in (first, second):
            await daemon.runs.stop(run_id)
            await daemon.runs.finish(run_id, S.STOPPED)
        for worker in await daemon.events.read(lambda store: store.workers()):
            os.killpg(worker.pid, signal.SIGTERM)
        await daemon.reach(other, S.LOADING)
        assert daemon.stage.teacher == "/m/another"


@asynchronous
async def test_a_long_text_reaches_nobody_whole(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        text = Event(EventKind.LOG, run_id, {"level": "info", "text": 5_000_000 * "x"}, datetime.now(UTC))
        await daemon.runs.report(run_id, text)
        await daemon.runs.finish(run_id, S.FAILED, error_reason=5_000_000 * "R", error_message=5_000_000 * "y")
        (stored,) = [
            event.payload["text"]
            for event in (await daemon.events.read(lambda store: store.events_after(0, run_id)))[0]
            if event.kind is EventKind.LOG and "x" in event.payload["text"][:1]
        ]
        run = await daemon.runs.get(run_id)
        message = run.error_message
        assert len(run.error_reason) <= 100
        for shown in (stored, message):
            assert len(shown) < MOST_CHARACTERS + 100
            assert shown.endswith("characters more)")


@asynchronous
async def test_a_checkpoint_is_where_a_disk_can_hold_it(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        for path in ("", "/\0", f"/{4000 * 'x'}", 1100 * "\U0001f600", 2000 * "/xy"):
            event = Event(EventKind.CHECKPOINT, run_id, {"step": 1, "path": path}, datetime.now(UTC))
            fault = await refusal(daemon.runs.report(run_id, event))
            assert [violation.field for violation in fault.violations] == ["event.path"]
        await daemon.runs.report(run_id, with_run(checkpoint(1, tmp_path / "missing" / (200 * "x")), run_id))
        assert await daemon.runs.checkpoints(run_id) == []


@asynchronous
async def test_runs_keep_no_more_than_the_owner_allows(tmp_path: Path) -> None:
    stage = Stage(tmp_path, most_bytes=1_000_000)
    kept = stage.home.run("earlier").checkpoints / "final"
    kept.mkdir(parents=True)
    (kept / "adapters.safetensors").write_bytes(bytes(900_000))
    async with stage.daemon() as daemon:
        stage.plan = replace(
            PLAN, disk=(PlannedBytes("", "checkpoints", 60_000), PlannedBytes("", TEACHER_CACHE, 10**9))
        )
        await daemon.create()
        fault = await refusal(daemon.create())
        assert (fault.reason, "--runs-limit" in fault.message) == (Reason.DISK_FULL, True)
        assert "those that are not finished will add 5" in fault.message
        assert (await refusal(daemon.runs.create(stage.values(), force=True))).reason is Reason.DISK_FULL
        stage.plan = replace(PLAN, disk=(PlannedBytes("", TEACHER_CACHE, 10**9),))
        await daemon.create()


@asynchronous
async def test_reports_change_run_and_log_together(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        events = [
            metrics(3),
            checkpoint(3, tmp_path / "step_000003"),
            checkpoint(3, tmp_path / "best", is_best=True, validation_kl=0.5),
        ]
        revision = await daemon.runs.report(run_id, *(with_run(event, run_id) for event in events))
        run = await daemon.runs.get(run_id)
        assert (run.step, run.checkpoint_step, run.best_step, run.seconds_remaining) == (3, 3, 3, 7.0)
        assert run.latest_metrics["loss"] == pytest.approx(1 / 3)
        assert await daemon.events.revision() == revision
        assert (await daemon.runs.metrics(run_id))[0][0]["step"] == 3
        assert await daemon.runs.checkpoints(run_id) == []
        (tmp_path / "best").mkdir()
        assert [entry.is_best for entry in await daemon.runs.checkpoints(run_id)] == [True]


@asynchronous
async def test_metrics_say_whether_there_are_more(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        await daemon.runs.report(run_id, *(with_run(metrics(step), run_id) for step in range(1, 6)))
        rows, more = await daemon.runs.metrics(run_id, limit=3)
        assert ([row["step"] for row in rows], more) == ([1, 2, 3], True)
        rows, more = await daemon.runs.metrics(run_id, after_step=3, limit=3)
        assert ([row["step"] for row in rows], more) == ([4, 5], False)


@pytest.mark.parametrize(
    ("kind", "payload", "field"),
    [
        (EventKind.RUN_STATE, {"state": "SUCCEEDED"}, "event.kind"),
        (EventKind.METRICS, {}, "event.step"),
        (EventKind.CHECKPOINT, {"step": 1}, "event.path"),
    ],
)
@asynchronous
async def test_a_worker_can_not_report_anything_it_likes(
    tmp_path: Path, kind: EventKind, payload: dict[str, object], field: str
) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        before = await daemon.events.revision()
        fault = await refusal(daemon.runs.report(run_id, replace(metrics(1), kind=kind, payload=payload)))
        assert fault.violations[0].field == field
        assert await daemon.events.revision() == before


@asynchronous
async def test_a_resting_run_takes_no_events(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        await daemon.runs.finish(run_id, S.SUCCEEDED)
        assert (await refusal(daemon.runs.report(run_id, metrics(1)))).reason is Reason.RUN_STATE_CONFLICT
        assert (await refusal(daemon.runs.finish(run_id, S.FAILED))).reason is Reason.RUN_STATE_CONFLICT


@asynchronous
async def test_a_resting_run_has_no_readings(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        daemon.events.publish_gauges(Gauges(run_id, metrics(1).time, {"memory": 1.0}))
        await daemon.runs.finish(run_id, S.SUCCEEDED)
        assert daemon.events._gauges.since(0, None) == []


# What may go wrong


@asynchronous
async def test_a_teacher_that_does_not_load_fails_the_run_with_its_reason(tmp_path: Path) -> None:
    fault = OpdError(Reason.TEACHER_LOAD_FAILED, "/m/teacher: shard 2 of 3 is missing")
    async with Stage(tmp_path, load_fault=fault).daemon() as daemon:
        run = await daemon.reach(await daemon.create(), S.FAILED)
        assert (run.error_reason, run.error_message) == ("TEACHER_LOAD_FAILED", "/m/teacher: shard 2 of 3 is missing")


@asynchronous
async def test_files_that_vanish_while_a_run_waits_fail_it_in_words(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        first = await daemon.start()
        waiting = await daemon.create()
        daemon.stage.faults = [FieldViolation("config.prompts_path", "/d/prompts.jsonl: no such file")]
        await daemon.runs.finish(first, S.SUCCEEDED)
        os.killpg((await daemon.events.read(lambda store: store.workers()))[0].pid, signal.SIGTERM)
        run = await daemon.reach(waiting, S.FAILED)
        assert run.error_reason == "INVALID_RUN_CONFIG"
        assert "/d/prompts.jsonl: no such file" in run.error_message


@asynchronous
async def test_a_waiting_run_that_can_not_be_read_any_more_fails_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.daemon() as daemon:
        await daemon.start()
        changed = {"another_version": {"field_of_it": 1}, "no_teacher": {"teacher_model_path": None}}
        for run_id in (*changed, "sound"):
            await daemon.create(run_id=run_id)
        for run_id, changes in changed.items():
            run = await daemon.runs.get(run_id)
            strange = replace(run, config={**run.config, **changes})
            await daemon.events.commit(partial(Store.update_run, run=strange))
    async with stage.daemon() as daemon:
        for run_id, changes in changed.items():
            run = await daemon.reach(run_id, S.FAILED)
            assert run.error_reason == "INVALID_RUN_CONFIG"
            assert f"config.{next(iter(changes))}" in run.error_message
        await daemon.worker_says("sound", "ready")


@pytest.mark.parametrize(
    ("worker", "state", "words"),
    [
        ("segfault", S.INTERRUPTED, "SIGSEGV"),
        ("killed", S.INTERRUPTED, "killed by SIGKILL"),
        ("fail", S.FAILED, "exit code 1: boom: the last line"),
        ("flood", S.FAILED, "exit code 1: boom: the last line"),
        ("silent", S.FAILED, "exit code 0"),
    ],
)
@asynchronous
async def test_a_worker_that_dies_leaves_a_reason_and_the_next_run_starts(
    tmp_path: Path, worker: str, state: RunState, words: str
) -> None:
    async with Stage(tmp_path, worker=worker).daemon() as daemon:
        first, second = await daemon.create(), await daemon.create()
        for run_id in (first, second):
            run = await daemon.reach(run_id, state)
            assert run.error_reason == "WORKER_DIED"
            assert words in run.error_message

        async def forgotten() -> bool:
            return not await daemon.events.read(lambda store: store.workers())

        await until(forgotten)


@asynchronous
async def test_a_worker_that_can_not_be_started_fails_the_run(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        daemon.workers._command = ("/no/such/program",)
        run = await daemon.reach(await daemon.create(), S.FAILED)
        assert "can't be started" in run.error_message


@asynchronous
async def test_a_worker_takes_its_children_along(tmp_path: Path) -> None:
    async with Stage(tmp_path, worker="parent").daemon() as daemon:
        run_id = await daemon.create()
        await daemon.reach(run_id, S.FAILED)
        child = int(daemon.stage.home.run(run_id).worker_log.read_text().split("child ")[1].split()[0])

        async def gone() -> bool:
            return not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE

        await until(gone)


# Stopping


@asynchronous
async def test_a_waiting_run_stops_at_once(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        await daemon.start()
        waiting = await daemon.create()
        assert (await daemon.runs.stop(waiting)).state is S.STOPPED
        assert await daemon.states(waiting) == ["PENDING", "STOPPED"]


@asynchronous
async def test_a_training_run_stops_when_its_worker_has_saved(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        assert (await daemon.runs.stop(run_id)).state is S.STOPPING
        # Asking twice is no error while it is being done.
        assert (await daemon.runs.stop(run_id)).state is S.STOPPING
        await daemon.runs.report(run_id, with_run(checkpoint(4, tmp_path), run_id))
        await daemon.runs.finish(run_id, S.STOPPED)
        run = await daemon.runs.get(run_id)
        assert (run.state, run.checkpoint_step, run.error_message) == (S.STOPPED, 4, "")
        fault = await refusal(daemon.runs.stop(run_id))
        assert (fault.reason, fault.metadata["state"]) == (Reason.RUN_STATE_CONFLICT, "STOPPED")


@asynchronous
async def test_the_last_step_may_beat_the_stop(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        await daemon.runs.stop(run_id)
        await daemon.runs.finish(run_id, S.SUCCEEDED)
        assert (await daemon.runs.get(run_id)).state is S.SUCCEEDED


@asynchronous
async def test_a_run_that_waits_for_its_teacher_stops_at_once(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        daemon.stage.load_gate = asyncio.Event()
        run_id = await daemon.create()
        await daemon.reach(run_id, S.PLANNING)
        await daemon.runs.stop(run_id)
        await daemon.reach(run_id, S.STOPPED)
        assert not daemon.stage.home.run(run_id).worker_log.exists()


@asynchronous
async def test_a_stop_while_the_student_loads_is_kept_when_training_begins(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.create()
        await daemon.worker_says(run_id, "ready")
        await daemon.runs.stop(run_id)
        await daemon.runs.running(run_id)
        assert (await daemon.runs.get(run_id)).state is S.STOPPING


@asynchronous
async def test_a_worker_that_ignores_the_stop_is_ended_and_the_run_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_daemon.runs.workers.TERM_SECONDS", 0.2)
    async with Stage(tmp_path, worker="stubborn", stop_grace=0.2).daemon() as daemon:
        run_id = await daemon.start()
        await daemon.runs.stop(run_id)
        run = await daemon.reach(run_id, S.INTERRUPTED)
        assert "did not stop in time" in run.error_message
        assert run.state.resumable


@asynchronous
async def test_an_unknown_run_is_said_to_be_unknown(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        runs = daemon.runs
        for call in (runs.get, runs.stop, runs.resume, runs.delete, runs.metrics, runs.checkpoints, runs.assignment):
            assert (await refusal(call("nobody"))).reason is Reason.RUN_NOT_FOUND


# Resuming and deleting


@asynchronous
async def test_a_stopped_run_resumes_from_its_newest_checkpoint(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        for step in range(1, 6):
            await daemon.runs.report(run_id, with_run(metrics(step), run_id))
        write_checkpoint(daemon, run_id, 2)
        newest = write_checkpoint(daemon, run_id, 3, best_step=2)
        await daemon.runs.stop(run_id)
        await daemon.runs.finish(run_id, S.STOPPED)
        run, step = await daemon.runs.resume(run_id)
        assert (run.state, step, run.step, run.best_step, run.attempt) == (S.PENDING, 3, 3, 2, 1)
        assert [row["step"] for row in (await daemon.runs.metrics(run_id))[0]] == [1, 2, 3]
        assert (await daemon.runs.assignment(run_id))[1] == str(newest)
        os.killpg((await daemon.events.read(lambda store: store.workers()))[0].pid, signal.SIGTERM)
        await daemon.worker_says(run_id, "ready", times=2)
        await daemon.runs.running(run_id)


@asynchronous
async def test_a_run_without_checkpoint_resumes_from_the_start(tmp_path: Path) -> None:
    async with Stage(tmp_path, worker="killed").daemon() as daemon:
        run_id = await daemon.create()
        await daemon.reach(run_id, S.INTERRUPTED)
        run, step = await daemon.runs.resume(run_id)
        assert (step, run.error_message, run.finished_at) == (0, "", None)
        assert (await daemon.runs.assignment(run_id))[1] == ""
        await daemon.reach(run_id, S.INTERRUPTED)


@asynchronous
async def test_only_a_resting_unfinished_run_resumes(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        assert "RUNNING" in str(await refusal(daemon.runs.resume(run_id)))
        await daemon.runs.finish(run_id, S.SUCCEEDED)
        fault = await refusal(daemon.runs.resume(run_id))
        assert (fault.reason, fault.metadata["state"]) == (Reason.RUN_STATE_CONFLICT, "SUCCEEDED")


@asynchronous
async def test_a_run_whose_data_is_gone_does_not_resume(tmp_path: Path) -> None:
    async with Stage(tmp_path, worker="killed").daemon() as daemon:
        run_id = await daemon.create()
        await daemon.reach(run_id, S.INTERRUPTED)
        daemon.stage.faults = [FieldViolation("config.prompts_path", "no such file")]
        assert (await refusal(daemon.runs.resume(run_id))).reason is Reason.INVALID_RUN_CONFIG
        assert (await daemon.runs.get(run_id)).state is S.INTERRUPTED


@asynchronous
async def test_a_live_run_is_not_deleted_a_resting_one_with_its_files(tmp_path: Path) -> None:
    async with Stage(tmp_path, worker="fail").daemon() as daemon:
        run_id = await daemon.create()
        await daemon.reach(run_id, S.FAILED)
        write_checkpoint(daemon, run_id, 1)
        await daemon.runs.delete(run_id)
        assert (await refusal(daemon.runs.get(run_id))).reason is Reason.RUN_NOT_FOUND
        assert list(daemon.stage.home.root.rglob(f"*{run_id}*")) == []
        daemon.workers._command = (*daemon.workers._command[:-1], "obedient")
        live = await daemon.start()
        assert (await refusal(daemon.runs.delete(live))).reason is Reason.RUN_STATE_CONFLICT


# The daemon's end and its return


@asynchronous
async def test_closing_interrupts_live_runs_and_keeps_waiting_ones(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    async with stage.daemon() as daemon:
        live = await daemon.start()
        waiting = await daemon.create()
        worker = (await daemon.events.read(lambda store: store.workers()))[0]
        closing = asyncio.create_task(daemon.runs.close(grace=20.0))
        await daemon.reach(live, S.STOPPING)
        await daemon.runs.finish(live, S.STOPPED)
        os.killpg(worker.pid, signal.SIGTERM)
        await closing
        assert (await refusal(daemon.create())).reason is Reason.SHUTTING_DOWN
        run = await daemon.runs.get(live)
        assert (run.state, run.error_reason) == (S.INTERRUPTED, "SHUTTING_DOWN")
    async with stage.daemon() as daemon:
        assert (await daemon.runs.get(live)).state is S.INTERRUPTED
        await daemon.reach(waiting, S.LOADING)


@asynchronous
async def test_closing_does_not_turn_a_users_stop_into_an_interruption(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        run_id = await daemon.start()
        await daemon.runs.stop(run_id)
        closing = asyncio.create_task(daemon.runs.close(grace=20.0))
        await asyncio.sleep(0)
        await daemon.runs.finish(run_id, S.STOPPED)
        os.killpg((await daemon.events.read(lambda store: store.workers()))[0].pid, signal.SIGTERM)
        await closing
        assert (await daemon.runs.get(run_id)).state is S.STOPPED


DAEMON = """
import asyncio, sys
from pathlib import Path
from tests.runs.daemon import Stage

async def main():
    async with Stage(Path(sys.argv[1]), worker="stubborn").daemon() as daemon:
        print(await daemon.start(), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@asynchronous
async def test_a_daemon_that_was_killed_leaves_interrupted_runs_and_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_daemon.runs.workers.TERM_SECONDS", 0.2)
    repository = Path(__file__).parents[2]
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, str(tmp_path), cwd=repository, stdout=asyncio.subprocess.PIPE
    )
    assert killed.stdout is not None
    run_id = (await killed.stdout.readline()).decode().strip()
    killed.kill()
    await killed.wait()
    store = Store(tmp_path / "home" / "opd.db")
    [worker] = store.workers()
    store.close()
    assert psutil.pid_exists(worker.pid)
    async with Stage(tmp_path).daemon() as daemon:
        run = await daemon.runs.get(run_id)
        assert (run.state, run.error_reason) == (S.INTERRUPTED, "DAEMON_DIED")
        assert await daemon.events.read(lambda store: store.workers()) == []
        assert await daemon.states(run_id) == ["PENDING", "PLANNING", "LOADING", "RUNNING", "INTERRUPTED"]

        async def gone() -> bool:
            return not psutil.pid_exists(worker.pid) or psutil.Process(worker.pid).status() == psutil.STATUS_ZOMBIE

        await until(gone)


@asynchronous
async def test_a_strangers_process_with_a_workers_old_pid_is_left_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    store = Store(stage.home.database)
    own = psutil.Process()
    store.transact([lambda store: store.put_worker(WorkerRecord("r1", own.pid, own.create_time()))])
    store.close()
    async with stage.daemon() as daemon:
        assert await daemon.events.read(lambda store: store.workers()) == []


# A store that can't be written or read for a while


def arm(points: str) -> failpoints.Armed:
    armed = failpoints.arm({"OPD_FAILPOINTS": points, "OPD_TEST_HARNESS": "1"})
    assert armed is not None
    return armed


@pytest.fixture(autouse=True)
def disarm() -> Iterator[None]:
    yield
    failpoints.arm({})


@asynchronous
async def test_a_run_waits_for_a_full_disk_without_hammering_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_daemon.runs.attempt.DISK_RETRY_SECONDS", 0.1)
    async with Stage(tmp_path).daemon() as daemon:
        armed = arm("disk.write=error:ENOSPC@3+")  # after the file and the row of the accepted run
        run_id = await daemon.create()
        await asyncio.sleep(1.0)
        assert (await daemon.runs.get(run_id)).state is S.PENDING
        assert 3 < armed.reached["disk.write"] < 20
        failpoints.arm({})
        await daemon.worker_says(run_id, "ready")


@pytest.mark.parametrize("again", ["nightly", "Nightly"])
@asynchronous
async def test_a_deletion_that_was_not_seen_through_spares_the_next_run_of_that_name(
    tmp_path: Path, again: str
) -> None:
    stage = Stage(tmp_path, worker="fail")
    async with stage.daemon() as daemon:
        await daemon.create(run_id="nightly")
        await daemon.reach("nightly", S.FAILED)
        await daemon.runs._scheduler.wait("nightly")
        arm("store.commit.before=error:ENOSPC@2")  # the run is forgotten, that its files are gone is not stored
        assert (await refusal(daemon.runs.delete("nightly"))).reason is Reason.DISK_FULL
        failpoints.arm({})
        assert await daemon.events.read(Store.deleted_runs) == ["nightly"]
        await daemon.create(run_id=again)
        await daemon.reach(again, S.FAILED)
        written = write_checkpoint(daemon, again, 5)
        assert await daemon.events.read(Store.deleted_runs) == []
    async with stage.daemon():
        assert written.exists()
        assert stage.home.run(again).config.exists()


@asynchronous
async def test_files_of_a_known_run_are_never_removed_as_those_of_a_deleted_one(tmp_path: Path) -> None:
    stage = Stage(tmp_path, worker="fail")
    async with stage.daemon() as daemon:
        run_id = await daemon.create()
        await daemon.reach(run_id, S.FAILED)
    with closing(sqlite3.connect(stage.home.database)) as database, database:
        database.execute("INSERT INTO facts VALUES (?, '')", (f"deleted:{run_id}",))
    async with stage.daemon():
        assert stage.home.run(run_id).config.exists()


@asynchronous
async def test_a_client_that_gives_up_leaves_no_run_that_nobody_starts(tmp_path: Path) -> None:
    async with Stage(tmp_path).daemon() as daemon:
        armed = arm("store.commit.before=sleep:0.3")
        creating = asyncio.create_task(daemon.create(run_id="mine"))

        async def storing() -> bool:
            return armed.reached["store.commit.before"] > 0

        await until(storing)
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        await daemon.worker_says("mine", "ready")
        assert daemon.stage.home.run("mine").config.exists()


@asynchronous
async def test_a_store_that_can_not_be_read_once_does_not_end_the_scheduling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_daemon.runs.scheduler.RETRY_SECONDS", 0.1)
    async with Stage(tmp_path).daemon() as daemon:
        read, failures = Store.list_runs, iter([True])

        def fail_once(store: Store, *arguments: Any, **named: Any) -> Any:
            if named.get("oldest_first") and next(failures, False):
                raise sqlite3.OperationalError("disk I/O error")
            return read(store, *arguments, **named)

        monkeypatch.setattr(Store, "list_runs", fail_once)
        await daemon.worker_says(await daemon.create(), "ready")
        assert not next(failures, False)
