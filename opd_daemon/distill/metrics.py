"""Metrics of a step, put together from what every token, rollout and clock of the step said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_daemon.distill.gradients import BatchGradient
from opd_daemon.distill.memory import MemoryReading
from opd_daemon.types import StepMetrics


@dataclass(slots=True)
class TokenRecord:
    """What is known of the tokens and rollouts of one step."""

    values: dict[str, list[npt.NDArray[np.float32]]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    truncated: int = 0
    cache_hits: int = 0
    loss: float = 0.0
    count: float = 0.0

    def add(self, result: BatchGradient) -> None:
        """Take in a micro-batch."""
        for name, value in result.values.items():
            self.values.setdefault(name, []).append(value)
        self.loss += result.loss
        self.count += result.count
        self.lengths += [len(rollout.completion_ids) for rollout in result.batch.rollouts]
        self.truncated += sum(not rollout.finished for rollout in result.batch.rollouts)
        self.cache_hits += sum(target.cached for target in result.batch.targets)

    def of(self, name: str) -> npt.NDArray[np.float64]:
        """All values of that name, in float64; one 0 where the objective doesn't compute it."""
        parts = self.values.get(name)
        return np.concatenate(parts).astype(np.float64) if parts else np.zeros(1)

    def mean(self, name: str) -> float:
        """Mean over the step's tokens."""
        return float(self.of(name).mean())


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Milliseconds of the step's phases and of the whole, and where the run stands in time."""

    phases: dict[str, float]
    step_milliseconds: float
    seconds_elapsed: float
    seconds_remaining: float


def step_metrics(
    *,
    step: int,
    total_steps: int,
    record: TokenRecord,
    temperature: float,
    learning_rate: float,
    grad_norm: float,
    times: StepTimes,
    memory: MemoryReading,
) -> StepMetrics:
    """Metrics of one optimizer update."""
    divergence = record.of("kl")
    samples, tokens = len(record.lengths), sum(record.lengths)
    return StepMetrics(
        step=step,
        total_steps=total_steps,
        loss=record.loss / max(record.count, 1.0),
        kl_loss=float(divergence.mean()) * temperature**2,
        ce_loss=record.mean("ce"),
        kl_mean=float(divergence.mean()),
        kl_std=float(divergence.std()),
        kl_max=float(divergence.max()),
        kl_min=float(divergence.min()),
        forward_kl=record.mean("forward_kl"),
        reverse_kl=record.mean("reverse_kl"),
        js_divergence=record.mean("js_divergence"),
        agreement=record.mean("agreement"),
        top5_agreement=record.mean("top5_agreement"),
        teacher_entropy=record.mean("teacher_entropy"),
        student_entropy=record.mean("student_entropy"),
        temperature=temperature,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        tokens=tokens,
        samples=samples,
        tokens_per_second=1000.0 * tokens / max(times.step_milliseconds, 1e-3),
        rollout_milliseconds=times.phases.get("rollout", 0.0),
        teacher_milliseconds=times.phases.get("score", 0.0),
        student_milliseconds=times.phases.get("train", 0.0),
        step_milliseconds=times.step_milliseconds,
        completion_length=tokens / max(samples, 1),
        truncated_fraction=record.truncated / max(samples, 1),
        cache_hits=record.cache_hits,
        cache_misses=samples - record.cache_hits,
        active_memory_bytes=memory.active_bytes,
        peak_memory_bytes=memory.peak_bytes,
        seconds_elapsed=times.seconds_elapsed,
        seconds_remaining=times.seconds_remaining,
    )


def finite(values: dict[str, Any]) -> bool:
    """Whether every number is one."""
    return all(math.isfinite(value) for value in values.values() if isinstance(value, int | float))


def median(values: Sequence[float]) -> float:
    """The middle of the recent measurements; 0 of none."""
    return float(np.median(values)) if values else 0.0
