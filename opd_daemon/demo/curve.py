"""The learning curve as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd_daemon.demo.result import DemoResult

STUDENT, FORWARD, GRID = "#2563eb", "#d97706", "#e5e7eb"


def draw_curve(result: DemoResult, file: Path) -> Path:
    """KL and agreement over steps, in training and on the held-out prompts, as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), dpi=150, constrained_layout=True)
        _kl(left, result)
        _agreement(right, result)
        before, after = result.before, result.after
        figure.suptitle(
            f"SmolLM2-135M: a 3-bit student learns from the full model ({result.trainer}, {len(result.steps)} steps) — "
            f"reverse KL {before['reverse_kl']:.2f} → {after['reverse_kl']:.2f}",
            fontsize=11,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
        plt.close(figure)
    return file


def _kl(axes: Any, result: DemoResult) -> None:
    _training(axes, result.steps, "reverse_kl", 1.0)
    _held_out(axes, result.evaluations, "reverse_kl", factor=1.0, color=STUDENT)
    _held_out(axes, result.evaluations, "forward_kl", factor=1.0, color=FORWARD)
    _finish(axes, "nats per token")


def _agreement(axes: Any, result: DemoResult) -> None:
    _training(axes, result.steps, "agreement", 100.0)
    _held_out(axes, result.evaluations, "agreement", factor=100.0, color=STUDENT)
    _held_out(axes, result.evaluations, "top5_agreement", factor=100.0, color=FORWARD)
    _finish(axes, "% of positions")
    axes.set_ylim(top=100)


def _training(axes: Any, steps: list[dict[str, Any]], name: str, factor: float) -> None:
    values = [factor * step[name] for step in steps]
    label = f"{_words(name)}, training"
    axes.plot([step["step"] for step in steps], values, color=STUDENT, alpha=0.35, linewidth=1.5, label=label)


def _held_out(axes: Any, rows: list[dict[str, Any]], name: str, *, factor: float, color: str) -> None:
    label = f"{_words(name)}, held-out"
    steps, values = [row["step"] for row in rows], [factor * row[name] for row in rows]
    axes.plot(steps, values, color=color, marker="o", linewidth=2, label=label)
    rises = values[-1] > values[0]
    for place, below in ((0, rises), (-1, not rises)):
        axes.annotate(
            f"{values[place]:.1f}" if factor > 1 else f"{values[place]:.2f}",
            (steps[place], values[place]),
            textcoords="offset points",
            xytext=(4, -15 if below else 7),
            fontsize=9,
            color=color,
        )


def _finish(axes: Any, unit: str) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.06)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)


def _words(name: str) -> str:
    return {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "top5_agreement": "top-5 agreement"}.get(name, name)
