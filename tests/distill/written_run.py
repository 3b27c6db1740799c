"""Files of a run as its worker writes them, with numbers made up: for reports, which read nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opd_daemon.config import RunConfig
from opd_daemon.distill.token_table import CompletionTable, PositionCurve, TokenTable, write_token_tables
from opd_daemon.home import Home, RunFolders
from opd_daemon.types import Comparison, EvaluationMetrics, Plan, PlannedBytes, Run, RunState, StepMetrics

PLAN = Plan(
    seconds=40.0,
    daemon_peak_bytes=900_000_000,
    worker_peak_bytes=2_000_000_000,
    disk_bytes=5_000_000,
    available_bytes=16_000_000_000,
    assumptions=("every completion of full length",),
    phases=(("load", 2.0), ("rollout", 20.0), ("score", 10.0), ("train", 8.0)),
    memory=(
        PlannedBytes("daemon", "process", 100_000_000),
        PlannedBytes("worker", "process", 200_000_000),
        PlannedBytes("worker", "tokenizer", 100_000_000),
        PlannedBytes("worker", "student", 300_000_000),
        PlannedBytes("worker", "buffers kept", 100_000_000),
    ),
    disk=(PlannedBytes("", "teacher cache", 1_000_000), PlannedBytes("", "checkpoints", 4_000_000)),
    machine="a machine",
)


def run_of(steps: int, *, run_id: str = "fixture", state: RunState = RunState.SUCCEEDED, **config: Any) -> Run:
    """A run that is at rest."""
    settings = RunConfig(
        run_id=run_id, base_model_path="/models/student", teacher_model_path="/models/teacher", prompts_path="/p.jsonl"
    ).model_copy(update={"num_steps": steps, **config})
    now = datetime.now(UTC)
    return Run(run_id, state, settings.model_dump(mode="json"), now, total_steps=steps, plan=PLAN, finished_at=now)


def step_metrics(step: int, total: int, **changes: Any) -> dict[str, Any]:
    """A row of `_train.jsonl`."""
    left = math.exp(-3 * step / total)
    values = dict.fromkeys(StepMetrics.__dataclass_fields__, 0) | {
        "step": step,
        "total_steps": total,
        "loss": 1 + left,
        "reverse_kl": 1 + left,
        "forward_kl": 1.2 + left,
        "agreement": 0.6 - 0.3 * left,
        "top5_agreement": 0.8 - 0.3 * left,
        "teacher_entropy": 1.1,
        "student_entropy": 1.3 + left,
        "learning_rate": 1e-5,
        "grad_norm": 2 * left,
        "tokens": 100,
        "samples": 4,
        "tokens_per_second": 50.0,
        "rollout_milliseconds": 1000.0,
        "teacher_milliseconds": 500.0,
        "student_milliseconds": 400.0,
        "step_milliseconds": 2000.0,
        "completion_length": 25.0,
        "cache_hits": 1,
        "cache_misses": 3,
        "peak_memory_bytes": 1_500_000_000,
        "seconds_elapsed": 2.0 * step,
        "bias_gap": None,
        "teacher_support_mass": None,
        "student_support_mass": None,
    }
    return values | changes


def comparison(reverse_kl: float, *, width: float = 0.1, quartiles: bool = True) -> Comparison:
    """A comparison with intervals."""
    means = {
        "forward_kl": reverse_kl + 0.2,
        "reverse_kl": reverse_kl,
        "js_divergence": 0.2 * reverse_kl,
        "agreement": 0.9 - 0.2 * reverse_kl,
        "top5_agreement": 0.95 - 0.1 * reverse_kl,
        "teacher_entropy": 1.1,
        "student_entropy": 1.0 + reverse_kl,
        "acceptance": 0.8 - 0.2 * reverse_kl,
    }
    quarters = (
        tuple(comparison(reverse_kl * share, quartiles=False) for share in (1.2, 1.1, 0.9, 0.8)) if quartiles else ()
    )
    widths = {name: width * abs(value) for name, value in means.items()}
    return Comparison(**means, tokens=200, samples=8, half_widths=widths, quartiles=quarters)


def evaluation(step: int, reverse_kl: float, **changes: Any) -> dict[str, Any]:
    """A row of `_eval.jsonl`."""
    found = comparison(reverse_kl)
    top = {name: getattr(found, name) for name in EvaluationMetrics.__dataclass_fields__ if hasattr(found, name)}
    metrics = EvaluationMetrics(
        step=step,
        **{name: value for name, value in top.items() if name not in {"half_widths", "quartiles"}},
        exact=True,
        seconds=3.0,
        is_best=step > 0,
        on_teacher=found,
        on_student=comparison(reverse_kl + 0.1),
        validation_kl=reverse_kl,
    )
    return asdict(metrics) | changes


def token_table(step: int, kl: float, prompt: str, tokens: tuple[str, ...]) -> TokenTable:
    """A table of one completion."""
    count = len(tokens)
    values, top = (kl,) * count, ("other",) * count
    table = CompletionTable(prompt, tokens, values, values, (-0.1,) * count, (-1.0,) * count, tokens, top)
    return TokenTable(step, (table,), PositionCurve((0, 2, 4), (kl, kl, kl), (kl, 0.9 * kl, 0.8 * kl), (8, 8, 6)))


def write_run(
    home: Home,
    run: Run,
    *,
    prompt: str = "Why is the sky blue?",
    answer: str = "Because of the air.",
    tokens: tuple[str, ...] = ("Because", " of", " the", " air", "."),
    steps: list[dict[str, Any]] | None = None,
    evaluations: list[dict[str, Any]] | None = None,
) -> RunFolders:
    """Write everything a complete run leaves behind."""
    folders, count = home.run(run.run_id), run.total_steps
    write_rows(folders.train_metrics, steps or [step_metrics(step, count) for step in range(1, count + 1)])
    write_rows(folders.eval_metrics, evaluations or [evaluation(0, 2.0), evaluation(count, 1.0)])
    given = ((0, "student", "the the the"), (0, "teacher", answer), (count, "student", answer))
    samples = [{"step": step, "source": who, "prompt": prompt, "completion": text} for step, who, text in given]
    write_rows(folders.samples, samples)
    write_token_tables(
        folders.token_tables, [token_table(0, 2.0, prompt, tokens), token_table(count, 0.5, prompt, tokens)]
    )
    return folders


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
