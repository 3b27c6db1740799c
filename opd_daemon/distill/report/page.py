"""The report as one HTML file without scripts or anything from outside, and its charts as PNG files beside it."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from opd_daemon.distill.files import write_file, write_folder
from opd_daemon.distill.report import charts, resources, summary
from opd_daemon.distill.report.answers import all_answers
from opd_daemon.distill.report.drawing import Chart, to_png, to_svg
from opd_daemon.distill.report.heatmap import heatmap
from opd_daemon.distill.report.record import RunRecord
from opd_daemon.errors import OpdError, Reason
from opd_daemon.failpoints import hit

if TYPE_CHECKING:
    from pathlib import Path

    from opd_daemon.home import RunFolders
    from opd_daemon.types import Run

Sections = list[tuple[str, list[Chart]]]

SECTIONS = (
    ("Learning", charts.learning_charts),
    ("Where in the answer", charts.position_charts),
    ("Training", charts.training_charts),
    ("Time and memory", resources.resource_charts),
)


def write_report(run: Run, folders: RunFolders) -> Path:
    """Write `reports/{run_id}.html` and the pictures in `reports/{run_id}/` from the run's own files.

    Raises:
        OpdError: REPORT_NOT_FOUND when the run ended before it measured anything; DISK_FULL, or INVALID_REQUEST where
            the folder can't be written to.
    """
    record = RunRecord.read(run, folders)
    if record.empty:
        message = f"run {run.run_id!r} ended before it measured anything; there is nothing to report"
        raise OpdError(Reason.REPORT_NOT_FOUND, message, run_id=run.run_id)
    charts = sections(record)
    write_file(folders.report, render(record, charts).encode())
    hit("report.page")

    def fill(folder: Path) -> None:
        for _, entries in charts:
            for chart in entries:
                (folder / f"{chart.name}.png").write_bytes(to_png(chart))

    write_folder(folders.pictures, fill)
    return folders.report


def sections(record: RunRecord) -> Sections:
    """The charts of a run by section."""
    return [(title, list(drawn(record))) for title, drawn in SECTIONS]


def render(record: RunRecord, drawn: Sections) -> str:
    """The page. Everything the run's models and data wrote is escaped."""
    environment = Environment(
        loader=PackageLoader("opd_daemon.distill.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = files("opd_daemon.distill.report").joinpath("page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        # Our own style and our own drawings; nothing else is let through as it is.
        style=Markup(style),  # noqa: S704
        sections=[(title, [(chart, Markup(to_svg(chart))) for chart in entries]) for title, entries in drawn],  # noqa: S704
        run=record.run,
        record=record,
        summary=summary,
        answers=all_answers(record),
        heatmap=heatmap(record),
        environment=summary.environment(),
    )
