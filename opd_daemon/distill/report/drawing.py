"""Charts, each drawn once: as SVG that takes its colours from the page around it, and as PNG.

Nothing of pyplot is used, so nothing is left behind in the process but matplotlib's modules.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

# Of the Okabe-Ito colours, which the colour-blind can tell apart. A name is the page's CSS variable; teacher and
# student have the same colour everywhere. No two values may be equal: in the SVG each stands for its name.
COLORS = {
    "ink": "#1b1f24",
    "muted": "#5f6873",
    "faint": "#9aa3ad",
    "grid": "#e4e7eb",
    "student": "#0072b2",
    "teacher": "#d55e00",
    "train": "#009e73",
    "heat": "#8e3b9e",
}
INK, MUTED, FAINT, GRID, STUDENT, TEACHER, TRAIN, HEAT = COLORS.values()

WIDTH, HEIGHT = 360, 200
"""Of a chart in CSS pixels, at which its text has its natural size."""

PNG_SCALE = 2
POINTS_PER_INCH = 72
TITLE_HEIGHT, TITLE_INSET = 24, 8
TEXT_SIZE = 11
LABEL_GAP = 13.0
LARGEST_BAND = 0.16

# matplotlib keeps its settings in one place per process.
_SETTINGS = threading.Lock()


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture to be drawn. `name` is its file's; `title` and `note` stand beside it; margins are in pixels."""

    name: str
    title: str
    draw: Callable[[Any], None]
    note: str = ""
    left: int = 44
    right: int = 18
    top: int = 12
    bottom: int = 26
    width: int = WIDTH
    height: int = HEIGHT


def to_svg(chart: Chart) -> str:
    """The chart as an SVG element for an HTML page that defines COLORS as CSS variables."""
    with _settings(chart.name):
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        written = io.StringIO()
        FigureCanvasSVG(_figure([chart])).print_svg(written, metadata={"Date": None, "Creator": None})
    return _for_page(written.getvalue(), chart)


def to_standalone_svg(chart: Chart) -> str:
    """The chart as an SVG file, in the colours of a light page."""
    style = "".join(f"--{name}:{value};" for name, value in COLORS.items())
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" style="{style}background:#fff;font-family:sans-serif"'
    return to_svg(chart).replace("<svg", opening, 1)


def to_png(*charts: Chart, title: str = "") -> bytes:
    """Charts side by side as a PNG, each with its title, in the colours of a light page."""
    with _settings(charts[0].name):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = _figure(charts, head=TITLE_HEIGHT * (2 if title else 1))
        figure.set_dpi(POINTS_PER_INCH * PNG_SCALE)
        _titles(figure, charts, title)
        written = io.BytesIO()
        FigureCanvasAgg(figure).print_png(written)
    return written.getvalue()


@contextmanager
def _settings(name: str) -> Iterator[None]:
    import matplotlib as mpl

    settings = {
        "font.size": TEXT_SIZE,
        "text.color": INK,
        "axes.unicode_minus": True,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
    }
    with _SETTINGS, mpl.rc_context(settings):
        yield


def _figure(charts: Sequence[Chart], head: int = 0) -> Any:
    """The charts side by side below `head` pixels for titles."""
    from matplotlib.figure import Figure

    width, height = sum(chart.width for chart in charts), max(chart.height for chart in charts)
    whole = height + head
    figure = Figure(figsize=(width / POINTS_PER_INCH, whole / POINTS_PER_INCH), dpi=POINTS_PER_INCH, facecolor="white")
    x = 0
    for chart in charts:
        inside = (
            (x + chart.left) / width,
            (height - chart.height + chart.bottom) / whole,
            (chart.width - chart.left - chart.right) / width,
            (chart.height - chart.top - chart.bottom) / whole,
        )
        axes = figure.add_axes(inside)
        _plain(axes)
        chart.draw(axes)
        x += chart.width
    return figure


def _titles(figure: Any, charts: Sequence[Chart], title: str) -> None:
    width, height = figure.get_size_inches() * POINTS_PER_INCH
    style = {"va": "top", "weight": "bold", "parse_math": False}
    if title:
        figure.text(TITLE_INSET / width, 1 - TITLE_INSET / height, title, size=13, **style)
    x, top = TITLE_INSET, TITLE_INSET + (TITLE_HEIGHT if title else 0)
    for chart in charts:
        figure.text(x / width, 1 - top / height, chart.title, size=12, **style)
        x += chart.width


def _plain(axes: Any) -> None:
    """Horizontal lines to read values from, a base line, and nothing else."""
    axes.patch.set_visible(False)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.spines["bottom"].set_linewidth(0.8)
    axes.tick_params(left=False, bottom=False, labelcolor=MUTED, pad=4)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=4)


def _for_page(svg: str, chart: Chart) -> str:
    """Colours by name, text in the page's font, and nothing that is not needed: the size falls to a third."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|<defs>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)  # the paper
    svg = re.sub(r" font-family: [^;]*;| transform=\"rotate\(-0 [^)]*\)\"", "", svg)
    used = set(re.findall(r"#([\w-]+)[\"')]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    for name, value in COLORS.items():
        svg = svg.replace(value, f"var(--{name})")
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = svg[svg.index(">") + 1 :]
    opening = f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{escape(chart.title)}"'
    return f'{opening} xmlns:xlink="http://www.w3.org/1999/xlink">{svg.strip()}'


# What charts are made of


def line(axes: Any, x: Sequence[float], y: Sequence[float], color: str, **style: Any) -> None:
    """A line; a single point gets a dot, as it would not be seen otherwise."""
    if len(x) == 1:
        style = {**style, "marker": "o", "markersize": 4}
    axes.plot(x, y, color=color, clip_on=False, solid_capstyle="round", **{"linewidth": 1.8, **style})


def band(axes: Any, x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str) -> None:
    """What lies between two lines: an interval, or the spread of thinned values."""
    axes.fill_between(x, low, high, color=color, alpha=LARGEST_BAND, linewidth=0)


def labels(axes: Any, entries: Sequence[tuple[float, float, str, str]]) -> None:
    """Names of lines at their ends, (x, y, text, colour), moved apart where they would overlap."""
    figure = axes.get_figure()
    placed = sorted(entries, key=lambda entry: entry[1])
    heights = [axes.transData.transform((0.0, y))[1] for _, y, _, _ in placed]
    low, high = axes.transAxes.transform((0.0, 0.0))[1], axes.transAxes.transform((0.0, 1.0))[1]
    gap = LABEL_GAP * figure.dpi / POINTS_PER_INCH
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + gap)
    over = heights[-1] - high if heights else 0.0
    if over > 0:
        heights = [max(height - over, low + place * gap) for place, height in enumerate(heights)]
    for (x, y, text, color), height in zip(placed, heights, strict=True):
        shift = (height - axes.transData.transform((0.0, y))[1]) * POINTS_PER_INCH / figure.dpi
        axes.annotate(
            text,
            (x, y),
            xytext=(6, shift),
            textcoords="offset points",
            color=color,
            va="center",
            annotation_clip=False,
            parse_math=False,
        )


def steps_axis(axes: Any, last: float, name: str = "step") -> None:
    """Whole steps from 0 to the last one, with the axis named before them."""
    axes.set_xlim(0, max(last, 1))
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    # Before the first number, in their line: it costs no room.
    axes.annotate(
        name,
        (0, 0),
        xytext=(-9, -7.5),
        textcoords="offset points",
        xycoords="axes fraction",
        ha="right",
        va="top",
        color=MUTED,
    )


def from_zero(axes: Any, values: Sequence[float]) -> None:
    """A scale that begins at zero and leaves room above the largest value."""
    high = max([value for value in values if value == value], default=0.0)  # noqa: PLR0124 - NaN differs from itself
    axes.set_ylim(0, 1.08 * high if high > 0 else 1.0)
