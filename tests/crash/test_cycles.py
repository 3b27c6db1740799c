"""What is acknowledged survives kill -9, and nothing else is left over. `OPD_SOAK=1` makes it a thousand deaths."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.crash.cycles import Cycles

SHORT, LONG = 10, 1000
SOAK = os.environ.get("OPD_SOAK") == "1"


@pytest.mark.timeout(7200 if SOAK else 120)
def test_nothing_acknowledged_is_lost_repeated_or_disordered_by_kill_9(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cycles = Cycles(tmp_path, seed=int(os.environ.get("OPD_SOAK_SEED", "4")))
    cycles.run(int(os.environ.get("OPD_SOAK_CYCLES", LONG)) if SOAK else SHORT)
    if SOAK:
        with capsys.disabled():
            sys.stdout.write(f"\n{cycles.figures()}\n")
    assert not cycles.findings.broken, cycles.findings.broken[:10]
    assert cycles.findings.acknowledged > 0
