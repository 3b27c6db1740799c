"""What is measured on held-out prompts: names, units, and whether a change is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opd_daemon.distill.report.record import Row, number


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric. better: +1 where more is better, −1 where less is, 0 where neither. share: shown as a percentage."""

    name: str
    title: str
    explained: str
    better: int
    share: bool = False

    @property
    def factor(self) -> float:
        """From the metric to what is shown."""
        return 100.0 if self.share else 1.0

    def show(self, value: float) -> str:
        """The value with its unit's digits, without the unit."""
        return f"{100 * value:.1f}" if self.share else f"{value:.3f}"


MEASURES = (
    Measure("reverse_kl", "Reverse KL", "KL(student ‖ teacher), nats per token", -1),
    Measure("forward_kl", "Forward KL", "KL(teacher ‖ student), nats per token", -1),
    Measure("js_divergence", "Jensen–Shannon", "divergence of both from their mean, nats per token", -1),
    Measure("agreement", "Agreement", "both models' most likely token is the same, % of positions", 1, share=True),
    Measure("top5_agreement", "Top-5 agreement", "the teacher's choice is among the student's five, %", 1, share=True),
    Measure("acceptance", "Acceptance", "expected share of the student's drafts the teacher takes, %", 1, share=True),
    Measure("teacher_entropy", "Teacher's entropy", "nats per token", 0),
    Measure("student_entropy", "Student's entropy", "nats per token", 0),
)
# What tells whole runs apart, besides the above.
OF_RUNS = (
    Measure("validation_kl", "Validation KL", "the divergence by which the best checkpoint is chosen, per token", -1),
    Measure(
        "own_reverse_kl", "Own reverse KL", "KL(student ‖ teacher) on the student's own samples, nats per token", -1
    ),
    Measure("own_agreement", "Own agreement", "agreement on the student's own samples, % of positions", 1, share=True),
)
BY_NAME = {measure.name: measure for measure in (*MEASURES, *OF_RUNS)}
CRITERIA = ("reverse_kl", "forward_kl", "js_divergence", "acceptance")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over held-out completions; half_width: half its 95 % confidence interval, None where it is not known."""

    value: float
    half_width: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A measure before and after training."""

    measure: Measure
    before: Estimate
    after: Estimate

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after.value - self.before.value

    @property
    def certain(self) -> bool | None:
        """Whether it is more than noise; None without intervals."""
        return differ(self.before, self.after)

    @property
    def verdict(self) -> str:
        """better, worse, noise, same or changed."""
        if not self.measure.better:
            return "changed"
        if self.difference == 0:
            return "same"
        if self.certain is False:
            return "noise"
        return "better" if (self.difference > 0) == (self.measure.better > 0) else "worse"


def differ(one: Estimate, other: Estimate) -> bool | None:
    """Whether two means differ by more than the 95 % interval of their difference, taken as independent.

    On the same prompts that is cautious. None when an interval is not known.
    """
    if one.half_width is None or other.half_width is None:
        return None
    return abs(one.value - other.value) > math.hypot(one.half_width, other.half_width)


def compared_on(evaluation: Row | None, whose: str) -> Row | None:
    """The comparison on the teacher's completions ("teacher") or the student's own samples ("student").

    Rows of older versions know only the former, without intervals.
    """
    if evaluation is None:
        return None
    found = evaluation.get(f"on_{whose}")
    if isinstance(found, dict):
        return found
    return evaluation if whose == "teacher" else None


def estimate(comparison: Row | None, name: str) -> Estimate | None:
    """A measure of a comparison, with its interval where there is one."""
    value = number(comparison, name)
    if comparison is None or value is None:
        return None
    widths = comparison.get("half_widths")
    width = number(widths, name) if isinstance(widths, dict) else None
    return Estimate(value, width or None)


def criterion_of(evaluation: Row | None) -> tuple[str, str] | None:
    """Whose completions ("student" or "teacher") and which measure gave the validation KL; None when it is not told."""
    chosen = number(evaluation, "validation_kl")
    for whose in ("student", "teacher"):
        comparison = compared_on(evaluation, whose)
        for name in CRITERIA:
            value = number(comparison, name)
            # Of what both models share, total variation is the rest.
            if value is not None and chosen == (1.0 - value if name == "acceptance" else value):
                return whose, name
    return None


def validation_estimate(evaluation: Row | None) -> Estimate | None:
    """The validation KL, with the interval of the measure that it is."""
    chosen, criterion = number(evaluation, "validation_kl"), criterion_of(evaluation)
    if chosen is None:
        return None
    measured = estimate(compared_on(evaluation, criterion[0]), criterion[1]) if criterion else None
    return Estimate(chosen, measured.half_width if measured else None)


def changes(before: Row | None, after: Row | None) -> list[Change]:
    """Every measure both comparisons have."""
    found = []
    for measure in MEASURES:
        first, last = estimate(before, measure.name), estimate(after, measure.name)
        if first is not None and last is not None:
            found.append(Change(measure, first, last))
    return found


def band_of(evaluations: Sequence[Row], whose: str, name: str) -> tuple[list[float], list[Estimate]]:
    """Steps and estimates of a measure over a run's evaluations."""
    steps, values = [], []
    for row in evaluations:
        found = estimate(compared_on(row, whose), name)
        if found is not None:
            steps.append(float(row["step"]))
            values.append(found)
    return steps, values
