"""Every number of the checklist is held by a test that exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_inputs.checklist import CHECKLIST

ROOT = Path(__file__).parents[2]


def test_no_number_is_left_out() -> None:
    assert list(CHECKLIST) == list(range(1, 85))


@pytest.mark.parametrize("number", CHECKLIST)
def test_what_holds_a_number_exists(number: int) -> None:
    place = CHECKLIST[number][2]
    file, _, function = place.partition("::")
    assert f"def {function}(" in (ROOT / file).read_text() if function else (ROOT / file).is_file()
