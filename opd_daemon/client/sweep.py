"""A sweep: the grid of runs over some settings, on one daemon and so on one teacher cache; and what came of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from opd_daemon.client.client import Client
from opd_daemon.config import RunConfig
from opd_daemon.distill.report.measures import (
    BY_NAME,
    Estimate,
    compared_on,
    criterion_of,
    differ,
    estimate,
    validation_estimate,
)
from opd_daemon.distill.report.record import Row
from opd_daemon.errors import OpdError, Reason
from opd_daemon.names import is_identifier
from opd_daemon.types import Run, RunState

VALIDATION = "validation_kl"
OWN = "own_"
# A terminal has no room for more; the files have all.
SHOWN = (VALIDATION, "forward_kl", "reverse_kl", "agreement", "acceptance")
MEASURES = (*SHOWN, "own_reverse_kl", "own_agreement")
MOST_CELLS = 200
LONGEST_NAME = 50
ALL_STEPS = 10_000_000


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid: `settings` are what sets it apart."""

    run_id: str
    settings: dict[str, Any]
    config: RunConfig

    @property
    def label(self) -> str:
        """The settings, for people."""
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())

    @property
    def values(self) -> dict[str, Any]:
        """The configuration as it is sent; the same for the same cell, today and tomorrow."""
        return self.config.model_dump(mode="json", exclude_unset=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a cell.

    estimates: by measure, at the best evaluation, on the teacher's completions but for the `own_` ones; none where the
    run did not get that far. criterion: whose completions and which measure its validation KL is.
    """

    cell: Cell
    state: RunState
    error: str = ""
    steps: int = 0
    seconds: float | None = None
    estimates: dict[str, Estimate] = field(default_factory=dict)
    criterion: tuple[str, str] | None = None


def grid(variations: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, the last setting varying fastest.

    Raises:
        OpdError: INVALID_RUN_CONFIG for more runs than anyone wants.
    """
    cells = [dict(zip(variations, values, strict=True)) for values in product(*variations.values())]
    if len(cells) > MOST_CELLS:
        message = f"--vary: {len(cells)} runs; vary fewer settings at a time, at most {MOST_CELLS} runs"
        raise OpdError(Reason.INVALID_RUN_CONFIG, message)
    return cells


def check_name(name: str) -> str:
    """The name of a sweep, whose runs are called NAME-1, NAME-2 and so on.

    Raises:
        OpdError: INVALID_RUN_CONFIG when no run could be called so.
    """
    if not is_identifier(name) or len(name) > LONGEST_NAME:
        message = (
            f"--name {name!r}: use 1 to {LONGEST_NAME} letters, digits, '.', '_' or '-', the first a letter or digit"
        )
        raise OpdError(Reason.INVALID_RUN_CONFIG, message)
    return name


def known_runs(client: Client, cells: Sequence[Cell]) -> dict[str, Run]:
    """The runs of the sweep that exist already, by name."""
    names = {cell.run_id for cell in cells}
    return {run.run_id: run for run in client.runs() if run.run_id in names}


def start(client: Client, cell: Cell) -> Run:
    """Create the cell's run, or take up the one there is; one that is done stays as it is.

    Raises:
        OpdError: REQUEST_ID_REUSED when the sweep had another configuration; as `create_run` and `resume`.
    """
    try:
        run, _ = client.create_run(cell.values, request_id=f"sweep:{cell.run_id}")
    except OpdError as error:
        if error.reason is not Reason.REQUEST_ID_REUSED:
            raise
        message = (
            f"{cell.run_id} was made with other settings; choose another --name, or delete the runs of the old sweep"
        )
        raise OpdError(error.reason, message, run_id=cell.run_id) from None
    run, _ = client.run(run.run_id)
    return client.resume(run.run_id)[0] if run.state.resumable else run


def outcome(client: Client, cell: Cell) -> Outcome:
    """What the daemon knows of a cell's run."""
    run, _ = client.run(cell.run_id)
    steps, evaluations, _ = client.metrics(cell.run_id, ALL_STEPS)
    chosen = best_evaluation(evaluations) if run.step > 0 else None
    found = {name: _estimate(chosen, name) for name in MEASURES}
    return Outcome(
        cell,
        run.state,
        run.error_message,
        run.step,
        steps[-1]["seconds_elapsed"] if steps else None,
        {name: entry for name, entry in found.items() if entry is not None},
        criterion_of(chosen),
    )


def best_evaluation(evaluations: Sequence[Row]) -> Row | None:
    """The evaluation a run is judged by: that of its best checkpoint, else its last; None without a trained student."""
    trained = [row for row in evaluations if row["step"] > 0]
    return next((row for row in reversed(trained) if row.get("is_best")), trained[-1] if trained else None)


def _estimate(evaluation: Row | None, name: str) -> Estimate | None:
    if name == VALIDATION:
        return validation_estimate(evaluation)
    whose = "student" if name.startswith(OWN) else "teacher"
    return estimate(compared_on(evaluation, whose), name.removeprefix(OWN))


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """By validation KL, the lowest first; runs that have none to be compared by come last, as they were."""
    first, _ = best(outcomes, VALIDATION)
    if first is None:
        return list(outcomes)

    def place(entry: Outcome) -> float:
        found = entry.estimates.get(VALIDATION) if entry.state is RunState.SUCCEEDED else None
        return found.value if found else math.inf

    return sorted(outcomes, key=place)


def best(outcomes: Sequence[Outcome], name: str) -> tuple[Outcome | None, list[Outcome]]:
    """The best of the runs that are done, and those that can't be told from it.

    Of runs whose validation KLs are different divergences, or of different completions, none is best by that.
    """
    done = [entry for entry in outcomes if entry.state is RunState.SUCCEEDED and name in entry.estimates]
    if not done or (name == VALIDATION and not comparable(done)):
        return None, []
    sign = BY_NAME[name].better
    first = max(done, key=lambda entry: sign * entry.estimates[name].value)
    near = [entry for entry in done if entry is not first and _tied(first.estimates[name], entry.estimates[name])]
    return first, near


def comparable(outcomes: Sequence[Outcome]) -> bool:
    """Whether the validation KLs of the runs that are done are one divergence, on the same side's completions."""
    done = [entry for entry in outcomes if entry.state is RunState.SUCCEEDED and VALIDATION in entry.estimates]
    return len({entry.criterion for entry in done}) < 2


def _tied(one: Estimate, other: Estimate) -> bool:
    """Whether a difference is within noise; without intervals only equal numbers are."""
    apart = differ(one, other)
    return one.value == other.value if apart is None else not apart


def to_json(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The sweep as plain data: nats per token and shares, at each run's best evaluation."""
    winners = {measure: best(outcomes, measure) for measure in MEASURES}
    return {
        "sweep": name,
        "cells": [_cell_json(entry) for entry in outcomes],
        "best": {
            measure: {"run_id": first.cell.run_id, "within_noise": [entry.cell.run_id for entry in near]}
            for measure, (first, near) in winners.items()
            if first is not None
        },
    }


def _cell_json(entry: Outcome) -> dict[str, Any]:
    return {
        "run_id": entry.cell.run_id,
        "settings": entry.cell.settings,
        "state": str(entry.state),
        "error": entry.error,
        "steps": entry.steps,
        "seconds": entry.seconds,
        "measures": {
            name: {"value": found.value, "half_width": found.half_width} for name, found in entry.estimates.items()
        },
    }


def to_csv(outcomes: Sequence[Outcome]) -> str:
    """The sweep as a table, a line a run; half widths of 95 % intervals beside the means."""
    written = io.StringIO()
    writer = csv.writer(written)
    settings = list(outcomes[0].cell.settings) if outcomes else []
    columns = [column for name in MEASURES for column in (name, f"{name}_half_width")]
    writer.writerow(["run_id", *settings, "state", "error", "steps", "seconds", *columns])
    for entry in outcomes:
        values = list(_numbers(entry))
        chosen = [entry.cell.settings[name] for name in settings]
        writer.writerow(
            [entry.cell.run_id, *chosen, entry.state, entry.error, entry.steps, _number(entry.seconds), *values]
        )
    return written.getvalue()


def _numbers(entry: Outcome) -> Iterator[str]:
    for name in MEASURES:
        found = entry.estimates.get(name)
        yield _number(found.value if found else None)
        yield _number(found.half_width if found else None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
