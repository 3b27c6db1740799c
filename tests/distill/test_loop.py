"""What a run says of itself between its steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_daemon.types import EventKind
from tests.distill.tiny_run import Told, go, prepare


@pytest.mark.parametrize("staleness", [0, 1])
def test_time_is_left_until_the_last_evaluation_is_done(
    tiny_teacher: Path, tiny_student: Path, tmp_path: Path, staleness: int
) -> None:
    options = {"trainer_options": {"staleness": staleness}}
    told = Told()
    assert go(prepare(tmp_path / "run", tiny_teacher, tiny_student, **options), told)
    *earlier, last = [row["seconds_remaining"] for row in told.of(EventKind.METRICS)]
    quickest = min(row["seconds"] for row in told.of(EventKind.EVALUATION)[1:-1])
    assert 0 < last <= quickest
    assert min(earlier) > last
