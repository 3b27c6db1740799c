"""Metrics of a step, from what its tokens, rollouts and clocks say; and the step that collects them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.config import parse_config
from opd_daemon.distill.batches import pack
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.gradients import BatchGradient
from opd_daemon.distill.journal import Journal
from opd_daemon.distill.memory import MemoryReading
from opd_daemon.distill.metrics import StepTimes, TokenRecord, step_metrics
from opd_daemon.distill.optimizer import Optimizer
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.scoring import TeacherTargets
from opd_daemon.distill.step import Step, StopRequested
from opd_daemon.types import StepMetrics

TIMES = StepTimes({"rollout": 2000.0, "train": 500.0}, {"rollout": 10, "train": 30}, 4000.0, 9.0, 1.0)


def rollout(index: int, said: int, **more: Any) -> Rollout:
    given: dict[str, Any] = {"stopped": "stop", "source": "student", **more}
    return Rollout(Prompt(index, "", (1, 2)), tuple(range(3, 3 + said)), **given)


def result(made: list[Rollout], *, cached: bool = False, exact: bool = True, **values: Any) -> BatchGradient:
    targets = [
        TeacherTargets(hidden=np.zeros((len(each.completion_ids), 2), np.float32) if exact else None, cached=cached)
        for each in made
    ]
    batch = pack(made, targets, 1.0, "completion")
    arrays = {name: np.array(value, np.float32) for name, value in values.items()}
    return BatchGradient({"weight": mx.full((2,), 4.0)}, 6.0, batch.count, arrays, batch)


def metrics(record: TokenRecord, **more: Any) -> StepMetrics:
    given: dict[str, Any] = {"temperature": 2.0, "times": TIMES, "memory": MemoryReading(5, 40), **more}
    return step_metrics(step=7, total_steps=9, record=record, learning_rate=0.1, grad_norm=1.0, **given)


def test_means_are_over_tokens_and_the_loss_over_its_count() -> None:
    record = TokenRecord()
    record.add(result([rollout(0, 3)], kl=[1.0, 2.0, 3.0], clipped=[0, 1, 0]))
    record.add(result([rollout(1, 1)], kl=[6.0], clipped=[0]))
    found = metrics(record)
    assert (found.kl_mean, found.kl_loss, found.kl_max, found.kl_min) == (3.0, 12.0, 6.0, 1.0)
    assert found.loss == 12.0 / 4
    assert found.clipped_fraction == 0.25
    assert (found.micro_batches, found.tokens, found.samples, found.exact) == (2, 4, 2, True)


def test_what_no_token_tells_is_not_known() -> None:
    record = TokenRecord()
    record.add(result([rollout(0, 2)], exact=False, kl=[1.0, 2.0]))
    found = metrics(record)
    assert (found.bias_gap, found.bias_tokens, found.teacher_support_mass) == (None, 0, None)
    assert not found.exact
    record.add(result([rollout(1, 2)], kl=[1.0, 2.0], bias_gap=[0.5], teacher_support_mass=[0.5, 0.75]))
    found = metrics(record)
    assert (found.bias_gap, found.bias_tokens, found.teacher_support_mass) == (0.5, 1, 0.625)


def test_a_step_without_a_teacher_says_that_it_compared_nothing() -> None:
    made = [rollout(0, 2, source="data"), rollout(1, 3, source="data")]
    record = TokenRecord()
    record.add(result(made, exact=False, ce=[1.0] * 5, student_entropy=[2.0] * 5))
    found = metrics(record)
    assert (found.compared_tokens, found.cache_hits, found.cache_misses) == (0, 0, 0)
    assert (found.ce_loss, found.student_entropy, found.tokens) == (1.0, 2.0, 5)
    record.add(result([rollout(2, 4)], kl=[1.0] * 4, forward_kl=[1.0] * 4))
    found = metrics(record)
    assert (found.compared_tokens, found.cache_misses) == (4, 1)


def test_tokens_are_those_that_are_trained_on() -> None:
    made = [rollout(0, 4), rollout(1, 6, trained=np.array([True] * 2 + [False] * 4))]
    record = TokenRecord()
    record.add(result(made, kl=[1.0] * 6))
    found = metrics(record)
    assert (found.tokens, found.completion_length) == (6, 5.0)


def test_rollouts_are_counted_once_also_those_that_are_not_trained_on() -> None:
    made = [
        rollout(0, 2, version=6),
        rollout(1, 4, stopped="length", version=5),
        rollout(2, 6, stopped="repetition", trained=np.zeros(6, np.bool_), version=6),
        rollout(3, 8, source="teacher"),
    ]
    record = TokenRecord()
    record.take(made)
    record.add(result(made[:2], cached=True, kl=[0.0] * 6))
    record.add(result(made[3:], kl=[0.0] * 8))
    found = metrics(record)
    assert (found.samples, found.tokens, found.completion_length) == (4, 14, 5.0)
    assert (found.truncated_fraction, found.repetition_fraction, found.on_policy_fraction) == (0.25, 0.25, 0.75)
    assert found.staleness == 1
    assert (found.cache_hits, found.cache_misses) == (2, 1)
    assert (found.rollout_tokens_per_second, found.teacher_tokens_per_second) == (10.0, 0.0)
    assert found.student_tokens_per_second == 28.0


def test_without_samples_of_the_student_nothing_is_stale() -> None:
    record = TokenRecord()
    record.take([rollout(0, 2, source="data")])
    assert metrics(record).staleness == 0


class Quiet:
    """As much of a journal and an optimizer as a step needs."""

    def __init__(self) -> None:
        self.config = parse_config({"base_model_path": "b", "teacher_model_path": "t", "prompts_path": "p"})
        self.config = self.config.model_copy(update={"max_grad_norm": 1e9})
        self.updates: list[Any] = []
        self.readings: list[dict[str, float]] = []

    def gauges(self, values: dict[str, float]) -> None:
        self.readings.append(values)

    def rollouts(self, step: int, rollouts: Any, *, sample: bool) -> None:
        pass

    def update(self, gradients: Any, number: int) -> None:
        self.updates.append(gradients)


@pytest.fixture
def quiet() -> Quiet:
    return Quiet()


def make_step(quiet: Quiet, *, stop: bool = False) -> Step:
    return Step(
        1,
        [],
        0,
        optimizer=cast(Optimizer, quiet),
        journal=cast(Journal, quiet),
        should_stop=lambda: stop,
        shows_sample=False,
    )


def test_a_step_divides_by_the_count_of_all_its_micro_batches(quiet: Quiet) -> None:
    step = make_step(quiet)
    step.accumulate(result([rollout(0, 3)], kl=[0.0] * 3))
    step.accumulate(result([rollout(1, 1)], kl=[0.0]))
    step.update()
    assert np.array(quiet.updates[0]["weight"]) == pytest.approx([2.0, 2.0])
    assert step.updated


def test_a_step_with_nothing_to_train_on_updates_nothing(quiet: Quiet) -> None:
    step = make_step(quiet)
    step.log_rollouts([rollout(0, 3, trained=np.zeros(3, np.bool_))])
    step.update()
    assert step.updated
    assert step.finite
    assert quiet.updates == []
    found = metrics(step.record)
    assert (found.samples, found.loss, found.micro_batches) == (1, 0.0, 0)


def test_no_number_is_no_update(quiet: Quiet) -> None:
    step = make_step(quiet)
    step.accumulate(replace(result([rollout(0, 3)], kl=[0.0] * 3), loss=math.nan))
    step.update()
    assert not step.finite
    assert quiet.updates == []


def test_every_phase_has_a_peak_of_its_own_and_the_step_the_highest(quiet: Quiet) -> None:
    size = 8 << 20

    def hold(times: int) -> None:
        mx.eval(mx.zeros((times * size // 4,)))

    step = make_step(quiet)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    hold(8)
    for name, times in (("rollout", 1), ("score", 4), ("train", 2), ("rollout", 3)):
        with step.phase(name):
            hold(times)
    peaks = {name: round((peak - before) / size) for name, peak in step.peaks.items()}
    assert peaks == {"rollout": 3, "score": 4, "train": 2}
    assert round((step.peak_bytes - before) / size) == 8
    assert quiet.readings[-1]["peak_memory_bytes"] == step.peak_bytes
    assert step.phases["rollout"] > 0


def test_a_stop_ends_a_step_between_its_phases(quiet: Quiet) -> None:
    with pytest.raises(StopRequested), make_step(quiet, stop=True).phase("train"):
        pytest.fail("the phase began")
