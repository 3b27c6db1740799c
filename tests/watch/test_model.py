"""The six guarantees of a watch, whatever happens to the log and in whatever order.

With OPD_SOAK=1 for at least 100 000 steps, from another start each time; the figures are printed at the end.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.watch.machine import WatchMachine, figures

SOAK_STEPS = 100_000
SHORT = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages end after three events, so in the middle of most batches: those of usual size hardly ever end here."""
    monkeypatch.setattr("opd_daemon.events.PAGE", 3)


def test_a_watch_is_ordered_unique_atomic_reliable_resumable_and_bookmarkable() -> None:
    run_state_machine_as_test(WatchMachine, settings=SHORT)
    assert min(figures[name] for name in ("restart", "kill", "compact", "bookmarks", "resumed")) > 0


@pytest.mark.skipif(os.environ.get("OPD_SOAK") != "1", reason="takes half an hour; 'make soak' sets OPD_SOAK=1")
@pytest.mark.timeout(7200)
def test_the_guarantees_hold_for_a_hundred_thousand_steps(capsys: pytest.CaptureFixture[str]) -> None:
    figures.clear()
    while figures["steps"] < SOAK_STEPS:
        run_state_machine_as_test(WatchMachine, settings=settings(SHORT, max_examples=100, derandomize=False))
    with capsys.disabled():
        print("\n" + ", ".join(f"{name} {count:,}" for name, count in figures.most_common()))  # noqa: T201
