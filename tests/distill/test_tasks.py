"""Task accuracy through mlx-lm's bridge to lm-evaluation-harness, of which only the ends are doubles here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from opd_daemon.config import LoraConfig
from opd_daemon.distill.student import Student
from opd_daemon.distill.tasks import task_accuracies, task_names
from opd_daemon.errors import OpdError, Reason

QUESTIONS = ["The tide comes in", "Water boils"]
CHOICES = [" twice a day", " forty-two"]


@pytest.fixture
def student(tiny_student: Path) -> Student:
    return Student.load(tiny_student, None, LoraConfig(rank=4), seed=0)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., dict[str, Any]]], None]]:
    """An lm_eval whose `simple_evaluate` is the test's; mlx-lm's code between it and the model is the real one."""
    sys.modules.pop("mlx_lm.evaluate", None)

    def install(evaluate: Callable[..., dict[str, Any]]) -> None:
        modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
        modules["lm_eval.api.registry"] = ModuleType("lm_eval.api.registry")
        vars(modules["lm_eval"]).update(simple_evaluate=evaluate)
        vars(modules["lm_eval.api.model"]).update(LM=type("LM", (), {}))
        vars(modules["lm_eval.api.registry"]).update(register_model=lambda _: lambda model: model)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    yield install
    sys.modules.pop("mlx_lm.evaluate", None)


def test_the_student_with_its_adapter_is_what_a_task_scores(student: Student, harness: Any) -> None:
    found: list[Any] = []

    def evaluate(**options: Any) -> dict[str, Any]:
        assert options["tasks"] == ["tides"]
        assert options["apply_chat_template"]
        pairs = [SimpleNamespace(args=(question, choice)) for question in QUESTIONS for choice in CHOICES]
        found.append(options["model"].loglikelihood(pairs))
        return {"results": {"tides": {"alias": "tides", "acc,none": 0.25, "acc_stderr,none": 0.1}}}

    harness(evaluate)
    assert task_accuracies(student, ["tides"], seed=3) == {"tides": 0.25}
    student.update({name: tensor + 0.3 for name, tensor in student.parameters().items()})
    task_accuracies(student, ["tides"], seed=3)
    before, after = ([logprob for logprob, _ in answers] for answers in found)
    assert len(before) == 4
    assert all(logprob < 0 for logprob in before)
    assert before != pytest.approx(after, rel=1e-3)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"acc,none": 0.5, "acc_norm,none": 0.75}, 0.75),
        ({"exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": 0.5}, 0.125),
        ({"alias": "x", "word_perplexity,none": 12.5}, 12.5),
    ],
)
def test_a_tasks_score_is_its_usual_figure(
    student: Student, harness: Any, result: dict[str, Any], expected: float
) -> None:
    harness(lambda **_: {"results": {"x": result}})
    assert task_accuracies(student, ["x"], seed=0) == {"x": expected}


def test_a_task_given_as_a_file_reports_under_its_own_name(student: Student, harness: Any) -> None:
    harness(lambda **_: {"results": {"sums": {"acc,none": 1.0}}})
    assert task_accuracies(student, ["/tasks/sums.yaml"], seed=0) == {"sums": 1.0}


def test_a_task_that_cannot_be_evaluated_says_why_and_what_to_do(student: Student, harness: Any) -> None:
    def evaluate(**_: Any) -> dict[str, Any]:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc'\non the Hub")

    harness(evaluate)
    with pytest.raises(OpdError, match=r"eval_tasks arc_easy: .*Couldn't reach 'allenai/ai2_arc' on the Hub") as caught:
        task_accuracies(student, ["arc_easy"], seed=0)
    assert caught.value.reason is Reason.INVALID_RUN_CONFIG


def test_without_the_harness_its_installation_is_named(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OpdError, match="run: pip install lm-eval"):
        task_accuracies(student, ["arc_easy"], seed=0)


def test_no_tasks_cost_nothing(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert task_accuracies(student, task_names(" , "), seed=0) == {}
    assert task_names("arc_easy, boolq,") == ["arc_easy", "boolq"]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `eval`")
def test_a_task_of_the_real_harness_is_scored(student: Student, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text('{"q": "Water boils", "choices": [" now", " never"], "gold": 0}\n' * 4)
    (tmp_path / "boiling.yaml").write_text(
        f"""
task: boiling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "rows.jsonl"}"}}, cache_dir: "{tmp_path / "cache"}"}}
output_type: multiple_choice
test_split: test
doc_to_text: q
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert task_accuracies(student, ["boiling"], seed=0, manager=manager)["boiling"] in {0.0, 1.0}
