"""What a run has written down when it is taken up again, and when a checkpoint may vouch for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd_daemon.distill.data import Prompt
from opd_daemon.distill.journal import Journal
from opd_daemon.distill.rollouts import Rollout, read_log
from opd_daemon.distill.step import Step, StopRequested
from opd_daemon.distill.token_table import PositionCurve, TokenTable, read_token_tables
from opd_daemon.home import Home, RunFolders
from opd_daemon.types import EvaluationMetrics, EventKind
from tests.distill.tiny_run import Told

CURVE = PositionCurve((0,), (0.5,), (0.25,), (3,))


@pytest.fixture
def folders(tmp_path: Path) -> RunFolders:
    return Home(tmp_path).run("run")


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def journal(told: Told, folders: RunFolders) -> Journal:
    return Journal(told, folders, lambda ids: "".join(map(chr, ids)))


def evaluation(step: int) -> EvaluationMetrics:
    numbers: dict[str, Any] = {n: 0.5 for n, kind in EvaluationMetrics.__annotations__.items() if kind == "float"}
    return EvaluationMetrics(**numbers, step=step, exact=True, tokens=3, samples=1)


def test_a_row_cut_off_by_a_crash_does_not_swallow_the_next_one(journal: Journal, folders: RunFolders) -> None:
    journal.evaluation(evaluation(0))
    with folders.eval_metrics.open("a") as file:
        file.write('{"step": 4, "forward_kl": 0.')
    journal.forget_after(0)
    journal.evaluation(evaluation(4))
    assert [json.loads(line)["step"] for line in folders.eval_metrics.read_text().splitlines()] == [0, 4]


def test_text_with_strange_line_ends_stays_one_row(journal: Journal, folders: RunFolders) -> None:
    answer = "one\u2028two\x85three"
    rollout = Rollout(Prompt(0, "why?", (1, 2)), tuple(map(ord, answer)), "stop", "student")
    journal.rollouts(1, [rollout], sample=True)
    journal.forget_after(1)
    assert [row["completion"] for row in read_log(folders.rollouts)] == [answer]
    assert [row["completion"] for row in read_log(folders.samples)] == [answer]


def test_the_tables_kept_are_the_first_and_the_newest(journal: Journal, folders: RunFolders) -> None:
    for step in (0, 4, 8):
        journal.evaluation(evaluation(step), TokenTable(step, (), CURVE))
    assert [table.step for table in read_token_tables(folders.token_tables)] == [0, 8]
    journal.forget_after(4)
    assert [table.step for table in read_token_tables(folders.token_tables)] == [0]
    journal.evaluation(evaluation(0), TokenTable(0, (), CURVE))
    assert [table.step for table in read_token_tables(folders.token_tables)] == [0]


def test_settling_waits_for_the_reporter_and_needs_no_files(journal: Journal, told: Told) -> None:
    shown: list[str] = []
    told._show = shown.append
    journal.settle()
    journal.evaluation(evaluation(0))
    journal.settle()
    assert shown == ["settled", f"{EventKind.EVALUATION} 0", "settled"]


def test_a_step_that_has_updated_the_student_is_not_cut_short() -> None:
    journal: Any = SimpleNamespace(gauges=lambda _: None)
    step = Step(1, [], 0, optimizer=None, journal=journal, should_stop=lambda: True, shows_sample=False)  # type: ignore[arg-type]
    with pytest.raises(StopRequested), step.phase("train"):
        pass
    step.began_update = True
    with step.phase("score"):
        pass
    assert "score" in step.phases
