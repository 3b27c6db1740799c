"""The learning curve as a picture, drawn as in the run's report."""

from __future__ import annotations

from pathlib import Path

from opd_daemon.demo.result import DemoResult
from opd_daemon.distill.report.charts import learning_charts
from opd_daemon.distill.report.drawing import to_png
from opd_daemon.distill.report.record import RunRecord

SHOWN = ("reverse_kl", "forward_kl", "agreement")


def draw_curve(result: DemoResult, file: Path) -> Path:
    """KL and agreement over steps, in training and on the held-out prompts, as a PNG."""
    record = RunRecord(result.run, tuple(result.steps), tuple(result.evaluations))
    charts = [chart for chart in learning_charts(record) if chart.name in SHOWN]
    before, after = result.before, result.after
    title = (
        f"SmolLM2-135M: a 3-bit student learns from the full model ({result.trainer}, {len(result.steps)} steps): "
        f"reverse KL {before['reverse_kl']:.2f} → {after['reverse_kl']:.2f}"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(to_png(*charts, title=title))
    return file
