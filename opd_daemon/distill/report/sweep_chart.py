"""Runs of a sweep side by side: every measure of every run with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_daemon.distill.report.drawing import FAINT, GRID, INK, MUTED, STUDENT, Chart
from opd_daemon.distill.report.measures import BY_NAME, Estimate

ROW_PIXELS = 24
PANEL_PIXELS = 190
LETTER_PIXELS = 6.4
LONGEST_LABEL = 44
GAP_PIXELS = 24


@dataclass(frozen=True, slots=True)
class SweepRow:
    """A run: what sets it apart and what came of it. note: why it has no numbers. best: where no other run beats it."""

    label: str
    estimates: Mapping[str, Estimate]
    note: str = ""
    best: frozenset[str] = frozenset()


def sweep_chart(title: str, rows: Sequence[SweepRow], measures: Sequence[str]) -> Chart:
    """One line a run, one column a measure. What nothing else beats is in full colour."""
    shown = [row.label if len(row.label) <= LONGEST_LABEL else f"{row.label[: LONGEST_LABEL - 1]}…" for row in rows]
    left = int(30 + LETTER_PIXELS * max(map(len, shown)))

    def draw(axes: Any) -> None:
        figure = axes.get_figure()
        frame = axes.get_position()
        axes.set_axis_off()
        for place, label in enumerate(shown):
            axes.text(
                -0.01, _height(place, rows), label, transform=axes.transAxes, ha="right", va="center", parse_math=False
            )
            if rows[place].note:
                text = rows[place].note
                axes.text(
                    0.0,
                    _height(place, rows),
                    text,
                    transform=axes.transAxes,
                    va="center",
                    color=MUTED,
                    parse_math=False,
                )
        width = frame.width / max(1, len(measures))
        for column, name in enumerate(measures):
            panel = figure.add_axes(
                (frame.x0 + column * width, frame.y0, width - GAP_PIXELS / chart.width, frame.height)
            )
            _panel(panel, rows, name)

    height = ROW_PIXELS * len(rows) + 58
    chart = Chart(
        "sweep",
        title,
        draw,
        left=left,
        right=10,
        top=30,
        bottom=28,
        width=left + 10 + PANEL_PIXELS * len(measures),
        height=height,
    )
    return chart


def _height(place: int, rows: Sequence[SweepRow]) -> float:
    return 1.0 - (place + 0.5) / len(rows)


def _panel(axes: Any, rows: Sequence[SweepRow], name: str) -> None:
    measure = BY_NAME[name]
    for place, row in enumerate(rows):
        found = row.estimates.get(name)
        if found is None:
            continue
        value, width = measure.factor * found.value, measure.factor * (found.half_width or 0.0)
        color = STUDENT if name in row.best else FAINT
        axes.plot([value - width, value + width], [place, place], color=color, linewidth=1.6, solid_capstyle="butt")
        axes.plot([value], [place], color=color, marker="o", markersize=6)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.patch.set_visible(False)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(bottom=False, labelcolor=MUTED)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(visible=True, axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    unit = ", %" if measure.share else ""
    axes.set_title(f"{measure.title}{unit}", loc="left", size=11, color=INK, weight="bold")
