"""The life of a run is one table."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from opd_daemon.errors import OpdError, Reason
from opd_daemon.runs.states import LIVE, TRANSITIONS, moved
from opd_daemon.types import RESTING, RESUMABLE, EventKind, Run, RunState

RUN = Run(run_id="r1", state=RunState.PENDING, config={}, created_at=datetime(2026, 11, 23, tzinfo=UTC), attempt=2)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(RunState, RunState)))
def test_a_transition_is_in_the_table_or_a_conflict_that_names_the_state(before: RunState, after: RunState) -> None:
    run = replace(RUN, state=before)
    if after in TRANSITIONS[before]:
        fresh, event = moved(run, after, message="why", error_reason="BECAUSE")
        assert fresh.state is after
        assert event.kind is EventKind.RUN_STATE
        assert event.payload == {
            "state": after,
            "previous": before,
            "message": "why",
            "error_reason": "BECAUSE",
            "attempt": 2,
        }
    else:
        with pytest.raises(OpdError, match=f"is {before}") as caught:
            moved(run, after)
        assert caught.value.reason is Reason.RUN_STATE_CONFLICT


def test_every_live_state_leads_to_rest_and_resumable_ones_back_to_pending() -> None:
    for state in LIVE:
        assert TRANSITIONS[state] & RESTING
    for state in RESTING:
        assert TRANSITIONS[state] == ({RunState.PENDING} if state in RESUMABLE else frozenset())


def test_a_failed_run_tells_why_until_it_is_resumed() -> None:
    failed, _ = moved(replace(RUN, state=RunState.RUNNING), RunState.FAILED, message="broken", error_reason="INTERNAL")
    assert (failed.error_reason, failed.error_message) == ("INTERNAL", "broken")
    assert failed.finished_at is not None
    again, _ = moved(failed, RunState.PENDING)
    assert (again.error_reason, again.error_message, again.finished_at) == ("", "", None)
