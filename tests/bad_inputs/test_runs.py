"""Runs asked for twice, stopped twice, deleted too early: one run, one stop, a conflict that is named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from opd_daemon.errors import Reason
from opd_daemon.types import RunState
from opd_daemon.v1 import run_pb2
from tests.bad_inputs.past import STATES, with_past_runs
from tests.bad_inputs.stage import Stage, raised, refusal
from tests.e2e.test_main_job import wait_for


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with raised(tmp_path_factory.mktemp("runs"), with_past_runs) as built:
        yield built


def test_stop_twice_and_resume_or_delete_while_running_are_conflicts(own: Stage) -> None:
    run, _ = own.client.create_run(own.values(num_steps=5000), request_id="once")
    try:
        again, _ = own.client.create_run(own.values(num_steps=5000), request_id="once")
        assert again.run_id == run.run_id
        error = refusal(lambda: own.client.create_run(own.values(num_steps=5001), request_id="once"))
        assert error.reason is Reason.REQUEST_ID_REUSED
        wait_for(own.client, run.run_id, lambda run: run.state is RunState.RUNNING and run.step >= 1)
        for wrong in (own.client.resume, own.client.delete):
            error = refusal(lambda wrong=wrong: wrong(run.run_id))  # type: ignore[misc]
            assert error.reason is Reason.RUN_STATE_CONFLICT
            assert "is RUNNING and can't be" in error.message
    finally:
        own.client.stop(run.run_id)
    assert own.client.stop(run.run_id).state in (RunState.STOPPING, RunState.STOPPED)
    assert wait_for(own.client, run.run_id, lambda run: run.state.resting).state is RunState.STOPPED
    error = refusal(lambda: own.client.stop(run.run_id))
    assert error.reason is Reason.RUN_STATE_CONFLICT
    assert "is STOPPED and has nothing to stop" in error.message
    page = run_pb2.ListMetricsRequest(run_id=run.run_id, page_token=30 * "9")
    assert refusal(lambda: own.runs.ListMetrics(page)).reason is Reason.INVALID_PAGE_TOKEN


@pytest.mark.parametrize("run_id", STATES)
def test_a_run_that_rests_has_nothing_to_stop(own: Stage, run_id: str) -> None:
    error = refusal(lambda: own.client.stop(run_id))
    assert error.reason is Reason.RUN_STATE_CONFLICT
    assert f"is {STATES[run_id]} and has nothing to stop" in error.message


def test_a_run_that_succeeded_is_not_resumed(own: Stage) -> None:
    assert refusal(lambda: own.client.resume("won")).reason is Reason.RUN_STATE_CONFLICT


def test_a_run_that_is_deleted_is_gone_for_every_call(own: Stage) -> None:
    own.client.delete("failed")
    for ask in (own.client.delete, own.client.run, own.client.stop, own.client.resume):
        assert refusal(lambda ask=ask: ask("failed")).reason is Reason.RUN_NOT_FOUND  # type: ignore[misc]
    assert own.serves()
