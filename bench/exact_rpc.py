"""What serving the exact loss costs: teacher in the daemon, against both models in one process, in one run.

    python bench/exact_rpc.py [--teacher FOLDER] [--student FOLDER] [--rounds 5]

Eight sequences of 32 prompt and 64 completion tokens. Each time: the teacher's hidden states, the student's, the exact
reverse KL over the whole vocabulary and its gradient at the student's states. Served, the states come through the
daemon's socket (and go into its cache), and the teacher's head was fetched once; in one process they come from a plain
forward of the same weights. The two take turns on new tokens; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_daemon import blas

blas.preload()

import mlx.core as mx
import numpy as np

from opd_daemon.client import LocalDaemon, RemoteTeacher
from opd_daemon.config import LoraConfig, RunConfig
from opd_daemon.demo.smollm2 import convert_teacher, make_student
from opd_daemon.distill.batches import packed
from opd_daemon.distill.data import Prompt
from opd_daemon.distill.head_loss import HeadGradient, head_gradient
from opd_daemon.distill.objective import Objective
from opd_daemon.distill.rollouts import Rollout
from opd_daemon.distill.scoring import ask
from opd_daemon.distill.student import Student
from opd_daemon.distill.teacher_head import HeadMatrix
from opd_daemon.home import Home
from opd_daemon.teacher.folder import open_folder
from opd_daemon.teacher.loading import load
from opd_daemon.types import CachedScores, ScoreRequest, Scores, TeacherInfo

SEQUENCES, PROMPT, COMPLETION = 8, 32, 64


class InProcess:
    """A teacher whose model is in this process; `info` and the head are those of the daemon's."""

    def __init__(self, folder: Path, remote: RemoteTeacher) -> None:
        self.info: TeacherInfo = remote.info
        self.head = remote.head
        self._parts = load(open_folder(str(folder)), self.info.vocab_size, lambda _: None).parts

    def score(self, requests: Sequence[ScoreRequest]) -> list[CachedScores]:
        """Hidden states from one plain forward of all sequences, which have one length here."""
        tokens = mx.array(np.stack([request.token_ids[:-1] for request in requests]))
        states = np.array(self._parts.body(tokens))
        found = zip(states, requests, strict=True)
        return [CachedScores(Scores(hidden=rows[request.score_from - 1 :]), False, 0.0) for rows, request in found]


def main() -> None:
    """Measure and print."""
    # As much for reuse as both processes have together.
    mx.set_cache_limit(2 << 30)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, help="an mlx-lm folder; default: the demo's teacher")
    parser.add_argument("--student", type=Path, help="an mlx-lm folder; default: the demo's student")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher = arguments.teacher or convert_teacher(Path(folder) / "teacher", print)
        student = arguments.student or make_student(teacher, Path(folder) / "student", print)
        with LocalDaemon(Home(Path(folder) / "home")) as daemon, daemon.client() as client:
            for _ in client.load_teacher(str(teacher)):
                pass
            _compare(teacher, student, RemoteTeacher(client), arguments.rounds)


def _compare(teacher: Path, student_path: Path, remote: RemoteTeacher, rounds: int) -> None:
    student = Student.load(student_path, None, LoraConfig(rank=8), seed=0)
    settings = {"teacher_model_path": str(teacher), "base_model_path": str(student_path), "prompts_path": "none"}
    config = RunConfig(**settings, divergence="reverse_kl", temperature=1.0, kl_weight=1.0, ce_weight=0.0)
    head = HeadMatrix(remote.head(), student.vocabulary)
    objective = Objective.from_config(config, head=lambda: head)
    teachers: dict[str, Any] = {"in one process": InProcess(teacher, remote), "served": remote}
    seconds: dict[str, list[float]] = {name: [] for name in teachers}
    asking: dict[str, list[float]] = {name: [] for name in teachers}
    for seed in range(rounds + 1):
        losses = []
        for place, (name, asked) in enumerate(teachers.items()):
            # New tokens each time: nothing comes from the cache.
            started = time.perf_counter()
            targets = ask(asked, _rollouts(2 * seed + place), config)
            asking[name].append(time.perf_counter() - started)
            losses.append(_loss(student, objective, _rollouts(2 * seed + place), targets))
            seconds[name].append(time.perf_counter() - started)
        assert all(np.isfinite(float(found.loss)) for found in losses)
    _check_equal(teachers, student, objective, config)
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    for name, taken in medians.items():
        teaching = 1000 * statistics.median(asking[name][1:])
        print(f"{name:<16}{1000 * taken:9.1f} ms   of it {teaching:.1f} ms for the teacher's states")
    what = f"{SEQUENCES} x ({PROMPT} + {COMPLETION}) tokens, exact reverse KL and its gradient at the states"
    print(f"{'ratio':<16}{medians['served'] / medians['in one process']:9.3f}      aim 1.1 or less; {what}")


def _loss(student: Student, objective: Objective, rollouts: list[Rollout], targets: Any) -> HeadGradient:
    (batch,) = packed(rollouts, targets, size=len(rollouts), temperature=1.0, labels="teacher")
    found = head_gradient(student, student.states_at(batch.tokens, batch.places), batch.rows, objective)
    mx.eval(found.loss, found.slope)
    return found


def _check_equal(teachers: dict[str, Any], student: Student, objective: Objective, config: RunConfig) -> None:
    rollouts = _rollouts(999)
    found = [_loss(student, objective, rollouts, ask(teacher, rollouts, config)) for teacher in teachers.values()]
    first, second = (float(result.loss) for result in found)
    assert abs(first - second) < 1e-4 * abs(first), "both ways must give the same loss"


def _rollouts(seed: int) -> list[Rollout]:
    ids = np.random.default_rng(seed).integers(100, 40_000, (SEQUENCES, PROMPT + COMPLETION))
    return [
        Rollout(Prompt(index, "", tuple(row[:PROMPT])), tuple(row[PROMPT:]), "length", "student")
        for index, row in enumerate(ids.tolist())
    ]


if __name__ == "__main__":
    main()
