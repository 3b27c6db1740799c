"""A step whose teacher is the daemon's warm cache, against the same step with its targets in memory, in one run.

    python bench/warm_cache.py [--teacher FOLDER] [--student FOLDER] [--rounds 6]

Offline distillation of eight completions of 48 tokens, exact reverse KL, LoRA on every linear layer; every step is on
the same eight. In turn the teacher's hidden states come out of the daemon's cache over its socket, as in a second
epoch, and out of a dictionary in this process, which is a step with no teacher at all. Medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from opd_daemon import blas

blas.preload()

from opd_trainers import opd_trainers
from opd_trainers.offline import Offline
from stepwise import Timed, run_timed, write_prompts

from opd_daemon.client import LocalDaemon, RemoteTeacher
from opd_daemon.demo.smollm2 import convert_teacher, make_student
from opd_daemon.distill import Step
from opd_daemon.home import Home
from opd_daemon.trainer import TeacherHead, TrainContext
from opd_daemon.types import CachedScores, GeneratedToken, GenerateRequest, ScoreRequest, TeacherInfo

BATCH, ACCUMULATION, TOKENS = 4, 2, 48


class Switched:
    """A teacher that answers from the daemon's cache, or from this process's memory where `absent`."""

    def __init__(self, remote: RemoteTeacher) -> None:
        self.absent = False
        self._remote = remote
        self._known: dict[bytes, CachedScores] = {}

    @property
    def info(self) -> TeacherInfo:
        """Facts of the teacher."""
        return self._remote.info

    def score(self, requests: Sequence[ScoreRequest]) -> list[CachedScores]:
        """Scores of the requests, which differ by their tokens alone."""
        keys = [request.token_ids.tobytes() for request in requests]
        if self.absent:
            return [self._known[key] for key in keys]
        answers = self._remote.score(requests)
        self._known |= dict(zip(keys, answers, strict=True))
        return answers

    def generate(self, requests: Sequence[GenerateRequest]) -> list[list[GeneratedToken]]:
        """Completions."""
        return self._remote.generate(requests)

    def head(self) -> TeacherHead:
        """The teacher's head."""
        return self._remote.head()

    def unload(self) -> None:
        """Not here."""


class Turns:
    """Takes turns between cache and memory, step by step."""

    def __init__(self, teacher: Switched) -> None:
        self._teacher = teacher
        self.seconds: dict[str, list[float]] = {"warm cache": [], "no teacher": []}
        self.score: dict[str, list[float]] = {"warm cache": [], "no teacher": []}

    def before(self, _context: TrainContext, step: Step) -> None:
        """Choose; the first two steps warm both ways up."""
        self._teacher.absent = step.number % 2 == 0

    def between(self, _context: TrainContext, step: Step, seconds: float) -> None:
        """Note a step's seconds."""
        if step.number > 2:
            name = "no teacher" if self._teacher.absent else "warm cache"
            self.seconds[name].append(seconds)
            self.score[name].append(step.phases["score"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, help="an mlx-lm folder; default: the demo's teacher")
    parser.add_argument("--student", type=Path, help="an mlx-lm folder; default: the demo's student")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = arguments.teacher or convert_teacher(folder / "teacher", print)
        student = arguments.student or make_student(teacher, folder / "student", print)
        with LocalDaemon(Home(folder / "home")) as daemon, daemon.client() as client:
            for _ in client.load_teacher(str(teacher)):
                pass
            switched = Switched(RemoteTeacher(client))
            turns = Turns(switched)
            values = _values(folder, teacher, student, steps=2 * arguments.rounds + 3)
            info = {info.name: info for info in opd_trainers()}["offline"]
            run_timed(folder, values, info, Timed(Offline(), turns.before, turns.between), switched)
    medians = {name: statistics.median(seconds) for name, seconds in turns.seconds.items()}
    for name, seconds in medians.items():
        asking = statistics.median(turns.score[name])
        print(f"{name:<12}{1000 * seconds:9.0f} ms   of it {asking:.1f} ms for the teacher's states")
    print(f"{'ratio':<12}{medians['warm cache'] / medians['no teacher']:9.3f}      aim 1.05 or less")


def _values(folder: Path, teacher: Path, student: Path, steps: int) -> dict[str, object]:
    train, held_out = write_prompts(folder, BATCH * ACCUMULATION)
    return {
        "trainer": "offline",
        "teacher_model_path": str(teacher),
        "base_model_path": str(student),
        "prompts_path": str(train),
        "validation_prompts_path": str(held_out),
        "num_steps": steps,
        "batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "divergence": "reverse_kl",
        "temperature": 1.0,
        "kl_weight": 1.0,
        "ce_weight": 0.0,
        "max_generation_tokens": TOKENS,
        "max_eval_samples": 0,
        "eval_every": 10_000,
        "checkpoint_every": 10_000,
    }


if __name__ == "__main__":
    main()
