"""Accuracy of the student on tasks of lm-evaluation-harness, through mlx-lm's own evaluation of models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opd_daemon.errors import OpdError, Reason

if TYPE_CHECKING:
    from opd_daemon.distill.student import Student

SEQUENCES_AT_ONCE = 8

# The score of a task, the first of these it reports: normalised accuracy is the usual figure where there is one.
SCORES = ("acc_norm", "acc", "exact_match", "pass@1", "f1", "bleu")


def task_names(eval_tasks: str) -> list[str]:
    """The tasks named in the configuration, separated by commas."""
    return [name for part in eval_tasks.split(",") if (name := part.strip())]


def task_accuracies(student: Student, names: Sequence[str], *, seed: int, manager: Any = None) -> dict[str, float]:
    """Score of each task, between 0 and 1 for an accuracy. manager: an lm_eval TaskManager that knows further tasks.

    Raises:
        OpdError: INVALID_RUN_CONFIG when a task is unknown, its data can't be had, or it reports no score.
    """
    if not names:
        return {}
    try:
        from lm_eval import simple_evaluate
        from mlx_lm.evaluate import MLXLM
    except ImportError as fault:
        message = f"eval_tasks {', '.join(names)}: tasks need the package lm-eval; run: pip install lm-eval"
        raise OpdError(Reason.INVALID_RUN_CONFIG, message) from fault

    model = MLXLM.__new__(MLXLM)  # its own __init__ would load the student a second time, without the adapter
    super(MLXLM, model).__init__()
    templated = student.tokenizer.chat_template is not None
    vars(model).update(_model=student.model, tokenizer=student.tokenizer, use_chat_template=templated)
    vars(model).update(_max_tokens=None, _batch_size=SEQUENCES_AT_ONCE, _sampler=None)
    try:
        results = simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=manager,
            apply_chat_template=templated,
            bootstrap_iters=0,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as fault:
        text = " ".join(str(fault).split())[:300]
        message = (
            f"eval_tasks {', '.join(names)}: can't be evaluated: {text}; name known tasks, with their data at hand"
        )
        raise OpdError(Reason.INVALID_RUN_CONFIG, message) from fault
    found = results["results"]
    # A task given as a YAML file reports under the name that is in the file.
    return {name: _score(name, found[name]) for name in ([name for name in names if name in found] or found)}


def _score(name: str, result: Mapping[str, Any]) -> float:
    """The task's score; lm_eval names its numbers `metric,filter`."""
    numbers = dict(_numbers(result))
    for score in SCORES:
        if score in numbers:
            return numbers[score]
    if numbers:
        return next(iter(numbers.values()))
    raise OpdError(Reason.INVALID_RUN_CONFIG, f"eval_tasks {name}: reports no score; name another task")


def _numbers(result: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in result.items():
        metric = name.partition(",")[0]
        if isinstance(value, int | float) and "," in name and not metric.endswith("_stderr"):
            yield metric, float(value)
