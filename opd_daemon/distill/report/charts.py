"""Which charts a run has, and how each is drawn. A chart whose numbers are missing is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from opd_daemon.distill.report.curves import Curve, curve, one_line
from opd_daemon.distill.report.drawing import (
    FAINT,
    INK,
    MUTED,
    STUDENT,
    TEACHER,
    Chart,
    band,
    from_zero,
    labels,
    line,
    steps_axis,
)
from opd_daemon.distill.report.measures import BY_NAME, Estimate, band_of, compared_on, estimate
from opd_daemon.distill.report.record import Row, RunRecord, number

MOST_MARKERS = 40
LABELLED = 88
"""Margin for the names of lines, in pixels."""


def learning_charts(record: RunRecord) -> Iterator[Chart]:
    """How student and teacher came together, in training and on the held-out prompts."""
    for name in ("reverse_kl", "forward_kl", "agreement", "top5_agreement", "acceptance"):
        yield from _measure(record, name)
    yield from _entropies(record)


def position_charts(record: RunRecord) -> Iterator[Chart]:
    """Where in a completion the two still differ."""
    for name in ("reverse_kl", "forward_kl"):
        yield from _by_position(record, name)
    yield from _by_quartile(record, "reverse_kl")


def training_charts(record: RunRecord) -> Iterator[Chart]:
    """How the training went."""
    yield from _simple(record, "loss", "Loss", "What was minimised, by step.")
    yield from _simple(record, "learning_rate", "Learning rate", "", left=60)
    yield from _grad_norm(record)
    yield from _lengths(record)
    shares = (
        ("truncated_fraction", "Cut off at the limit", "Share of completions that did not end by themselves, %."),
        ("repetition_fraction", "Repeating", "Share of completions that ended in a repetition, %."),
        ("on_policy_fraction", "On the student's own samples", "Share of a step's completions the student wrote, %."),
        ("clipped_fraction", "Clipped", "Share of tokens whose loss was clipped, %."),
    )
    for name, title, note in shares:
        yield from _share(record, name, title, note)
    yield from _support(record)
    yield from _bias(record)


# On held-out prompts


def _measure(record: RunRecord, name: str) -> Iterator[Chart]:
    measure = BY_NAME[name]
    training = curve(record.steps, name, measure.factor)
    held_out = {whose: band_of(record.evaluations, whose, name) for whose in ("teacher", "student")}
    if not training and not any(len(steps) > 1 for steps, _ in held_out.values()):
        return

    def draw(axes: Any) -> None:
        ends, values = [], list(training.high)
        if training:
            _trained(axes, training)
            ends.append((training.x[-1], training.y[-1], "training", FAINT))
        for whose, (steps, estimates) in held_out.items():
            if not steps:
                continue
            own = whose == "student"
            values += _held_out(axes, steps, estimates, measure.factor, dashed=own)
            text = "own samples" if own else "held-out"
            ends.append((steps[-1], measure.factor * estimates[-1].value, text, STUDENT))
        from_zero(axes, values)
        if measure.share:
            axes.set_ylim(0, min(100.0, axes.get_ylim()[1]))
        steps_axis(axes, record.last_step)
        labels(axes, ends)

    yield Chart(name, measure.title, draw, f"{measure.explained[:1].upper()}{measure.explained[1:]}.", right=LABELLED)


def _trained(axes: Any, training: Curve) -> None:
    if training.thinned:
        band(axes, training.x, training.low, training.high, FAINT)
    line(axes, training.x, training.y, FAINT, linewidth=1.1)


def _held_out(
    axes: Any, steps: list[float], estimates: Sequence[Estimate], factor: float, *, dashed: bool
) -> list[float]:
    values = [factor * entry.value for entry in estimates]
    widths = [factor * (entry.half_width or 0.0) for entry in estimates]
    low = [max(0.0, value - width) for value, width in zip(values, widths, strict=True)]
    high = [value + width for value, width in zip(values, widths, strict=True)]
    if any(widths):
        band(axes, steps, low, high, STUDENT)
    style = {"linestyle": (0, (4, 2)), "dash_capstyle": "round"} if dashed else {}
    markers = {"marker": "o", "markersize": 3.2} if len(steps) <= MOST_MARKERS else {}
    line(axes, steps, values, STUDENT, **style, **markers)
    return high


def _entropies(record: RunRecord) -> Iterator[Chart]:
    names = (("teacher_entropy", "teacher", TEACHER), ("student_entropy", "student", STUDENT))
    training = {name: curve(record.steps, name) for name, _, _ in names}
    held_out = {name: band_of(record.evaluations, "teacher", name) for name, _, _ in names}
    if not any(training.values()) and not any(len(steps) > 1 for steps, _ in held_out.values()):
        return

    def draw(axes: Any) -> None:
        ends, values = [], []
        for name, title, color in names:
            steps, estimates = held_out[name]
            if training[name]:
                line(axes, training[name].x, training[name].y, color, linewidth=1.0, alpha=0.4)
                values += training[name].y
            if steps:
                line(axes, steps, [entry.value for entry in estimates], color, marker="o", markersize=3.2)
                values += [entry.value for entry in estimates]
            x, y = (steps[-1], estimates[-1].value) if steps else (training[name].x[-1], training[name].y[-1])
            ends.append((x, y, title, color))
        from_zero(axes, values)
        steps_axis(axes, record.last_step)
        labels(axes, ends)

    note = "Nats per token; strong on held-out prompts, pale in training. A student below its teacher is too sure."
    yield Chart("entropy", "Entropy", draw, note, right=64)


# By position


def _by_position(record: RunRecord, name: str) -> Iterator[Chart]:
    curves = [(table.step, table.by_position) for table in record.tables if len(table.by_position.start) > 1]
    if not curves:
        return

    def draw(axes: Any) -> None:
        ends, values = [], []
        for place, (step, positions) in enumerate(curves):
            last = place == len(curves) - 1
            color = STUDENT if last else FAINT
            y = list(getattr(positions, name))
            ends_at = positions.start[-1] + max(1, positions.start[-1] - positions.start[-2])
            axes.stairs(y, [*positions.start, ends_at], color=color, linewidth=1.8 if last else 1.4, baseline=None)
            ends.append((ends_at, y[-1], "after" if last and len(curves) > 1 else _when(step), color))
            values += y
        from_zero(axes, values)
        steps_axis(axes, ends[-1][0], "token")
        labels(axes, ends)

    note = "Mean by place in the teacher's held-out completions, nats per token."
    yield Chart(f"{name}_by_position", f"{BY_NAME[name].title} by position", draw, note, right=58)


def _when(step: int) -> str:
    return "before" if step == 0 else f"step {step}"


def _by_quartile(record: RunRecord, name: str) -> Iterator[Chart]:
    rows = [row for row in (record.before, record.after) if row is not None]
    found = [_quartiles(compared_on(row, "teacher"), name) for row in rows]
    if len(found) < 2 or not all(found):
        return

    def draw(axes: Any) -> None:
        values: list[float] = []
        for place, estimates in enumerate(found):
            color, shift = (STUDENT, 0.1) if place else (FAINT, -0.1)
            x = [quarter + shift for quarter in range(len(estimates))]
            y = [entry.value for entry in estimates]
            widths = [entry.half_width or 0.0 for entry in estimates]
            low = [max(0.0, value - width) for value, width in zip(y, widths, strict=True)]
            high = [value + width for value, width in zip(y, widths, strict=True)]
            axes.vlines(x, low, high, color=color, linewidth=1.4, alpha=0.6)
            axes.plot(x, y, color=color, marker="o", markersize=6, linewidth=0, clip_on=False)
            values += high
        from_zero(axes, values)
        axes.set_xlim(-0.5, 3.5)
        axes.set_xticks(range(4), ["first quarter", "second", "third", "last"])
        ends = [(3 + (0.1 if place else -0.1), estimates[-1].value) for place, estimates in enumerate(found)]
        names = (("before", FAINT), ("after", STUDENT))
        labels(axes, [(x, y, *name) for (x, y), name in zip(ends, names, strict=True)])

    note = "By quarter of the completion, with 95 % intervals, nats per token."
    yield Chart(f"{name}_by_quarter", f"{BY_NAME[name].title} by quarter", draw, note, right=48)


def _quartiles(comparison: Row | None, name: str) -> list[Estimate]:
    quartiles = (comparison or {}).get("quartiles") or ()
    found = [estimate(row, name) for row in quartiles if isinstance(row, dict)]
    known = [entry for entry in found if entry is not None]
    return known if len(known) == 4 else []


# Training


def _simple(record: RunRecord, name: str, title: str, note: str, left: int = 44) -> Iterator[Chart]:
    values = curve(record.steps, name)
    if values:
        yield one_line(record, name, title, note, values, left=left)


def _share(record: RunRecord, name: str, title: str, note: str) -> Iterator[Chart]:
    values = curve(record.steps, name, 100.0)
    if values and any(value < 100.0 for value in values.y):
        yield one_line(record, name, title, note, values)


def _limited(record: RunRecord, chart: Chart, values: Curve, limit: float | None, text: str) -> Chart:
    """The chart with a limit drawn in, where it is near enough to matter."""
    if limit is None or limit > 3 * max(values.high):
        return chart

    def draw(axes: Any) -> None:
        chart.draw(axes)
        axes.axhline(limit, color=MUTED, linewidth=1.0, linestyle=(0, (2, 3)))
        from_zero(axes, [*values.high, limit])
        labels(axes, [(record.last_step, limit, text, MUTED)])

    return Chart(chart.name, chart.title, draw, chart.note, chart.left, right=LABELLED - 20)


def _grad_norm(record: RunRecord) -> Iterator[Chart]:
    values = curve(record.steps, "grad_norm")
    if values:
        chart = one_line(record, "grad_norm", "Gradient norm", "Before clipping.", values)
        yield _limited(record, chart, values, number(record.run.config, "max_grad_norm"), "clipped to")


def _lengths(record: RunRecord) -> Iterator[Chart]:
    values = curve(record.steps, "completion_length")
    if values:
        note = "Mean length of the completions trained on, in tokens."
        chart = one_line(record, "completion_length", "Completion length", note, values)
        yield _limited(record, chart, values, number(record.run.config, "max_generation_tokens"), "limit")


def _support(record: RunRecord) -> Iterator[Chart]:
    names = (("teacher_support_mass", "teacher", TEACHER), ("student_support_mass", "student", STUDENT))
    curves = [(curve(record.steps, name, 100.0), text, color) for name, text, color in names]
    known = [entry for entry in curves if entry[0]]
    if not known:
        return

    def draw(axes: Any) -> None:
        for values, _, color in known:
            line(axes, values.x, values.y, color, linewidth=1.4)
        axes.set_ylim(min(min(values.low) for values, _, _ in known) - 0.5, 100.2)
        steps_axis(axes, record.last_step)
        labels(axes, [(values.x[-1], values.y[-1], text, color) for values, text, color in known])

    note = "Probability on the ids that were compared one by one, %; the rest is one bucket, the tail."
    yield Chart("support_mass", "Mass on the support", draw, note, right=64)


def _bias(record: RunRecord) -> Iterator[Chart]:
    values = curve(record.steps, "bias_gap")
    if not values:
        return

    def draw(axes: Any) -> None:
        axes.axhline(0.0, color=FAINT, linewidth=1.0)
        axes.plot(values.x, values.y, color=INK, marker="o", markersize=2.4, linewidth=0.8)
        steps_axis(axes, record.last_step)

    note = "Exact less approximate divergence on the tokens where both were computed, nats per token."
    yield Chart("bias_gap", "Bias of the approximation", draw, note, left=52)
