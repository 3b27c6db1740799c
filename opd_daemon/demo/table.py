"""The demo's result on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from opd_daemon.demo.result import DemoResult
from opd_daemon.distill.report.answers import Answers

SIDE_BY_SIDE_WIDTH = 90
ROWS = (
    ("forward KL  KL(teacher ‖ student)", "forward_kl", -1),
    ("reverse KL  KL(student ‖ teacher)", "reverse_kl", -1),
    ("agreement", "agreement", 1),
    ("top-5 agreement", "top5_agreement", 1),
    ("entropy of the teacher", "teacher_entropy", 0),
    ("entropy of the student", "student_entropy", 0),
)
OWN_ROWS = (
    ("reverse KL on the student's own samples", "reverse_kl", -1),
    ("acceptance of the student's own samples", "acceptance", 1),
)


def show_result(result: DemoResult, console: Console) -> None:
    """Everything, from the numbers to the command that uses the adapter."""
    for part in (metric_table(result), *answer_tables(result.answers, console.width), time_line(result)):
        console.print()
        console.print(part)
    console.print()
    for line in closing_lines(result):
        console.print(Text(line), soft_wrap=True)


def metric_table(result: DemoResult) -> Table:
    """Held-out metrics: before, after, change."""
    exact = "full vocabulary" if result.after["exact"] else "teacher's top ids and their tail"
    title = f"{result.after['samples']} held-out prompts, {result.after['tokens']} tokens, {exact}"
    table = Table(title=title, box=box.ROUNDED, title_style="bold", title_justify="left")
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    rows = [(*row, result.before, result.after) for row in ROWS]
    if result.before.get("on_student") and result.after.get("on_student"):
        rows += [(*row, result.before["on_student"], result.after["on_student"]) for row in OWN_ROWS]
    for label, name, better, first, last in rows:
        before, after = first[name], last[name]
        share = name.endswith("agreement") or name == "acceptance"
        shown = [f"{100 * value:.1f} %" if share else f"{value:.3f} nats" for value in (before, after)]
        table.add_row(label, *shown, _change(before, after, better, share=share))
    return table


def _change(before: float, after: float, better: int, *, share: bool) -> Text:
    difference = after - before
    if not round(difference, 3):
        return Text("none", style="dim")
    arrow = "↑" if difference > 0 else "↓"
    words = f"{arrow} {100 * abs(difference):.1f} points" if share else f"{arrow} {abs(difference):.3f}"
    if not share and better and before > 0:
        words = f"{arrow} {100 * abs(difference) / before:.0f} %"
    improved = better and (difference > 0) == (better > 0)
    return Text(words, style="green" if improved else "red" if better else "dim")


def answer_tables(answers: list[Answers], width: int) -> Iterator[RenderableType]:
    """One table per prompt: side by side where there is room, below each other where there isn't."""
    for entry in answers:
        given = (("student before", entry.before), ("student after", entry.after), ("teacher", entry.teacher))
        title = Text(f"“{entry.prompt}”", style="bold")
        if width >= SIDE_BY_SIDE_WIDTH:
            table = Table(title=title, box=box.ROUNDED, title_justify="left", expand=True)
            for name, _ in given:
                table.add_column(name, ratio=1)
            table.add_row(*(Text(answer.strip()) for _, answer in given))
        else:
            table = Table(title=title, box=box.SIMPLE, title_justify="left", show_header=False)
            table.add_column(style="dim", no_wrap=True)
            table.add_column()
            for name, answer in given:
                table.add_row(name, Text(answer.strip()))
        yield table


def time_line(result: DemoResult) -> Text:
    """Seconds by phase."""
    line = Text("seconds: ", style="bold")
    phases = [f"{name} {value:.1f}" for name, value in result.seconds.phases.items()]
    return line.append(" · ".join(phases), style="not bold")


def closing_lines(result: DemoResult) -> Iterator[str]:
    """Cache, curve, adapter, command."""
    cache = result.cache
    lookups = cache.hits + cache.misses
    warm = "" if cache.hits else "; 'opd demo' again finds them all"
    yield (
        f"teacher cache: {cache.hits} hits of {lookups} lookups, {cache.milliseconds_saved / 1000:.1f} s saved{warm}"
    )
    if result.curve_path:
        yield f"learning curve: {result.curve_path}"
    if result.run.report_path:
        yield f"report: {result.run.report_path}"
    yield f"adapter: {result.adapter_path}"
    yield f"use it with plain mlx-lm: {result.command}"
