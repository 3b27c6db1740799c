"""Sweeps: the grid, what is started, and what may be concluded."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from opd_daemon.client import Client
from opd_daemon.client.sweep import (
    MEASURES,
    MOST_CELLS,
    Cell,
    Outcome,
    best,
    best_evaluation,
    check_name,
    grid,
    known_runs,
    outcome,
    ranked,
    start,
    to_csv,
    to_json,
)
from opd_daemon.config import parse_config
from opd_daemon.distill.report.measures import Estimate
from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import Event, RunState


def cell(number: int, **changes: object) -> Cell:
    config = parse_config({"base_model_path": "/s", "teacher_model_path": "/t", "prompts_path": "/p", **changes})
    return Cell(f"sweep-{number}", dict(changes), config)


def done(number: int, reverse_kl: float, width: float | None = 0.1, **changes: object) -> Outcome:
    found = {"reverse_kl": Estimate(reverse_kl, width), "agreement": Estimate(0.5 - 0.1 * reverse_kl, width)}
    return Outcome(cell(number, **changes), RunState.SUCCEEDED, steps=4, seconds=12.5, estimates=found)


def test_the_grid_has_every_combination_in_order() -> None:
    assert grid({"temperature": [1, 2], "divergence": ["a", "b"]}) == [
        {"temperature": 1, "divergence": "a"},
        {"temperature": 1, "divergence": "b"},
        {"temperature": 2, "divergence": "a"},
        {"temperature": 2, "divergence": "b"},
    ]
    with pytest.raises(OpdError, match="vary fewer"):
        grid({"seed": list(range(MOST_CELLS + 1))})


@pytest.mark.parametrize("name", ["", "../up", "-x", "a b", "x" * 51])
def test_a_name_no_run_could_have_is_refused(name: str) -> None:
    with pytest.raises(OpdError, match="--name"):
        check_name(name)


def test_best_is_by_the_direction_of_the_measure_and_ties_are_within_noise() -> None:
    outcomes = [done(1, 2.0), done(2, 1.0), done(3, 1.1)]
    first, near = best(outcomes, "reverse_kl")
    assert first is outcomes[1]
    assert near == [outcomes[2]]
    assert best(outcomes, "agreement")[0] is outcomes[1]
    assert best(outcomes, "acceptance") == (None, [])


def test_without_intervals_only_equal_numbers_tie() -> None:
    outcomes = [done(1, 1.0, None), done(2, 1.0, None), done(3, 1.0001, None)]
    assert best(outcomes, "reverse_kl") == (outcomes[0], [outcomes[1]])


def test_a_failed_run_is_never_best_and_is_shown_with_its_reason() -> None:
    failed = Outcome(cell(2, temperature=4), RunState.FAILED, "no memory", 1, None, {"reverse_kl": Estimate(0.1, 0.1)})
    outcomes = [done(1, 1.0, temperature=2), failed]
    assert best(outcomes, "reverse_kl") == (outcomes[0], [])
    content = json.loads(json.dumps(to_json("s", outcomes)))
    assert content["best"]["reverse_kl"] == {"run_id": "sweep-1", "within_noise": []}
    assert (content["cells"][1]["state"], content["cells"][1]["error"]) == ("FAILED", "no memory")
    rows = list(csv.DictReader(io.StringIO(to_csv(outcomes))))
    assert [(row["run_id"], row["temperature"], row["error"]) for row in rows] == [
        ("sweep-1", "2", ""),
        ("sweep-2", "4", "no memory"),
    ]
    assert float(rows[0]["reverse_kl_half_width"]) == 0.1
    assert rows[0]["acceptance"] == ""


def test_runs_are_ranked_by_the_divergence_that_chose_their_checkpoints() -> None:
    def judged(number: int, validation_kl: float, criterion: tuple[str, str], forward_kl: float) -> Outcome:
        found = {"validation_kl": Estimate(validation_kl, 0.1), "forward_kl": Estimate(forward_kl, 0.1)}
        return Outcome(cell(number), RunState.SUCCEEDED, estimates=found, criterion=criterion)

    own = ("student", "reverse_kl")
    outcomes = [judged(1, 2.0, own, 1.0), Outcome(cell(2), RunState.FAILED), judged(3, 1.0, own, 2.0)]
    assert ranked(outcomes) == [outcomes[2], outcomes[0], outcomes[1]]
    assert best(outcomes, "validation_kl")[0] is outcomes[2]
    # What one run calls its validation KL is no measure for another that was trained by another divergence.
    mixed = [*outcomes, judged(4, 0.5, ("teacher", "forward_kl"), 0.5)]
    assert best(mixed, "validation_kl") == (None, [])
    assert ranked(mixed) == mixed
    assert best(mixed, "forward_kl")[0] is mixed[3]


def test_a_run_is_judged_by_its_best_evaluation() -> None:
    rows = [{"step": step, "is_best": step in (2, 4)} for step in (0, 2, 4, 6)]
    assert best_evaluation(rows) == rows[2]
    assert best_evaluation([rows[0], rows[3]]) == rows[3]
    assert best_evaluation(rows[:1]) is None


@pytest.fixture
def values(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> dict[str, object]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {number}?"}) + "\n" for number in range(8)))
    return {
        "base_model_path": str(tiny_student),
        "teacher_model_path": str(tiny_teacher),
        "prompts_path": str(prompts),
        "num_steps": 2,
        "max_generation_tokens": 4,
        "lora": {"rank": 2},
    }


def wait(client: Client, run_id: str) -> None:
    for item in client.watch(0, run_id):
        if isinstance(item, Event) and RunState(item.payload.get("state") or RunState.RUNNING).resting:
            return


def test_the_same_cell_again_is_the_same_run_and_other_settings_are_refused(
    client: Client, values: dict[str, object]
) -> None:
    wanted = Cell(
        "cell-1", {"learning_rate": 1e-3}, parse_config({**values, "run_id": "cell-1", "learning_rate": 1e-3})
    )
    assert known_runs(client, [wanted]) == {}
    run = start(client, wanted)
    assert run.run_id == "cell-1"
    wait(client, "cell-1")
    again = start(client, wanted)
    assert (again.run_id, again.state, again.attempt) == ("cell-1", RunState.SUCCEEDED, 0)
    assert known_runs(client, [wanted]).keys() == {"cell-1"}
    found = outcome(client, wanted)
    assert found.state is RunState.SUCCEEDED
    assert found.steps == 2
    assert found.seconds is not None
    assert found.estimates.keys() == set(MEASURES)
    chosen = client.metrics("cell-1")[1][-1]
    assert chosen["is_best"]
    assert found.criterion == ("student", "reverse_kl")
    assert found.estimates["validation_kl"] == found.estimates["own_reverse_kl"]
    assert found.estimates["validation_kl"].value == chosen["validation_kl"] == chosen["on_student"]["reverse_kl"]
    assert found.estimates["reverse_kl"].value == chosen["on_teacher"]["reverse_kl"]
    changed = Cell("cell-1", {}, parse_config({**values, "run_id": "cell-1", "learning_rate": 1e-2}))
    with pytest.raises(OpdError, match="cell-1 was made with other settings; choose another --name") as refused:
        start(client, changed)
    assert refused.value.reason is Reason.REQUEST_ID_REUSED


def test_a_stopped_cell_is_taken_up_again(client: Client, values: dict[str, object]) -> None:
    first = Cell("queue-1", {}, parse_config({**values, "run_id": "queue-1", "num_steps": 5000, "eval_every": 5000}))
    second = Cell("queue-2", {}, parse_config({**values, "run_id": "queue-2"}))
    start(client, first)
    start(client, second)
    assert client.stop("queue-2").state is RunState.STOPPED
    assert start(client, second).state is RunState.PENDING
    client.stop("queue-1")
    wait(client, "queue-1")
    wait_for_end(client, "queue-2")


def wait_for_end(client: Client, run_id: str) -> None:
    """Until its newest attempt is done; an earlier stop does not count."""
    for _ in client.watch(0, run_id):
        if client.run(run_id)[0].state is RunState.SUCCEEDED:
            return
