"""The science, as building blocks for trainer plugins: sample, score, divergence, backward, step.

Names are loaded when they are first used, so that the daemon can check data and plan a run without MLX.
"""

from __future__ import annotations

from opd_daemon import blas

blas.preload_with_mlx()

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd_daemon.distill.batches import MicroBatch, Rows, micro_batches
    from opd_daemon.distill.data import Prompt, PromptSet
    from opd_daemon.distill.divergences import Divergence
    from opd_daemon.distill.gradients import BatchGradient, backward
    from opd_daemon.distill.loop import TrainingLoop
    from opd_daemon.distill.objective import Objective
    from opd_daemon.distill.outcomes import student_outcomes
    from opd_daemon.distill.rollouts import (
        Rollout,
        load_rollouts,
        read_rollouts,
        reference_completions,
        sample_completions,
        save_rollouts,
        teacher_completions,
    )
    from opd_daemon.distill.scoring import TeacherTargets, score
    from opd_daemon.distill.signals import ExactSignal, SampledSignal, SparseSignal
    from opd_daemon.distill.step import Step, step_seed
    from opd_daemon.distill.student import Student

PUBLIC = {
    "BatchGradient": "gradients",
    "Divergence": "divergences",
    "ExactSignal": "signals",
    "MicroBatch": "batches",
    "Objective": "objective",
    "Prompt": "data",
    "PromptSet": "data",
    "Rollout": "rollouts",
    "Rows": "batches",
    "SampledSignal": "signals",
    "SparseSignal": "signals",
    "Step": "step",
    "Student": "student",
    "TeacherTargets": "scoring",
    "TrainingLoop": "loop",
    "backward": "gradients",
    "load_rollouts": "rollouts",
    "micro_batches": "batches",
    "read_rollouts": "rollouts",
    "reference_completions": "rollouts",
    "sample_completions": "rollouts",
    "save_rollouts": "rollouts",
    "score": "scoring",
    "step_seed": "step",
    "student_outcomes": "outcomes",
    "teacher_completions": "rollouts",
}

__all__ = [
    "BatchGradient",
    "Divergence",
    "ExactSignal",
    "MicroBatch",
    "Objective",
    "Prompt",
    "PromptSet",
    "Rollout",
    "Rows",
    "SampledSignal",
    "SparseSignal",
    "Step",
    "Student",
    "TeacherTargets",
    "TrainingLoop",
    "backward",
    "load_rollouts",
    "micro_batches",
    "read_rollouts",
    "reference_completions",
    "sample_completions",
    "save_rollouts",
    "score",
    "step_seed",
    "student_outcomes",
    "teacher_completions",
]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)
