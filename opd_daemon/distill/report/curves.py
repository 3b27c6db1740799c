"""A metric by step, thinned to what a chart can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_daemon.distill.report.drawing import INK, Chart, band, from_zero, line, steps_axis
from opd_daemon.distill.report.record import Row, RunRecord, series

MOST_POINTS = 160


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric by step. Where a point stands for several steps it is their mean, and low … high holds 80 % of them."""

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    thinned: bool = False

    def __bool__(self) -> bool:
        """Whether it says anything: a metric nobody computed is zero at every step."""
        return any(self.y)


def curve(rows: Sequence[Row], name: str, factor: float = 1.0) -> Curve:
    """A metric, thinned to what a chart can show."""
    x, values = series(rows, name)
    y = [factor * value for value in values]
    if len(x) <= MOST_POINTS:
        return Curve(x, y, y, y)
    parts = [part for part in np.array_split(np.arange(len(x)), MOST_POINTS) if len(part)]
    grouped = [np.asarray(y)[part] for part in parts]
    return Curve(
        [float(np.asarray(x)[part].mean()) for part in parts],
        [float(group.mean()) for group in grouped],
        [float(np.quantile(group, 0.1)) for group in grouped],
        [float(np.quantile(group, 0.9)) for group in grouped],
        thinned=True,
    )


def one_line(record: RunRecord, name: str, title: str, note: str, values: Curve, *, left: int = 44) -> Chart:
    """A chart of one metric by step."""

    def draw(axes: Any) -> None:
        if values.thinned:
            band(axes, values.x, values.low, values.high, INK)
        line(axes, values.x, values.y, INK, linewidth=1.4)
        if min(values.low) >= 0:
            from_zero(axes, values.high)
        if max(values.high) < 0.01:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        steps_axis(axes, record.last_step)

    return Chart(name, title, draw, note, left=left)
