"""How right plans are: unlike small runs planned and then done, time and peak memory of both compared.

    python bench/plan.py [--only NAME …] [--folder ~/.cache/opd-daemon-bench]

Every run is planned by a daemon that measures the machine with other models than the run's: of its shapes, but few
layers and random weights. Time is that from start to end of the run, the teacher's and the student's loading included.
Once it is done, a daemon that knows nothing plans it again: where the two plans differ, the machine changed its speed,
and the mean of both says how right plans are apart from that.
Peak memory is the most resident bytes (RSS) a process was seen with, the daemon's and the worker's added up.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.demo.smollm2 import convert_teacher, make_student
from opd_daemon.demo.story import prompts_file
from opd_daemon.home import Home
from opd_daemon.types import Event, EventKind, Plan, Run, RunState
from tests.tiny import write_tiny_qwen2

SAMPLE_SECONDS, LOOK_SECONDS = 0.02, 0.5
AIM = 0.1
# Phases of a plan, and what step metrics call them.
PHASES = {"rollout": "rollout", "score": "teacher", "train": "student"}
EVALUATED = (EventKind.METRICS, EventKind.EVALUATION)

# Temperature 1 and no EOS in sight: completions are as long as planned.
COMMON: dict[str, Any] = {"learning_rate": 1e-4, "warmup_steps": 1, "checkpoint_every": 1000, "eval_every": 1000}
REAL: dict[str, Any] = {**COMMON, "max_validation_prompts": 4, "max_eval_samples": 4, "gradient_accumulation_steps": 1}
CASES: dict[str, dict[str, Any]] = {
    "tiny on_policy exact": {
        "models": "tiny",
        "num_steps": 150,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_generation_tokens": 32,
    },
    "small on_policy sparse": {
        "models": "small",
        "num_steps": 25,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_generation_tokens": 48,
        "signal": "sparse",
        "lora": {"rank": 4},
    },
    "wide offline exact": {
        "models": "wide",
        "trainer": "offline",
        "num_steps": 20,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_generation_tokens": 64,
        "divergence": "forward_kl",
    },
    "smollm2 on_policy exact": {
        "models": "smollm2",
        "num_steps": 4,
        "batch_size": 8,
        "max_generation_tokens": 24,
    },
    "smollm2 offline sparse": {
        "models": "smollm2",
        "trainer": "offline",
        "num_steps": 6,
        "batch_size": 4,
        "max_generation_tokens": 20,
        "signal": "sparse",
        "divergence": "forward_kl",
        "lora": {"rank": 8, "num_layers": 12},
    },
    "smollm2 on_policy layerwise": {
        "models": "smollm2",
        "num_steps": 3,
        "batch_size": 4,
        "gradient_accumulation_steps": 3,
        "max_generation_tokens": 16,
        "backward": "layerwise",
        "lora": {"rank": 32},
    },
}


@dataclass(slots=True)
class Peaks:
    """Most resident bytes of each process seen so far."""

    daemon: int = 0
    worker: int = 0

    @property
    def whole(self) -> int:
        """Of both."""
        return self.daemon + self.worker


class Watcher(threading.Thread):
    """Looks at the daemon and its worker until it is told to stop.

    Seldom for a worker: that reads every process there is, and the run would feel it.
    """

    def __init__(self, daemon: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.peaks = Peaks()
        self._daemon = daemon
        self._worker: psutil.Process | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look."""
        looked = 0.0
        while not self._stopped.wait(SAMPLE_SECONDS) and self._daemon.is_running():
            self.peaks.daemon = max(self.peaks.daemon, self._daemon.memory_info().rss)
            try:
                if self._worker:
                    self.peaks.worker = max(self.peaks.worker, self._worker.memory_info().rss)
                elif time.monotonic() - looked > LOOK_SECONDS:
                    looked = time.monotonic()
                    self._worker = next((child for child in self._daemon.children() if _is_worker(child)), None)
            except psutil.Error:
                self._worker = None

    def stop(self) -> Peaks:
        """What was seen."""
        self._stopped.set()
        self.join()
        return self.peaks


def _is_worker(process: psutil.Process) -> bool:
    return "opd_daemon.runs.worker_main" in process.cmdline()


def main() -> None:
    """Plan, run and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "opd-daemon-bench")
    parser.add_argument("--parts", action="store_true", help="show phases and parts too")
    arguments = parser.parse_args()
    columns = ("planned", "measured", "ratio", "again", "of both", "planned", "measured", "ratio")
    print(f"{'':28}  {'time, s':>18}{'':28}{'peak memory, MB':>18}")
    print(f"{'':28}", *(f"{column:>8}" for column in columns))
    for name in arguments.only:
        values = dict(CASES[name])
        student, teacher = models(values.pop("models"), arguments.folder / "models")
        values |= {"base_model_path": str(student), "teacher_model_path": str(teacher)}
        values = {**(REAL if "smollm2" in name else COMMON), **prompts(name, arguments.folder), **values}
        with TemporaryDirectory() as home:  # a daemon that knows nothing of this machine, with an empty cache
            plan, done = plan_and_run(values, Path(home))
        with TemporaryDirectory() as home, LocalDaemon(Home(Path(home))) as daemon, daemon.client() as client:
            again = planned(client, values)
        print(row(name, plan, done, again), flush=True)
        if arguments.parts:
            show_parts(plan, done, again)


def models(kind: str, folder: Path) -> tuple[Path, Path]:
    """Student and teacher folders."""
    if kind == "smollm2":
        teacher = convert_teacher(folder / "smollm2-135m-instruct", print)
        return make_student(teacher, folder / "smollm2-135m-instruct-3bit", print), teacher
    sizes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "tiny": ({}, {"layers": 3}),
        "small": ({"hidden": 256, "layers": 8, "heads": 8, "kv_heads": 4}, {"hidden": 384, "layers": 10, "heads": 8}),
        "wide": ({"hidden": 512, "layers": 5, "heads": 8, "vocab": 16_384}, {"hidden": 768, "layers": 7, "heads": 12}),
    }
    small, large = sizes[kind]
    width = {"vocab": small["vocab"]} if "vocab" in small else {}
    return (
        write_tiny_qwen2(folder / f"{kind}-student", seed=2, **small),
        write_tiny_qwen2(folder / f"{kind}-teacher", seed=1, **{**large, **width}),
    )


def prompts(name: str, folder: Path) -> dict[str, str]:
    """Files of prompts."""
    if "smollm2" in name:
        return {
            "prompts_path": str(prompts_file("train.jsonl")),
            "validation_prompts_path": str(prompts_file("held_out.jsonl")),
        }
    file = folder / "prompts.jsonl"
    rows = [{"prompt": f"Tell me about the number {number}, and about {3 * number} too."} for number in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"prompts_path": str(file)}


@dataclass(frozen=True, slots=True)
class Done:
    """A finished run: seconds in all and by phase, and the peaks of memory."""

    seconds: float
    phases: dict[str, float]
    peaks: Peaks


def plan_and_run(values: dict[str, Any], home: Path) -> tuple[Plan, Done]:
    """The plan, and what the run took."""
    with LocalDaemon(Home(home)) as daemon, daemon.client() as client:
        plan = planned(client, values)
        (process,) = [child for child in psutil.Process().children() if "opd_daemon.cli" in child.cmdline()]
        watcher = Watcher(process)
        watcher.start()
        run, events = finished(client, values)
        peaks = watcher.stop()
        steps, _, _ = client.metrics(run.run_id)
    assert run.started_at is not None
    assert run.finished_at is not None
    seconds = (run.finished_at - run.started_at).total_seconds()
    return plan, Done(seconds, phases(run, events, steps), peaks)


def planned(client: Client, values: dict[str, Any]) -> Plan:
    """The plan of a run by this daemon."""
    run, _ = client.create_run(values, validate_only=True)
    assert run.plan is not None
    return run.plan


def phases(run: Run, events: list[Event], steps: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the phases, as the run says, and where it doesn't as the times of its events say."""
    assert run.started_at is not None
    running, evaluated, saved, ended = (
        next(event.time for event in events if wanted(event))
        for wanted in (
            lambda event: event.payload.get("state") == RunState.RUNNING,
            lambda event: event.kind is EventKind.EVALUATION,
            lambda event: event.payload.get("is_final"),
            lambda event: event.payload.get("state") == RunState.SUCCEEDED,
        )
    )
    # Before the first evaluation the teacher writes what is held out, and both models are checked; the last one, after
    # the last step, has the student answer first.
    stepped, last = (max(event.time for event in events if event.kind is kind) for kind in EVALUATED)
    evaluate = (evaluated - running + last - stepped).total_seconds()
    found = {phase: sum(step[f"{name}_milliseconds"] for step in steps) / 1000 for phase, name in PHASES.items()}
    load, report = (running - run.started_at).total_seconds(), (ended - saved).total_seconds()
    return {"load": load, **found, "evaluate": evaluate, "report": report}


def finished(client: Client, values: dict[str, Any]) -> tuple[Run, list[Event]]:
    """Do the run; with all its events."""
    run, revision = client.create_run(values)
    events = []
    for item in client.watch(revision, run.run_id):
        if not isinstance(item, Event):
            continue
        events.append(item)
        if item.kind is EventKind.RUN_STATE and RunState(item.payload["state"]).resting:
            break
    run, _ = client.run(run.run_id)
    if run.state is not RunState.SUCCEEDED:
        raise RuntimeError(f"{run.run_id} ended {run.state}: {run.error_message}")
    return run, events


def row(name: str, plan: Plan, done: Done, again: Plan) -> str:
    """One line of the table."""
    both = (plan.seconds + again.seconds) / 2 / done.seconds
    time_ratio, memory_ratio = plan.seconds / done.seconds, plan.peak_bytes / done.peaks.whole
    seconds = f"{plan.seconds:8.1f} {done.seconds:8.1f} {time_ratio:8.2f} {again.seconds:8.1f} {both:8.2f}"
    memory = f"{plan.peak_bytes / 1e6:8.0f} {done.peaks.whole / 1e6:8.0f} {memory_ratio:8.2f}"
    marks = "".join("." if abs(ratio - 1) <= AIM else "!" for ratio in (time_ratio, both, memory_ratio))
    return f"{name:28} {seconds} {memory} {marks}"


def show_parts(plan: Plan, done: Done, again: Plan) -> None:
    """What the plan is made of, beside what was measured and what was planned once more."""
    expected, later = dict(plan.phases), dict(again.phases)
    others = [phase for phase in expected if phase not in done.phases]
    unnamed = done.seconds - sum(done.phases.values())
    rows = [(phase, [phase], seconds) for phase, seconds in done.phases.items()]
    for name, parts, seconds in [*rows, (" + ".join((*others, "between")), others, unnamed)]:
        first, second = (sum(planned.get(phase, 0.0) for phase in parts) for planned in (expected, later))
        print(f"    {name:24} {first:8.1f} {seconds:8.1f} {'':8} {second:8.1f}")
    for process, ours, peak in (
        ("daemon", plan.daemon_peak_bytes, done.peaks.daemon),
        ("worker", plan.worker_peak_bytes, done.peaks.worker),
    ):
        print(f"    {process:69} {ours / 1e6:8.0f} {peak / 1e6:8.0f}")
    print("   ", ", ".join(f"{part.process}/{part.name} {part.bytes / 1e6:.0f}" for part in plan.memory))


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
