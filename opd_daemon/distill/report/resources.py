"""Charts of what a run took: time, memory, speed and cache by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from opd_daemon.distill.report.curves import curve, one_line
from opd_daemon.distill.report.drawing import (
    FAINT,
    GRID,
    INK,
    MUTED,
    STUDENT,
    TEACHER,
    TRAIN,
    Chart,
    from_zero,
    labels,
    line,
    steps_axis,
)
from opd_daemon.distill.report.record import Row, RunRecord, number

MOST_BARS = 32
# Share of a step.
WORTH_A_LABEL = 0.02
GIGABYTE = 1e9

PHASES = (
    ("rollout_milliseconds", "rollout", STUDENT),
    ("teacher_milliseconds", "score", TEACHER),
    ("student_milliseconds", "train", TRAIN),
)


def resource_charts(record: RunRecord) -> Iterator[Chart]:
    """Time, memory, speed and cache by step."""
    yield from _times(record)
    yield from _memory(record)
    speed = curve(record.steps, "tokens_per_second")
    if speed:
        yield one_line(record, "speed", "Speed", "Tokens trained on per second, all phases counted.", speed)
    yield from _cache(record)


def other_milliseconds(step: Row) -> float:
    """What of a step belongs to none of its phases."""
    parts = sum(number(step, name) or 0.0 for name, _, _ in PHASES)
    return max(0.0, (number(step, "step_milliseconds") or 0.0) - parts)


def _times(record: RunRecord) -> Iterator[Chart]:
    rows = [{**step, "other": other_milliseconds(step)} for step in record.steps]
    parts = [(curve(rows, name, 1e-3), text, color) for name, text, color in (*PHASES, ("other", "other", FAINT))]
    known = [entry for entry in parts if entry[0]]
    if not known:
        return

    def draw(axes: Any) -> None:
        floor = np.zeros(len(known[0][0].x))
        heights = np.array([values.y for values, _, _ in known])
        # Where completions are made for two steps at once, the last one may have none to point at.
        tall = heights > WORTH_A_LABEL * heights.sum(axis=0)
        place = int(max(range(len(floor)), key=lambda step: (tall[:, step].sum(), step)))
        ends = []
        for (values, text, color), labelled in zip(known, tall[:, place], strict=True):
            x, y = np.asarray(values.x), np.asarray(values.y)
            if len(x) <= MOST_BARS:
                axes.bar(x, y, bottom=floor, color=color, width=0.8, linewidth=0)
            else:
                axes.fill_between(x, floor, floor + y, color=color, linewidth=0)
            if labelled:
                ends.append((float(x[-1]) + 0.4, float(floor[place] + y[place] / 2), text, color))
            floor = floor + y
        from_zero(axes, list(floor))
        steps_axis(axes, record.last_step)
        if len(known[0][0].x) <= MOST_BARS:
            axes.set_xlim(0.4, record.last_step + 0.6)
        labels(axes, ends)

    yield Chart("time_by_phase", "Time of a step", draw, "Seconds, by phase.", right=58)


def _memory(record: RunRecord) -> Iterator[Chart]:
    names = (
        ("rollout_peak_bytes", "rollout", STUDENT),
        ("teacher_peak_bytes", "score", TEACHER),
        ("student_peak_bytes", "train", TRAIN),
    )
    phases = [
        (curve([step for step in record.steps if number(step, name)], name, 1 / GIGABYTE), text, color)
        for name, text, color in names
    ]
    known = [entry for entry in phases if entry[0]]
    if not known:
        known = [(curve(record.steps, "peak_memory_bytes", 1 / GIGABYTE), "peak", INK)]
    if not known[0][0]:
        return
    planned = record.planned_array_bytes / GIGABYTE if record.planned_array_bytes else None

    def draw(axes: Any) -> None:
        ends = []
        for values, text, color in known:
            line(axes, values.x, values.y, color, linewidth=1.4)
            ends.append((values.x[-1], values.y[-1], text, color))
        highest = max(max(values.high) for values, _, _ in known)
        if planned is not None and planned < 4 * highest:
            axes.axhline(planned, color=MUTED, linewidth=1.0, linestyle=(0, (2, 3)))
            ends.append((record.last_step, planned, "planned", MUTED))
        from_zero(axes, [highest, *(y for _, y, _, _ in ends)])
        steps_axis(axes, record.last_step)
        labels(axes, ends)

    yield Chart("memory", "Memory of the worker", draw, "Peak of the step's arrays, GB.", right=64)


def _cache(record: RunRecord) -> Iterator[Chart]:
    rows = [
        {"step": step["step"], "share": hits / (hits + misses)}
        for step in record.steps
        if (hits := number(step, "cache_hits") or 0.0) + (misses := number(step, "cache_misses") or 0.0) > 0
    ]
    values = curve(rows, "share", 100.0)
    if not values:
        return

    def draw(axes: Any) -> None:
        axes.fill_between(values.x, 0, values.y, color=GRID, linewidth=0)
        line(axes, values.x, values.y, TEACHER, linewidth=1.4)
        axes.set_ylim(0, 105)
        steps_axis(axes, record.last_step)

    yield Chart("cache", "Found in the teacher cache", draw, "Share of a step's completions that needed no teacher, %.")
