"""Whole tiny trainings with a real teacher and student in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from opd_trainers import opd_trainers
from opd_trainers.options import OnPolicyOptions
from safetensors.numpy import load_file

from opd_daemon.config import RunConfig, parse_config
from opd_daemon.distill import session
from opd_daemon.distill.checkpoints import latest, read_progress
from opd_daemon.distill.session import run_trainer
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home, RunFolders
from opd_daemon.trainer import TrainContext, Trainer, TrainerInfo
from opd_daemon.types import EventKind, ScoreRequest
from tests.distill.local_teacher import LocalTeacher
from tests.tiny import write_tiny_qwen2

TRAINERS = {info.name: info for info in opd_trainers()}
REGIMES = pytest.mark.parametrize(
    ("trainer", "trainer_options"),
    [("on_policy", {}), ("on_policy", {"staleness": 1}), ("offline", {}), ("dataset", {}), ("mixed", {}), ("sft", {})],
)


@dataclass
class Listener:
    """Keeps what a run reports."""

    events: list[tuple[EventKind, dict[str, Any]]] = field(default_factory=list)
    gauged: list[dict[str, float]] = field(default_factory=list)
    training: bool = False

    def started(self) -> None:
        self.training = True

    def event(self, kind: EventKind, payload: dict[str, Any]) -> None:
        json.dumps(payload, allow_nan=False)
        self.events.append((kind, payload))

    def gauges(self, values: dict[str, float]) -> None:
        self.gauged.append(values)

    def settle(self) -> None:
        pass

    def of(self, kind: EventKind) -> list[dict[str, Any]]:
        return [payload for other, payload in self.events if other == kind]


@dataclass
class Bench:
    """A home, a teacher and a configuration to run trainers with."""

    folders: RunFolders
    teacher: LocalTeacher
    settings: dict[str, Any]

    def config(self, **changes: Any) -> RunConfig:
        return parse_config({**self.settings, **changes})

    def run(
        self,
        *,
        info: TrainerInfo | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        resume_from: Path | None = None,
        memory_halvings: int = 0,
        **changes: Any,
    ) -> tuple[bool, Listener]:
        config, listener = self.config(**changes), Listener()
        complete = run_trainer(
            run_id="run",
            config=config,
            trainer=info or TRAINERS[config.trainer],
            folders=self.folders,
            teacher=self.teacher,
            reporter=listener,
            should_stop=should_stop,
            resume_from=resume_from,
            memory_halvings=memory_halvings,
        )
        return complete, listener


@pytest.fixture
def bench(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> Bench:
    rows = tmp_path / "rows.jsonl"
    answer = "The tide comes in twice a day."
    lines = [{"prompt": f"Tell me about {i}", "completion": answer} for i in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "base_model_path": str(tiny_student),
        "teacher_model_path": str(tiny_teacher),
        "prompts_path": str(rows),
        "num_steps": 8,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-2,
        "warmup_steps": 1,
        "temperature": 1.0,
        "max_generation_tokens": 8,
        "eval_every": 4,
        "checkpoint_every": 3,
        "lora": {"rank": 4},
    }
    return Bench(Home(tmp_path / "home").run("run"), LocalTeacher(tiny_teacher), settings)


@pytest.mark.parametrize("trainer", ["on_policy", "offline", "mixed", "sft"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_kl_falls_and_agreement_rises(bench: Bench, trainer: str, divergence: str) -> None:
    complete, listener = bench.run(trainer=trainer, divergence=divergence)
    assert complete
    first, *_, last = listener.of(EventKind.EVALUATION)
    assert (first["step"], last["step"]) == (0, 8)
    assert last[divergence] < 0.75 * first[divergence]
    assert last["top5_agreement"] > first["top5_agreement"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("support", ["student", "teacher"])
def test_either_support_at_any_temperature_trains(bench: Bench, support: str, temperature: float) -> None:
    _, listener = bench.run(signal="sparse", support=support, temperature=temperature)
    steps = listener.of(EventKind.METRICS)
    assert steps[-1]["kl_mean"] < steps[0]["kl_mean"]
    assert steps[0]["kl_loss"] == pytest.approx(steps[0]["kl_mean"] * temperature**2)


def test_student_support_asks_the_teacher_about_the_students_own_ids(bench: Bench) -> None:
    asked: list[ScoreRequest] = []
    score = bench.teacher.score

    def listen(requests: list[ScoreRequest]) -> Any:
        asked.extend(requests)
        return score(requests)

    bench.teacher.score = listen  # type: ignore[method-assign]
    bench.run(num_steps=1, signal="sparse", top_k=16)
    scored = [request for request in asked if request.wants.top_k]
    assert len(scored) == 4
    assert all(request.candidate_ids is not None and request.candidate_ids.shape[1] == 16 for request in scored)
    assert {request.wants.top_k for request in scored} == {1}


@pytest.mark.parametrize("trainer", ["dataset", "offline", "sft"])
def test_the_datas_own_completions_can_be_learned(bench: Bench, trainer: str) -> None:
    _, listener = bench.run(trainer=trainer, use_teacher_targets=False, max_generation_tokens=16)
    rows = [json.loads(line) for line in bench.folders.rollouts.read_text().splitlines()]
    assert {row["source"] for row in rows} == {"data"}
    assert rows[0]["completion"].startswith("The tide comes")
    steps = listener.of(EventKind.METRICS)
    assert steps[-1]["ce_loss"] < steps[0]["ce_loss"]


def rollouts_of(bench: Bench) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bench.folders.rollouts.read_text().splitlines()]


def test_several_samples_of_a_prompt_leave_a_step_as_large_as_it_was(bench: Bench) -> None:
    _, listener = bench.run(num_steps=2, trainer_options={"samples_per_prompt": 2})
    rows = rollouts_of(bench)
    assert [row["samples"] for row in listener.of(EventKind.METRICS)] == [4, 4]
    prompts = [row["prompt_index"] for row in rows]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert rows[0]["completion_ids"] != rows[1]["completion_ids"]
    assert len(set(prompts)) == 4
    assert [row["drawn_from"][1] for row in rows] == [0, 1, 2, 3] * 2


def test_a_prefix_is_sampled_scored_and_trained_and_nothing_more(bench: Bench) -> None:
    _, listener = bench.run(num_steps=1, trainer_options={"prefix_tokens": 3})
    assert all(len(row["completion_ids"]) <= 3 for row in rollouts_of(bench))
    assert listener.of(EventKind.METRICS)[0]["completion_length"] <= 3


def test_truncated_rollouts_are_counted_but_not_scored_or_trained(bench: Bench) -> None:
    asked: list[ScoreRequest] = []
    score = bench.teacher.score

    def listen(requests: list[ScoreRequest]) -> Any:
        asked.extend(requests)
        return score(requests)

    settings = {"num_steps": 3, "learning_rate": 1e-9, "signal": "sparse", "exact_fraction": 0.0}
    _, listener = bench.run(**settings)
    assert 0 < sum(row["truncated_fraction"] for row in listener.of(EventKind.METRICS)) <= 3
    bench.teacher.score = listen  # type: ignore[method-assign]
    bench.teacher.known.clear()
    _, masked = bench.run(**settings, trainer_options={"mask_truncated": True})
    pairs = zip(listener.of(EventKind.METRICS), masked.of(EventKind.METRICS), strict=True)
    for plain, other in pairs:
        assert other["truncated_fraction"] == plain["truncated_fraction"]
        assert other["samples"] == plain["samples"]
    cut = [row for row in rollouts_of(bench) if row["stopped"] == "length"]
    lengths = {tuple(row["completion_ids"]) for row in cut}
    assert not any(tuple(request.token_ids[-8:].tolist()) in lengths for request in asked if not request.wants.hidden)


def test_a_run_that_masks_everything_ends_and_says_why(bench: Bench) -> None:
    with pytest.raises(OpdError) as caught:
        bench.run(num_steps=20, max_generation_tokens=1, trainer_options={"mask_truncated": True})
    assert caught.value.reason is Reason.INVALID_RUN_CONFIG
    assert "nothing was learned in 10 steps in a row" in caught.value.message
    assert "raise max_generation_tokens" in caught.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"signal": "sparse", "top_k": 8},
        {"signal": "sparse", "top_k": 8, "support": "union"},
        {"signal": "sparse", "top_k": 1, "support": "union"},
        {"signal": "sparse", "top_k": 300, "support": "teacher", "top_mass": 0.8},
        {"signal": "sampled", "divergence_options": {"baseline": "value", "importance_clip": 4.0}},
        {"max_batch_tokens": 48},
        {"lora": {"rank": 4, "dora": True}},
        {"lora": {"rank": 4, "dropout": 0.2}, "backward": "layerwise"},
    ],
)
def test_every_way_to_train_learns_and_measures_the_same_at_first(bench: Bench, changes: dict[str, Any]) -> None:
    _, exact = bench.run(num_steps=1)
    _, listener = bench.run(**{"num_steps": 12, **changes})
    first, expected = listener.of(EventKind.METRICS)[0], exact.of(EventKind.METRICS)[0]
    for name in ("agreement", "top5_agreement", "teacher_entropy", "student_entropy"):
        assert first[name] == pytest.approx(expected[name], abs=2e-4), name
    before, *_, after = listener.of(EventKind.EVALUATION)
    assert after["on_student"]["reverse_kl"] < before["on_student"]["reverse_kl"]
    if "signal" in changes:
        assert first["forward_kl"] <= expected["forward_kl"] + 1e-4  # the tail lumps outcomes together
        assert sum(row["bias_tokens"] for row in listener.of(EventKind.METRICS)) > 0


def test_samples_of_an_older_student_need_weights(bench: Bench) -> None:
    check = TRAINERS["on_policy"].faults
    options = OnPolicyOptions(staleness=1)
    [(field, words)] = check(bench.config(signal="sampled"), options)
    assert field == "trainer_options.staleness"
    assert "importance_clip" in words
    assert list(check(bench.config(signal="sampled", divergence_options={"importance_clip": 2.0}), options)) == []
    assert list(check(bench.config(), options)) == []


def test_a_mixed_run_draws_each_step_and_leans_where_it_is_told(bench: Bench) -> None:
    options = {"on_policy_fraction": 0.0, "on_policy_fraction_end": 1.0}
    _, listener = bench.run(trainer="mixed", num_steps=8, trainer_options=options)
    drawn = [row["on_policy_fraction"] for row in listener.of(EventKind.METRICS)]
    assert set(drawn) == {0.0, 1.0}
    assert (drawn[0], drawn[-1]) == (0.0, 1.0)
    sources = {row["step"]: row["source"] for row in rollouts_of(bench)}
    assert [sources[step] for step in range(1, 9)] == ["student" if own else "teacher" for own in drawn]


def test_sft_never_asks_the_teacher_to_score_what_it_trains_on(bench: Bench) -> None:
    asked: list[ScoreRequest] = []
    score = bench.teacher.score

    def listen(requests: list[ScoreRequest]) -> Any:
        asked.extend(requests)
        return score(requests)

    bench.teacher.score = listen  # type: ignore[method-assign]
    _, listener = bench.run(trainer="sft", num_steps=3)
    trained = {tuple(row["completion_ids"]) for row in rollouts_of(bench)}
    assert not any(tuple(request.token_ids[request.score_from :].tolist()) in trained for request in asked)
    for row in listener.of(EventKind.METRICS):
        assert row["loss"] == pytest.approx(row["ce_loss"])


def test_with_staleness_every_second_steps_rollouts_are_one_update_old(bench: Bench) -> None:
    _, listener = bench.run(num_steps=4, trainer_options={"staleness": 1})
    assert [row["staleness"] for row in listener.of(EventKind.METRICS)] == [0, 1, 0, 1]
    assert [row["version"] for row in rollouts_of(bench)[::4]] == [0, 0, 2, 2]
    _, listener = bench.run(num_steps=2)
    assert [row["staleness"] for row in listener.of(EventKind.METRICS)] == [0, 0]


@pytest.mark.parametrize(
    ("trainer", "changes"),
    [("offline", {}), ("offline", {"signal": "sparse", "exact_fraction": 0.5}), ("dataset", {}), ("sft", {})],
)
def test_what_is_computed_ahead_is_all_the_teacher_is_asked(
    bench: Bench, trainer: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"trainer": trainer, "num_steps": 4, "max_eval_samples": 0, **changes}
    bench.run(**changes)
    expected = weights(bench.folders.checkpoints / "final")
    ahead = Bench(Home(tmp_path / "ahead").run("run"), LocalTeacher(Path(bench.teacher.info.path)), bench.settings)
    complete, listener = ahead.run(**changes, precompute=True)
    assert complete
    assert ahead.teacher.unloaded
    found = weights(ahead.folders.checkpoints / "final")
    assert all(np.array_equal(value, found[name]) for name, value in expected.items())
    said = [row["text"] for row in listener.of(EventKind.LOG)]
    assert "the teacher is unloaded; its cache answers from now on" in said
    assert all(row["cache_misses"] == 0 for row in listener.of(EventKind.METRICS)) or trainer == "sft"


def test_a_teacher_that_another_run_needs_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OpdError(Reason.TEACHER_IN_USE, "another run needs it")

    monkeypatch.setattr(bench.teacher, "unload", refuse)
    complete, listener = bench.run(trainer="offline", num_steps=1, precompute=True)
    assert complete
    assert "the teacher stays in memory, as another run needs it" in [row["text"] for row in listener.of(EventKind.LOG)]


def test_a_cache_too_small_for_the_run_is_told_before_the_student_loads(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = bench.teacher.score

    def forgetful(requests: list[ScoreRequest]) -> Any:
        bench.teacher.known.clear()
        return score(requests)

    monkeypatch.setattr(bench.teacher, "score", forgetful)
    with pytest.raises(OpdError, match="the teacher cache is smaller than what this run asks"):
        bench.run(trainer="offline", num_steps=1, precompute=True)
    assert not bench.teacher.unloaded


def test_a_stop_while_the_teacher_computes_ahead_ends_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(_: list[ScoreRequest]) -> Any:
        raise OpdError(Reason.CANCELLED, "left the call")

    monkeypatch.setattr(bench.teacher, "score", broken_off)
    complete, listener = bench.run(trainer="offline", precompute=True, should_stop=lambda: True)
    assert not complete
    assert not listener.training


def test_a_prompt_without_a_completion_is_refused_by_its_line(bench: Bench) -> None:
    rows = Path(bench.settings["prompts_path"])
    rows.write_text("".join(json.dumps({"prompt": f"Tell me about {i}"}) + "\n" for i in range(12)))
    with pytest.raises(OpdError, match=r"rows\.jsonl:\d+: has no completion to learn"):
        bench.run(trainer="dataset")


def test_templates_that_differ_are_named_with_the_setting(bench: Bench, tmp_path: Path) -> None:
    path = write_tiny_qwen2(tmp_path / "thinking", seed=1, layers=3)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    template = settings["chat_template"].replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\nHmm: ' }}")
    assert template != settings["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    other = Bench(bench.folders, LocalTeacher(path), {**bench.settings, "teacher_model_path": str(path)})
    asked: list[ScoreRequest] = []
    score = other.teacher.score

    def listen(requests: list[ScoreRequest]) -> Any:
        asked.extend(requests)
        return score(requests)

    other.teacher.score = listen  # type: ignore[method-assign]
    _, listener = other.run(num_steps=1, max_eval_samples=0)
    (said,) = [row for row in listener.of(EventKind.LOG) if "chat templates" in row["text"]]
    assert said["level"] == "warning"
    assert "'' / 'Hmm: '" in said["text"]
    assert "teacher_template" in said["text"]
    read = [other.teacher.tokenizer.decode(request.token_ids[: request.score_from].tolist()) for request in asked]
    assert not any(text.endswith("Hmm: ") for text in read)
    asked.clear()
    other.run(num_steps=1, max_eval_samples=0, teacher_template="teacher")
    read = [other.teacher.tokenizer.decode(request.token_ids[: request.score_from].tolist()) for request in asked]
    assert all(text.endswith("<|im_start|>assistant\nHmm: ") for text in read)


def test_the_second_epoch_comes_from_the_cache_offline(bench: Bench) -> None:
    _, listener = bench.run(trainer="offline", num_steps=6)
    hits = [payload["cache_hits"] for payload in listener.of(EventKind.METRICS)]
    assert hits[0] == 0
    assert hits[-1] == 4


@pytest.mark.parametrize("trainer", ["on_policy", "offline"])
def test_the_final_adapter_loads_in_mlx_lm_and_changes_its_output(bench: Bench, trainer: str, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    before = Path(bench.settings["base_model_path"], "model.safetensors").read_bytes()
    bench.run(trainer=trainer, output_adapter_path=str(output))
    tokens = mx.array([[5, 6, 7]])
    plain, _ = mlx_lm.load(bench.settings["base_model_path"])
    for folder in (output, bench.folders.checkpoints / "final", bench.folders.checkpoints / "best"):
        adapted, _ = mlx_lm.load(bench.settings["base_model_path"], adapter_path=str(folder))
        assert float(mx.abs(adapted(tokens) - plain(tokens)).max()) > 0.1
    assert Path(bench.settings["base_model_path"], "model.safetensors").read_bytes() == before


def test_events_and_files_tell_the_same_story(bench: Bench) -> None:
    _, listener = bench.run()
    steps = [json.loads(line) for line in bench.folders.train_metrics.read_text().splitlines()]
    evaluations = [json.loads(line) for line in bench.folders.eval_metrics.read_text().splitlines()]
    assert steps == listener.of(EventKind.METRICS)
    assert evaluations == listener.of(EventKind.EVALUATION)
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["step"] for row in evaluations] == [0, 4, 8]
    assert listener.of(EventKind.SAMPLE)[0]["source"] == "student"
    saved = [(row["step"], Path(row["path"]).name) for row in listener.of(EventKind.CHECKPOINT)]
    assert saved[0] == (1, "step_000001")
    assert {(3, "step_000003"), (6, "step_000006"), (8, "final")} <= set(saved)
    best = min(evaluations[1:], key=lambda row: row["validation_kl"])
    assert [row["step"] for row in evaluations if row["is_best"]][-1] == best["step"]
    assert all(row["path"].endswith("best") for row in listener.of(EventKind.CHECKPOINT) if row["is_best"])


def test_metrics_of_a_step_are_sound(bench: Bench) -> None:
    _, listener = bench.run()
    for row in listener.of(EventKind.METRICS):
        assert row["samples"] == 4
        assert row["tokens"] == pytest.approx(row["completion_length"] * 4)
        assert row["cache_hits"] + row["cache_misses"] == 4
        assert row["kl_min"] <= row["kl_mean"] <= row["kl_max"]
        assert 0 <= row["agreement"] <= row["top5_agreement"] <= 1
        assert row["loss"] == pytest.approx(0.8 * row["kl_loss"] + 0.2 * row["ce_loss"], rel=1e-4)
        assert row["reverse_kl"] == pytest.approx(row["kl_mean"], rel=1e-4)
        assert row["rollout_milliseconds"] > 0
        assert row["peak_memory_bytes"] >= row["active_memory_bytes"] > 0
    assert listener.of(EventKind.METRICS)[-1]["seconds_remaining"] > 0  # the last evaluation is still to come


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapters.safetensors")


@REGIMES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_is_the_same_as_uninterrupted(
    bench: Bench, trainer: str, trainer_options: dict[str, Any], dropout: float, tmp_path: Path
) -> None:
    changes = {"trainer": trainer, "trainer_options": trainer_options, "lora": {"rank": 4, "dropout": dropout}}
    bench.run(**changes)
    expected = weights(bench.folders.checkpoints / "final")
    expected_rows = [json.loads(line)["loss"] for line in bench.folders.train_metrics.read_text().splitlines()]

    again = Bench(Home(tmp_path / "again").run("run"), LocalTeacher(Path(bench.teacher.info.path)), bench.settings)
    steps_left = iter([False] * 14)
    complete, listener = again.run(**changes, should_stop=lambda: next(steps_left, True))
    assert not complete
    assert not (again.folders.checkpoints / "final").exists()
    checkpoint = latest(again.folders.checkpoints)
    assert checkpoint is not None
    assert 0 < read_progress(checkpoint).step < 8
    complete, listener = again.run(**changes, resume_from=checkpoint)
    assert complete
    assert listener.of(EventKind.METRICS)[0]["step"] == read_progress(checkpoint).step + 1
    found = weights(again.folders.checkpoints / "final")
    assert all(np.array_equal(value, found[name]) for name, value in expected.items())
    rows = [json.loads(line) for line in again.folders.train_metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == expected_rows


def test_a_crash_after_the_checkpoint_repeats_the_lost_steps_exactly(bench: Bench, tmp_path: Path) -> None:
    bench.run()
    expected = weights(bench.folders.checkpoints / "final")
    complete, _ = bench.run(resume_from=bench.folders.checkpoints / "step_000003")
    assert complete
    found = weights(bench.folders.checkpoints / "final")
    assert all(np.array_equal(value, found[name]) for name, value in expected.items())
    rows = [json.loads(line)["step"] for line in bench.folders.train_metrics.read_text().splitlines()]
    assert rows == list(range(1, 9))


def test_a_stop_before_the_first_step_still_leaves_a_checkpoint(bench: Bench) -> None:
    complete, listener = bench.run(should_stop=lambda: True)
    assert not complete
    assert [row["step"] for row in listener.of(EventKind.CHECKPOINT)] == [0]
    complete, _ = bench.run(resume_from=latest(bench.folders.checkpoints), num_steps=1)
    assert complete


def test_the_result_does_not_depend_on_how_a_step_is_cut(bench: Bench, tmp_path: Path) -> None:
    losses = []
    for number, (size, accumulated) in enumerate([(4, 1), (1, 4)]):
        other = Bench(Home(tmp_path / str(number)).run("run"), bench.teacher, bench.settings)
        _, listener = other.run(batch_size=size, gradient_accumulation_steps=accumulated, num_steps=2)
        losses.append([row["loss"] for row in listener.of(EventKind.METRICS)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


class Poisoned(Trainer):
    """Reports gradients that are no numbers in some steps."""

    def __init__(self, poisoned: set[int]) -> None:
        self.poisoned = poisoned

    def train(self, context: TrainContext) -> None:
        from dataclasses import replace

        from opd_daemon.distill import backward, micro_batches, sample_completions, score

        for step in context.loop:
            rollouts = sample_completions(context.student, step.prompts, max_tokens=4, temperature=1.0, seed=step.seed)
            targets = score(context, rollouts)
            for batch in micro_batches(context, rollouts, targets, labels="teacher"):
                result = backward(context, batch)
                if step.number in self.poisoned:
                    result = replace(result, loss=float("nan"))
                step.accumulate(result)
            step.update()


def info(trainer: Trainer) -> TrainerInfo:
    return TrainerInfo("poisoned", "1", "", factory=lambda: trainer)


def test_steps_without_numbers_are_left_out_with_a_warning(bench: Bench) -> None:
    complete, listener = bench.run(info=info(Poisoned({2, 3, 6})))
    assert complete
    assert [row["step"] for row in listener.of(EventKind.METRICS)] == [1, 4, 5, 7, 8]
    warned = [row["text"] for row in listener.of(EventKind.LOG) if row["level"] == "warning"]
    assert [text.split(":")[0] for text in warned] == ["step 2 left out", "step 3 left out", "step 6 left out"]


def test_three_such_steps_in_a_row_end_the_run(bench: Bench) -> None:
    with pytest.raises(OpdError, match="3 steps in a row gave no number") as caught:
        bench.run(info=info(Poisoned({2, 3, 4})))
    assert caught.value.reason == Reason.NOT_A_NUMBER


class Forgetful(Trainer):
    def train(self, context: TrainContext) -> None:
        for _ in context.loop:
            pass


def test_a_trainer_that_never_updates_is_told_so(bench: Bench) -> None:
    with pytest.raises(OpdError, match=r"left step 1 without step.update\(\)"):
        bench.run(info=info(Forgetful()))


class Reckless(Trainer):
    def train(self, context: TrainContext) -> None:
        context.student.model.model.norm.weight = context.student.model.model.norm.weight + 1


def test_a_trainer_that_touches_the_base_is_found_out(bench: Bench) -> None:
    with pytest.raises(OpdError, match="changed the base model's weights"):
        bench.run(info=info(Reckless()))
    assert not (bench.folders.checkpoints / "final").exists()


class Greedy(Trainer):
    def train(self, context: TrainContext) -> None:
        np.ones(1 << 50)


def test_running_out_of_memory_is_told_as_such(bench: Bench) -> None:
    with pytest.raises(OpdError) as caught:
        bench.run(info=info(Greedy()))
    assert caught.value.reason == Reason.OUT_OF_MEMORY


def test_a_superset_vocabulary_is_masked_on_both_sides(bench: Bench, tmp_path: Path) -> None:
    wide = write_tiny_qwen2(tmp_path / "wide", seed=1, layers=3, extra_tokens=["<think>", "</think>"], vocab=700)
    other = Bench(bench.folders, LocalTeacher(wide), {**bench.settings, "teacher_model_path": str(wide)})
    asked: list[ScoreRequest] = []
    score = other.teacher.score

    def listen(requests: list[ScoreRequest]) -> Any:
        asked.extend(requests)
        return score(requests)

    other.teacher.score = listen  # type: ignore[method-assign]
    complete, listener = other.run(num_steps=1)
    assert complete
    assert "2 ids that only one of the two tokenizers knows" in listener.of(EventKind.LOG)[0]["text"]
    only_teacher = {other.teacher.info.vocab_size - 1, other.teacher.info.vocab_size - 2}
    assert all(set(request.masked_token_ids) == only_teacher for request in asked)
    assert other.teacher.written
    for request, tokens in other.teacher.written.items():
        assert set(request.masked_token_ids) == only_teacher
        assert not only_teacher & {token.token_id for token in tokens}


def test_tokenizers_that_disagree_are_refused(bench: Bench, tmp_path: Path) -> None:
    other = write_tiny_qwen2(tmp_path / "other", shuffled_vocab=True)
    shuffled = Bench(bench.folders, LocalTeacher(other), {**bench.settings, "teacher_model_path": str(other)})
    with pytest.raises(OpdError) as caught:
        shuffled.run()
    assert caught.value.reason == Reason.TOKENIZER_MISMATCH


def test_an_existing_adapter_is_trained_further(bench: Bench, tmp_path: Path) -> None:
    first = tmp_path / "first"
    bench.run(output_adapter_path=str(first))
    other = Bench(Home(tmp_path / "other").run("run"), bench.teacher, bench.settings)
    _, listener = other.run(student_adapter_path=str(first), lora={"rank": 64})
    started = listener.of(EventKind.EVALUATION)[0]["reverse_kl"]
    untrained = json.loads(bench.folders.eval_metrics.read_text().splitlines()[0])["reverse_kl"]
    assert started < 0.75 * untrained


def test_session_speaks_only_of_memory_it_recognises() -> None:
    assert session.is_memory_fault(RuntimeError("[malloc] Unable to allocate 4096 bytes."))
    assert session.is_memory_fault(RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"))
    assert not session.is_memory_fault(RuntimeError("[matmul] Last dimension of first input must match"))
