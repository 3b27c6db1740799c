"""Every number of the checklist is held by a test that exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_inputs import test_arguments, test_config, test_data, test_plugins, test_wire
from tests.bad_inputs.checklist import ARGUMENTS, CHECKLIST, CONFIG, DATA, PLUGIN, WIRE

ROOT = Path(__file__).parents[2]
# The numbers of the faults that each of these tests goes through.
NUMBERS: dict[str, list[int]] = {
    WIRE: [fault.number for fault in test_wire.FAULTS.values()],
    ARGUMENTS: [fault.number for fault in test_arguments.FAULTS.values()],
    CONFIG: [fault.number for fault in test_config.FAULTS.values()],
    DATA: [fault.number for fault in test_data.FAULTS.values()],
    PLUGIN: [number for number, _, _ in test_plugins.PLUGINS.values()],
}


def test_no_number_is_left_out() -> None:
    assert list(CHECKLIST) == list(range(1, 85))


@pytest.mark.parametrize("number", CHECKLIST)
def test_what_holds_a_number_exists(number: int) -> None:
    place = CHECKLIST[number][2]
    file, _, function = place.partition("::")
    assert f"def {function}(" in (ROOT / file).read_text() if function else (ROOT / file).is_file()


@pytest.mark.parametrize("number", [number for number, (_, _, place) in CHECKLIST.items() if place in NUMBERS])
def test_a_number_held_by_a_table_of_faults_has_one_there(number: int) -> None:
    assert number in NUMBERS[CHECKLIST[number][2]]


@pytest.mark.parametrize("place", NUMBERS)
def test_every_fault_of_a_table_is_of_a_number_of_the_checklist(place: str) -> None:
    assert NUMBERS[place]
    assert set(NUMBERS[place]) <= set(CHECKLIST)


def test_every_table_holds_a_number() -> None:
    assert set(NUMBERS) <= {place for _, _, place in CHECKLIST.values()}
