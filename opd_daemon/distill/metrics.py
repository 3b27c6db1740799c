"""Metrics of a step, put together from what every token, rollout and clock of the step said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_daemon.distill.gradients import BatchGradient
from opd_daemon.distill.memory import MemoryReading
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.types import StepMetrics


@dataclass(slots=True)
class TokenRecord:
    """What is known of the tokens and rollouts of one step. exact: the divergence is over the whole vocabulary."""

    values: dict[str, list[npt.NDArray[np.float32]]] = field(default_factory=dict)
    rollouts: list[Rollout] = field(default_factory=list)
    asked: int = 0
    cache_hits: int = 0
    loss: float = 0.0
    count: float = 0.0
    rows: int = 0
    micro_batches: int = 0
    exact: bool = False

    def take(self, rollouts: Iterable[Rollout]) -> None:
        """Take in rollouts; those known already are not counted twice."""
        known = {id(rollout) for rollout in self.rollouts}
        self.rollouts += [rollout for rollout in rollouts if id(rollout) not in known]

    def add(self, result: BatchGradient) -> None:
        """Take in a micro-batch."""
        for name, value in result.values.items():
            self.values.setdefault(name, []).append(value)
        self.loss += result.loss
        self.count += result.count
        self.rows += len(result.batch.rows)
        self.micro_batches += 1
        self.exact = result.batch.rows.exact
        self.asked += sum(target.asked for target in result.batch.targets)
        self.cache_hits += sum(target.cached for target in result.batch.targets)
        self.take(result.batch.rollouts)

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return sum(len(rollout.completion_ids) for rollout in self.rollouts)

    @property
    def trained_tokens(self) -> int:
        """Those of them that are trained on."""
        return sum(rollout.trained_tokens for rollout in self.rollouts)

    @property
    def compared_tokens(self) -> int:
        """Tokens at which the models were compared: none where the teacher is not asked, or all is masked."""
        return sum(map(len, self.values.get("forward_kl", ())))

    def share(self, stopped: str) -> float:
        """Share of the rollouts that ended this way."""
        return self._share(rollout.stopped == stopped for rollout in self.rollouts)

    @property
    def on_policy_fraction(self) -> float:
        """Share of the rollouts that the student sampled."""
        return self._share(rollout.source == "student" for rollout in self.rollouts)

    def staleness(self, updates: int) -> int:
        """Most updates between a student that sampled and the one that had `updates` of them."""
        versions = [rollout.version for rollout in self.rollouts if rollout.source == "student"]
        return updates - min(versions, default=updates)

    def of(self, name: str) -> npt.NDArray[np.float64]:
        """All values of that name, in float64; one 0 where the objective doesn't compute it."""
        parts = self.values.get(name)
        return np.concatenate(parts).astype(np.float64) if parts else np.zeros(1)

    def mean(self, name: str) -> float:
        """Mean over the step's tokens."""
        return float(self.of(name).mean())

    def known_mean(self, name: str) -> float | None:
        """Mean over the tokens it is known of; None where there are none."""
        return self.mean(name) if name in self.values else None

    def _share(self, matches: Iterable[bool]) -> float:
        return sum(matches) / max(len(self.rollouts), 1)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Milliseconds and MLX's peak bytes of the step's phases, and where the run stands in time."""

    phases: dict[str, float]
    peaks: dict[str, int]
    step_milliseconds: float
    seconds_elapsed: float
    seconds_remaining: float

    def rate(self, phase: str, tokens: int) -> float:
        """Tokens per second of a phase; 0 where there was none."""
        milliseconds = self.phases.get(phase, 0.0)
        return 1000.0 * tokens / milliseconds if milliseconds else 0.0


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
    samples, tokens, trained = len(record.rollouts), record.tokens, record.trained_tokens
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
        tokens=trained,
        samples=samples,
        tokens_per_second=1000.0 * trained / max(times.step_milliseconds, 1e-3),
        rollout_milliseconds=times.phases.get("rollout", 0.0),
        teacher_milliseconds=times.phases.get("score", 0.0),
        student_milliseconds=times.phases.get("train", 0.0),
        step_milliseconds=times.step_milliseconds,
        completion_length=tokens / max(samples, 1),
        truncated_fraction=record.share("length"),
        cache_hits=record.cache_hits,
        cache_misses=record.asked - record.cache_hits,
        active_memory_bytes=memory.active_bytes,
        peak_memory_bytes=memory.peak_bytes,
        seconds_elapsed=times.seconds_elapsed,
        seconds_remaining=times.seconds_remaining,
        exact=record.exact,
        bias_gap=record.known_mean("bias_gap"),
        bias_tokens=len(record.of("bias_gap")) if "bias_gap" in record.values else 0,
        teacher_support_mass=record.known_mean("teacher_support_mass"),
        student_support_mass=record.known_mean("student_support_mass"),
        clipped_fraction=record.mean("clipped"),
        repetition_fraction=record.share("repetition"),
        on_policy_fraction=record.on_policy_fraction,
        staleness=record.staleness(step - 1),
        micro_batches=record.micro_batches,
        rollout_tokens_per_second=times.rate("rollout", tokens),
        teacher_tokens_per_second=times.rate("score", tokens),
        student_tokens_per_second=times.rate("train", record.rows),
        rollout_peak_bytes=times.peaks.get("rollout", 0),
        teacher_peak_bytes=times.peaks.get("score", 0),
        student_peak_bytes=times.peaks.get("train", 0),
        compared_tokens=record.compared_tokens,
    )


def finite(values: dict[str, Any]) -> bool:
    """Whether every number is one."""
    return all(math.isfinite(value) for value in values.values() if isinstance(value, int | float))


def median(values: Sequence[float]) -> float:
    """The middle of the recent measurements; 0 of none."""
    return float(np.median(values)) if values else 0.0
