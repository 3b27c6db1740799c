"""The demo from beginning to end, on the public client only: prepare, serve, load, distil, compare, stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.demo.answers import student_answers, teacher_answers
from opd_daemon.demo.result import DemoResult, Seconds
from opd_daemon.distill.report.answers import Answers
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.types import Event, EventKind, Run, RunState

SHOWN_ANSWERS = 3
ANSWER_TOKENS = 40

COMMON: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "temperature": 1.0,
    "kl_weight": 1.0,
    "ce_weight": 0.0,
    "max_generation_tokens": ANSWER_TOKENS,
    "lora": {"rank": 16, "scale": 2.0},
    "max_eval_samples": 8,
}
# What a student this damaged says at temperature 1 is hardly worth correcting; at 0.7 it is.
TRAINERS: dict[str, dict[str, Any]] = {
    "on_policy": {
        "num_steps": 28,
        "batch_size": 4,
        "divergence": "reverse_kl",
        "generation_temperature": 0.7,
        "trainer_options": {"staleness": 1},
    },
    "offline": {"num_steps": 20, "batch_size": 4, "divergence": "forward_kl"},
}
DEFAULT_TRAINER = "on_policy"


class Stage(Protocol):
    """Where the story is told."""

    def say(self, text: str) -> None:
        """One line."""

    def load_teacher(self, client: Client, path: str) -> None:
        """Load a teacher, showing its progress."""

    def follow(self, client: Client, run: Run) -> None:
        """Show a run until it rests."""


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What may be chosen. `folder` holds models, daemon and results; `overrides` replace values of the run."""

    folder: Path
    trainer: str = DEFAULT_TRAINER
    steps: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def home(self) -> Home:
        """The demo's daemon has a home of its own."""
        return Home(self.folder / "home")

    def run_values(self, teacher: Path, student: Path) -> dict[str, Any]:
        """The run's configuration."""
        if self.trainer not in TRAINERS:
            message = f"--trainer {self.trainer}: the demo knows {' and '.join(sorted(TRAINERS))}"
            raise OpdError(Reason.INVALID_RUN_CONFIG, message, trainer=self.trainer)
        values = {**COMMON, **TRAINERS[self.trainer], **self.overrides, "trainer": self.trainer}
        steps = self.steps or values["num_steps"]
        return {
            **values,
            "num_steps": steps,
            "eval_every": max(1, -(-steps // 3)),
            "checkpoint_every": max(1, -(-steps // 2)),
            "teacher_model_path": str(teacher),
            "base_model_path": str(student),
            "prompts_path": str(prompts_file("train.jsonl")),
            "validation_prompts_path": str(prompts_file("held_out.jsonl")),
        }


def prompts_file(name: str) -> Path:
    """A file of prompts that ships with the demo."""
    return Path(str(resources.files("opd_daemon.demo").joinpath("prompts", name)))


@contextmanager
def demo_daemon(settings: DemoSettings, seconds: Seconds, stage: Stage) -> Iterator[Client]:
    """The demo's own daemon, for as long as the block lasts."""
    stage.say("starting a daemon on a private socket")
    with seconds.phase("start"):
        daemon = LocalDaemon(settings.home, allowed_roots=[settings.folder, prompts_file("train.jsonl").parent])
        daemon.__enter__()
    try:
        with daemon.client() as client:
            yield client
    finally:
        daemon.close()


def prepare_models(settings: DemoSettings, seconds: Seconds, stage: Stage) -> tuple[Path, Path]:
    """Teacher and student folders, converted once."""
    from opd_daemon.demo.smollm2 import convert_teacher, make_student

    models = settings.folder / "models"
    with seconds.phase("convert"):
        teacher = convert_teacher(models / "smollm2-135m-instruct", stage.say)
        student = make_student(teacher, models / "smollm2-135m-instruct-3bit", stage.say)
    return teacher, student


def tell(
    settings: DemoSettings, client: Client, models: tuple[Path, Path], seconds: Seconds, stage: Stage
) -> DemoResult:
    """Load the teacher, distil, and compare before with after.

    Raises:
        OpdError: the run's own error when it did not succeed.
    """
    teacher, student = models
    stage.say("loading the teacher")
    with seconds.phase("load"):
        stage.load_teacher(client, str(teacher))
    run, _ = client.create_run(settings.run_values(teacher, student))
    if run.plan:
        stage.say(
            f"distilling with {settings.trainer}: {run.total_steps} steps, about {run.plan.seconds:.0f} s planned"
        )
    stage.follow(client, run)
    events = replay(client, run)
    finished, _ = client.run(run.run_id)
    if finished.state is not RunState.SUCCEEDED:
        message = f"the demo's run {run.run_id} ended {finished.state}: {finished.error_message or 'see its log'}"
        raise OpdError(Reason.INTERNAL, message, run_id=run.run_id)
    seconds.add_run(events)
    return _compare(settings, client, finished, events, seconds)


def replay(client: Client, run: Run) -> list[Event]:
    """Every event of a run that rests, from the daemon's log."""
    events = []
    for item in client.watch(0, run.run_id):
        if isinstance(item, Event):
            events.append(item)
            if item.kind is EventKind.RUN_STATE and RunState(item.payload["state"]).resting:
                break
    return events


def _compare(settings: DemoSettings, client: Client, run: Run, events: list[Event], seconds: Seconds) -> DemoResult:
    steps, evaluations, _ = client.metrics(run.run_id)
    found = student_answers(events)
    prompts = [answers.prompt for answers in found[:SHOWN_ANSWERS]]
    with seconds.phase("teacher's answers"):
        replies = teacher_answers(client, prompts, ANSWER_TOKENS) if prompts else []
    answers = [
        Answers(entry.prompt, entry.before, entry.after, reply) for entry, reply in zip(found, replies, strict=False)
    ]
    return DemoResult(
        trainer=settings.trainer,
        run=run,
        before=evaluations[0],
        after=evaluations[-1],
        steps=steps,
        evaluations=evaluations,
        answers=answers,
        seconds=seconds,
        cache=client.cache_stats(),
    )
