"""The live view of a run, for terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from opd_daemon.cli.progress import RunProgress
from opd_daemon.cli.text import duration, one_line, percent, size
from opd_daemon.types import Event, Gauges, RunState

REFRESH_PER_SECOND = 4
NARROW, NARROWEST = 76, 50
ROOMY = 24
FEWEST_LOG_LINES, MOST_LOG_LINES = 2, 10
STATE_STYLES = {
    RunState.RUNNING: "bold green",
    RunState.SUCCEEDED: "bold green",
    RunState.FAILED: "bold red",
    RunState.INTERRUPTED: "bold yellow",
    RunState.STOPPED: "bold yellow",
    RunState.STOPPING: "yellow",
}


@dataclass(frozen=True, slots=True)
class Measure:
    """A row of the view: a metric, how it is written, and which direction is an improvement (0: neither)."""

    title: str
    name: str
    show: Callable[[float], str]
    better: int


def nats(value: float) -> str:
    """A divergence or entropy."""
    return f"{value:.3f}"


def measures(divergence: str) -> tuple[Measure, ...]:
    """The rows, the trained divergence first."""
    rows = (Measure("reverse KL", "reverse_kl", nats, -1), Measure("forward KL", "forward_kl", nats, -1))
    return (
        *(rows if divergence == "reverse_kl" else reversed(rows)),
        Measure("agreement", "agreement", percent, 1),
        Measure("top-5 agreement", "top5_agreement", percent, 1),
        Measure("student entropy", "student_entropy", nats, 0),
        Measure("teacher entropy", "teacher_entropy", nats, 0),
        Measure("loss", "loss", nats, -1),
    )


def own_measures() -> tuple[Measure, ...]:
    """Rows about the student's own samples of the held-out prompts, which training has no counterpart of."""
    return (Measure("own samples' KL", "own_kl", nats, -1), Measure("acceptance", "acceptance", percent, 1))


class LiveView:
    """Draws the run four times a second until it is closed."""

    def __init__(self, progress: RunProgress, console: Console) -> None:
        self.progress = progress
        self._live = Live(
            _Frame(progress), console=console, refresh_per_second=REFRESH_PER_SECOND, vertical_overflow="crop"
        )

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._live.refresh()
        self._live.__exit__(None, None, None)

    def update(self, item: Event | Gauges) -> None:
        """The next frame shows it; nothing to do."""

    def tick(self) -> None:
        """The view refreshes by itself."""

    def line(self, text: str) -> None:
        """Show one line in the log part."""
        self.progress.note(text)


class _Frame:
    """Renders the progress as it is at the moment of drawing."""

    def __init__(self, progress: RunProgress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield frame(self._progress, options.max_width, console.height)


def frame(progress: RunProgress, width: int, height: int) -> RenderableType:
    """One picture of the run: at most `height` − 1 lines, so that it never scrolls."""
    inner = width - 4
    machine = machine_lines(progress, inner)
    rows = measures(str(progress.run.config.get("divergence", "reverse_kl")))
    rows += own_measures() if height >= ROOMY else ()
    top = [bar(progress, inner), Text(), metric_table(progress, rows, inner), Text(), *machine]
    used = 2 + 2 + len(rows) + 2 + len(machine) + 1
    room = min(MOST_LOG_LINES, max(FEWEST_LOG_LINES, height - used - 2))
    log = [
        Text(f"{time} {one_line(text, 400)}", style="dim", no_wrap=True) for time, text in list(progress.lines)[-room:]
    ]
    for line in log:
        line.truncate(inner, overflow="ellipsis")
    return Panel(Group(*top, Text(), *log), title=_title(progress), title_align="left", box=box.ROUNDED)


def _title(progress: RunProgress) -> Text:
    title = Text(f" {progress.run.run_id} ", style="bold")
    title.append(str(progress.state), style=STATE_STYLES.get(progress.state, "bold cyan"))
    if progress.attempt:
        title.append(f", attempt {progress.attempt + 1}", style="dim")
    return title.append(" ")


def bar(progress: RunProgress, width: int) -> RenderableType:
    """Bar, steps, share and ETA in one line."""
    remaining = progress.seconds_remaining()
    eta = f"ETA {duration(remaining)}" if remaining is not None else ""
    if remaining == 0:
        eta = "ETA any moment"
    grid = Table.grid(padding=(0, 1))
    words = Text(f"{progress.step}/{progress.total_steps}  {100 * progress.fraction:.0f} %  {eta}", no_wrap=True)
    room = max(10, width - words.cell_len - 1)
    grid.add_row(ProgressBar(total=max(1, progress.total_steps), completed=progress.step, width=room), words)
    return grid


def metric_table(progress: RunProgress, rows: Iterable[Measure], width: int) -> Table:
    """Metrics of training and of the held-out prompts, each with its change since the start where there is room."""
    table = Table(box=None, pad_edge=False, padding=(0, 2 if width >= NARROW else 1, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    changes = width >= NARROWEST
    for title in ("training", "change", "held-out", "change") if changes else ("training", "held-out"):
        table.add_column(title, justify="right", no_wrap=True, min_width=8 if width >= NARROW else 6)
    divergence = str(progress.run.config.get("divergence", "reverse_kl"))
    now, start = (_held_out(entry, divergence) for entry in (progress.evaluation, progress.baseline))
    for measure in rows:
        training = _cells(measure, progress.metrics, progress.first)
        held_out = _cells(measure, now, start)
        table.add_row(measure.title, *training[: 2 if changes else 1], *held_out[: 2 if changes else 1])
    return table


def _held_out(evaluation: dict[str, Any], divergence: str) -> dict[str, Any]:
    """An evaluation with what is known of the student's own samples beside it."""
    own = evaluation.get("on_student")
    if not own:
        return evaluation
    name = "reverse_kl" if divergence == "reverse_kl" else "forward_kl"
    return {**evaluation, "own_kl": own[name], "acceptance": own["acceptance"]}


def _cells(measure: Measure, now: dict[str, Any], start: dict[str, Any]) -> tuple[Text, Text]:
    value = now.get(measure.name)
    if value is None:
        return Text("–" if measure.name != "loss" else "", style="dim"), Text()
    return Text(measure.show(value), style="bold"), change(measure, value, start.get(measure.name, value))


def change(measure: Measure, value: float, start: float) -> Text:
    """The difference with an arrow, green where it is an improvement."""
    difference = value - start
    shown = f"{100 * abs(difference):.1f}" if measure.show is percent else f"{abs(difference):.3f}"
    if not float(shown):
        return Text("")
    good = measure.better and (difference > 0) == (measure.better > 0)
    style = "dim" if not measure.better else "green" if good else "red"
    return Text(f"{'↑' if difference > 0 else '↓'} {shown}", style=style)


def machine_lines(progress: RunProgress, width: int) -> list[Text]:
    """Speed, where the time goes, cache and memory; on narrow terminals the split of the step has its own line."""
    metrics, gauges = progress.metrics, progress.gauges
    lookups = progress.cache_hits + progress.cache_misses
    memory = max(gauges.get("active_memory_bytes", 0), metrics.get("active_memory_bytes", 0))
    peak = max(gauges.get("peak_memory_bytes", 0), metrics.get("peak_memory_bytes", 0))
    speed = [f"{metrics['tokens_per_second']:.0f} tok/s"] if metrics else ["no step yet"]
    split = [_split(metrics)] if metrics else []
    if metrics:
        speed.append(f"step {metrics['step_milliseconds'] / 1000:.1f} s")
    cache = [f"cache {progress.cache_hits} hits, {progress.cache_misses} misses"] if lookups else []
    if memory:
        cache.append(f"memory {size(memory)} (peak {size(peak)})")
    lines = [speed + split, cache] if width >= NARROW else [speed, split, cache]
    return [_joined(parts) for parts in lines if parts]


def _split(metrics: dict[str, Any]) -> str:
    parts = (
        ("rollout", "rollout_milliseconds"),
        ("teacher", "teacher_milliseconds"),
        ("train", "student_milliseconds"),
    )
    whole = sum(metrics[name] for _, name in parts) or 1.0
    return ", ".join(f"{title} {100 * metrics[name] / whole:.0f} %" for title, name in parts)


def _joined(parts: Iterable[str]) -> Text:
    return Text(" · ".join(parts), no_wrap=True, overflow="ellipsis")
