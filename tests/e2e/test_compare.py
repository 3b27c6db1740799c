"""Comparing a run's models: every one answers, each is measured, and whatever is wrong is said."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step

from opd_daemon.client import Client
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.types import ComparisonRequest, ModelAnswer, ModelSummary, RunState
from tests.e2e.conftest import DaemonProcess
from tests.e2e.test_main_job import configuration, wait_for
from tests.tiny import write_tiny_adapter, write_tiny_qwen2

PROMPTS = ("Tell me about the tide.", "List three fruits.")
LENGTH = 12


@dataclass(frozen=True)
class Stage:
    """A daemon with its teacher, a finished run that started from an adapter, and one that began fresh."""

    daemon: DaemonProcess
    client: Client
    folder: Path

    def request(self, **changes: Any) -> ComparisonRequest:
        return replace(ComparisonRequest("adapted", PROMPTS, LENGTH), **changes)

    def compare(self, **changes: Any) -> list[ModelAnswer]:
        return list(self.client.compare(self.request(**changes)))

    def values(self, **changes: Any) -> dict[str, Any]:
        files = (self.folder / "teacher", self.folder / "student", self.folder / "rows.jsonl")
        settings = {"trainer": "offline", "num_steps": 3, "checkpoint_every": 3, "eval_every": 3}
        return configuration(*files, **{**settings, **changes})

    def finished(self, **changes: Any) -> None:
        run, _ = self.client.create_run(self.values(**changes))
        run = wait_for(self.client, run.run_id, lambda run: run.state.resting)
        assert run.state is RunState.SUCCEEDED, run.error_message


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("compare")
    # The teacher knows more tokens than the student, likely ones too, and both pad their logits differently.
    extra = tuple(f"<tool {number}>" for number in range(200))
    write_tiny_qwen2(folder / "teacher", seed=1, layers=3, extra_tokens=extra, vocab=1024)
    student = write_tiny_qwen2(folder / "student", seed=2)
    write_tiny_adapter(folder / "sft", student, size=0.05)
    rows = [json.dumps({"prompt": f"Tell me about number {number}."}) for number in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    home = Home(folder / "home")
    home.root.mkdir()
    process = DaemonProcess(home)
    with process.client() as client:
        stage = Stage(process, client, folder)
        stage.finished(run_id="adapted", student_adapter_path=str(folder / "sft"))
        stage.finished(run_id="fresh")
        yield stage
    if process.process.poll() is None:
        process.stop()


def texts(answers: list[ModelAnswer]) -> dict[tuple[str, int], str]:
    found: dict[tuple[str, int], str] = {}
    for answer in answers:
        if answer.summary is None:
            place = (answer.model, answer.prompt_index)
            found[place] = found.get(place, "") + answer.text
    return found


def summaries(answers: list[ModelAnswer]) -> dict[str, ModelSummary]:
    return {answer.model: answer.summary for answer in answers if answer.summary}


def test_every_model_answers_every_prompt_and_is_measured(stage: Stage) -> None:
    answers = stage.compare(speculative=True)
    models = ["teacher", "base", "sft", "distilled", "speculative"]
    assert list(dict.fromkeys(answer.model for answer in answers)) == models
    said, measured = texts(answers), summaries(answers)
    assert set(said) == {(name, index) for name in models for index in range(2)}
    ends = [answer for answer in answers if answer.finish_reason]
    assert len(ends) == 10
    for name, summary in measured.items():
        # A model's summary is its last message, and counts what it said.
        assert [answer for answer in answers if answer.model == name][-1].summary == summary
        assert summary.tokens == sum(answer.tokens for answer in answers if answer.model == name)
        assert 2 <= summary.tokens <= 2 * LENGTH
        assert summary.seconds > 0
        assert summary.peak_bytes > summary.weight_bytes * 0.5 > 0
        assert summary.speedup is not None
    # What drafts can't change is what is said.
    assert [said["speculative", index] for index in range(2)] == [said["teacher", index] for index in range(2)]

    assert measured["teacher"].speedup == 1.0
    assert measured["teacher"].forward_kl is None
    for name in ("base", "sft", "distilled"):
        summary = measured[name]
        assert summary.forward_kl is not None
        assert summary.reverse_kl is not None
        assert summary.agreement is not None
        assert summary.acceptance is not None
        assert summary.forward_kl > 0
        assert summary.reverse_kl > 0
        assert 0 < summary.acceptance < 1
        assert (summary.adapter_bytes > 0) == (name != "base")
        assert summary.weight_bytes - summary.adapter_bytes == measured["base"].weight_bytes
    assert len({measured[name].forward_kl for name in ("base", "sft", "distilled")}) == 3
    drafted = measured["speculative"].accepted_fraction
    assert drafted is not None
    assert 0 <= drafted < 1
    assert measured["speculative"].weight_bytes > measured["teacher"].weight_bytes


def test_each_adapter_answers_as_mlx_lm_lets_it(stage: Stage) -> None:
    said = texts(stage.compare(models=("distilled", "base", "sft")))
    folders = {
        "base": None,
        "sft": str(stage.folder / "sft"),
        "distilled": str(stage.daemon.home.run("adapted").checkpoints / "best"),
    }
    for name, adapter in folders.items():
        model, tokenizer = mlx_lm.load(str(stage.folder / "student"), adapter_path=adapter)
        size = len(tokenizer.get_vocab())
        for index, prompt in enumerate(PROMPTS):
            messages = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
            mask = mx.where(mx.arange(model.args.vocab_size) < size, 0.0, -mx.inf)
            steps = generate_step(
                mx.array(ids), model, max_tokens=LENGTH, logits_processors=[lambda _, logits, mask=mask: logits + mask]
            )
            found = [int(token) for token, _ in steps]
            ends = [place for place, token in enumerate(found) if token in tokenizer.eos_token_ids]
            assert said[name, index] == tokenizer.decode(found[: ends[0]] if ends else found)


def test_a_base_that_nobody_asked_the_teacher_about_has_no_speedup(stage: Stage) -> None:
    measured = summaries(stage.compare(run_id="fresh", models=("base",), prompts=PROMPTS[:1]))
    assert set(measured) == {"base"}
    assert measured["base"].speedup is None
    assert measured["base"].forward_kl is not None
    assert set(summaries(stage.compare(run_id="fresh", max_tokens=2))) == {"teacher", "base", "distilled"}


Row = tuple[dict[str, Any], Reason, str, str]
FAULTS: dict[str, Row] = {
    "unknown run": ({"run_id": "nobody"}, Reason.RUN_NOT_FOUND, "", "'opd runs' lists them"),
    "no prompts": ({"prompts": ()}, Reason.INVALID_REQUEST, "prompts", "send at least one"),
    "a blank prompt": ({"prompts": ("one", " \n")}, Reason.INVALID_REQUEST, "prompts[1]", "empty"),
    "very many prompts": ({"prompts": ("one",) * 101}, Reason.INVALID_REQUEST, "prompts", "at most 100"),
    "an unknown model": ({"models": ("base", "gpt")}, Reason.INVALID_REQUEST, "models[1]", "'gpt' is no model"),
    "no adapter to start from": (
        {"run_id": "fresh", "models": ("sft",)}, Reason.INVALID_REQUEST, "models[0]", "leave 'sft' out",
    ),
    "negative length": ({"max_tokens": -1}, Reason.INVALID_REQUEST, "max_tokens", "negative"),
    "too long": ({"max_tokens": 600}, Reason.INVALID_REQUEST, "", "prompts[0]: 6"),
    "negative temperature": ({"temperature": -0.5}, Reason.INVALID_REQUEST, "temperature", "0 for greedy"),
    "no temperature": ({"temperature": float("nan")}, Reason.INVALID_REQUEST, "temperature", "0 for greedy"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_can_not_be_compared_is_refused(stage: Stage, name: str) -> None:
    changes, reason, field, words = FAULTS[name]
    fault = refusal(lambda: stage.compare(**changes))
    assert fault.reason is reason
    assert [violation.field for violation in fault.violations] == ([field] if field else [])
    assert words in str(fault)


def refusal(wrong: Callable[[], object]) -> OpdError:
    with pytest.raises(OpdError) as caught:
        wrong()
    return caught.value


def test_a_run_without_an_adapter_compares_only_its_base(stage: Stage) -> None:
    checkpoints = stage.daemon.home.run("fresh").checkpoints
    away = checkpoints.rename(checkpoints.with_name("away"))
    changes: dict[str, Any] = {"run_id": "fresh", "models": ("base",), "max_tokens": 1}
    assert refusal(lambda: stage.compare(run_id="fresh")).reason is Reason.CHECKPOINT_NOT_FOUND
    assert refusal(lambda: stage.compare(**changes, speculative=True)).reason is Reason.CHECKPOINT_NOT_FOUND
    assert set(summaries(stage.compare(**changes))) == {"base"}
    away.rename(checkpoints)


def test_comparing_and_training_exclude_each_other(stage: Stage) -> None:
    answers = stage.client.compare(stage.request(max_tokens=400))
    next(iter(answers))
    second = refusal(stage.compare)
    assert (second.reason, "are being compared" in str(second)) == (Reason.RUN_STATE_CONFLICT, True)
    assert refusal(lambda: stage.client.delete("adapted")).reason is Reason.RUN_STATE_CONFLICT
    assert refusal(stage.client.unload_teacher).reason is Reason.TEACHER_IN_USE
    run, _ = stage.client.create_run(stage.values(run_id="waits", num_steps=2000))
    assert stage.client.run(run.run_id)[0].state is RunState.PENDING
    for _ in answers:
        assert stage.client.run(run.run_id)[0].state is RunState.PENDING
        break
    answers.close()
    wait_for(stage.client, run.run_id, lambda run: run.step >= 1)
    training = refusal(stage.compare)
    assert (training.reason, "'waits' is under way" in str(training)) == (Reason.RUN_STATE_CONFLICT, True)
    stage.client.stop(run.run_id)
    wait_for(stage.client, run.run_id, lambda run: run.state.resting)
    assert summaries(stage.compare(models=("teacher",), max_tokens=1))


def test_a_worker_that_dies_is_an_error_and_frees_the_place(stage: Stage) -> None:
    answers = stage.client.compare(stage.request(max_tokens=400, models=("base",), prompts=3 * PROMPTS))
    next(answers)
    (worker,) = stage.daemon.children("opd_daemon.runs.compare_main")
    worker.kill()
    fault = refusal(lambda: list(answers))
    assert (fault.reason, "killed by SIGKILL" in str(fault)) == (Reason.WORKER_DIED, True)
    assert summaries(stage.compare(models=("teacher",), max_tokens=1))


def test_another_teacher_or_none_is_refused_with_the_command_that_helps(stage: Stage) -> None:
    path = str(stage.folder / "teacher")
    stage.client.unload_teacher()
    missing = refusal(stage.compare)
    assert (missing.reason, f"opd teacher load {path}" in str(missing)) == (Reason.TEACHER_NOT_LOADED, True)
    for _ in stage.client.load_teacher(str(stage.folder / "student")):
        pass
    other = refusal(stage.compare)
    assert (other.reason, f"opd teacher load {path}" in str(other)) == (Reason.TEACHER_CHANGED, True)
    for _ in stage.client.load_teacher(path):
        pass
    assert summaries(stage.compare(models=("teacher",), max_tokens=1))


def test_a_daemon_that_stops_ends_the_comparison(stage: Stage) -> None:
    # The last test: the daemon is gone afterwards.
    answers = stage.client.compare(stage.request(max_tokens=400, models=("base",), prompts=3 * PROMPTS))
    next(answers)
    stopped: list[int] = []
    stopping = threading.Thread(target=lambda: stopped.append(stage.daemon.stop()))
    stopping.start()
    fault = refusal(lambda: list(answers))
    stopping.join()
    assert fault.reason is Reason.SHUTTING_DOWN
    assert stopped == [0]
