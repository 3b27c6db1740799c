"""Payloads of events as messages and back: nothing is lost, nothing absent becomes a number."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from opd_daemon.types import Comparison, EvaluationMetrics, StepMetrics
from opd_daemon.wire.events import evaluation_from_proto, evaluation_to_proto, metrics_from_proto, metrics_to_proto


def comparison(value: float, **changes: Any) -> Comparison:
    numbers: dict[str, Any] = {name: value for name, kind in Comparison.__annotations__.items() if kind == "float"}
    return Comparison(**numbers, tokens=12, samples=3, **changes)


def evaluation(**changes: Any) -> EvaluationMetrics:
    numbers: dict[str, Any] = {name: 0.5 for name, kind in EvaluationMetrics.__annotations__.items() if kind == "float"}
    return EvaluationMetrics(**numbers, step=4, exact=True, tokens=12, samples=3, **changes)


def there_and_back(payload: dict[str, Any]) -> dict[str, Any]:
    message = evaluation_to_proto(payload)
    return evaluation_from_proto(type(message).FromString(message.SerializeToString()))


def test_an_evaluation_keeps_its_comparisons_quartiles_and_tasks() -> None:
    quartiles = tuple(comparison(value) for value in (0.25, 0.5, 0.75, 1.0))
    on_teacher = comparison(0.125, half_widths={"forward_kl": 0.0625}, quartiles=quartiles)
    payload = asdict(evaluation(on_teacher=on_teacher, validation_kl=0.25, tasks={"arc_easy": 0.5}))
    assert there_and_back(payload) == json.loads(json.dumps(payload))


def test_what_an_evaluation_does_not_have_stays_absent() -> None:
    found = there_and_back(asdict(evaluation(on_teacher=comparison(0.5))))
    assert found["on_student"] is None
    assert found["tasks"] == {}
    assert found["on_teacher"]["quartiles"] == []
    assert found["on_teacher"]["half_widths"] == {}


def test_a_payload_of_an_earlier_version_is_taken() -> None:
    payload = asdict(evaluation())
    for name in ("on_teacher", "on_student", "validation_kl", "tasks"):
        del payload[name]
    found = there_and_back(payload)
    assert found["on_teacher"] is None
    assert {name: found[name] for name in payload} == payload


def test_optional_numbers_of_a_step_are_kept_or_stay_absent() -> None:
    numbers: dict[str, Any] = {name: 1.0 for name, kind in StepMetrics.__annotations__.items() if kind == "float"}
    counts: dict[str, Any] = {name: 2 for name, kind in StepMetrics.__annotations__.items() if kind == "int"}
    payload = asdict(StepMetrics(**numbers, **counts, exact=True, bias_gap=0.0, teacher_support_mass=None))
    found = metrics_from_proto(metrics_to_proto(payload))
    assert found == payload
    assert found["bias_gap"] == 0.0
    assert found["teacher_support_mass"] is None
