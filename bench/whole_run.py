"""A whole on-policy run, `opd` against TRL's stable DistillationTrainer on torch, on this CPU.

    make bench-env && python bench/whole_run.py [--steps 8]

Same weights, prompts, batch (4), prompt length (16), longest completion (32), LoRA rank (16 on every linear), exact
reverse KL at temperature 1, both in float32 on all cores, one after the other in one run. Time is that of the optimizer
steps, the first two left out on all sides (with staleness 1 steps come in pairs); memory is the peak of resident
bytes, daemon and worker together: pages that both have, as those of libraries, count once where the system can tell.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

from opd_daemon import blas

blas.preload()

import psutil
from mlx_lm.utils import load_tokenizer

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.demo.smollm2 import convert_teacher, make_student
from opd_daemon.demo.story import prompts_file
from opd_daemon.home import Home
from opd_daemon.types import Event, EventKind, RunState

BATCH, PROMPT, COMPLETION, RANK = 4, 16, 32, 16
LEARNING_RATE = 3e-4
LOOKS_AT_SHARED = 50
ENVIRONMENT = Path(".venv-bench/bin/python")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "opd-daemon-bench")
    arguments = parser.parse_args()
    teacher = convert_teacher(arguments.folder / "models" / "smollm2-135m-instruct", print)
    student = make_student(teacher, arguments.folder / "models" / "smollm2-135m-instruct-3bit", print)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = cut_prompts(student, arguments.steps * BATCH)
        found = {
            name: run_opd(
                folder / f"staleness{options.get('staleness', 0)}",
                teacher,
                student,
                texts,
                steps=arguments.steps,
                options=options,
            )
            for name, options in {"opd": {}, "opd, staleness 1": {"staleness": 1}}.items()
        }
        theirs = run_trl(folder, teacher, student, texts, arguments.steps)
    for name, ours in found.items():
        show(name, ours)
    show("TRL", theirs)
    for name, ours in found.items():
        print(name)
        print(f"  time of a step     {step_seconds(ours) / step_seconds(theirs):6.2f} x   aim 0.6 or less")
        print(f"  peak memory        {ours['peak_bytes'] / theirs['peak_bytes']:6.2f} x   aim 1.0 or less")


def cut_prompts(student: Path, count: int) -> list[tuple[str, str]]:
    """Texts of twice PROMPT tokens, of which the first half is the prompt, and that half."""
    tokenizer = load_tokenizer(student)
    lines = prompts_file("train.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["prompt"] for line in lines)
    ids = tokenizer.encode(words * 4)
    texts = []
    for start in range(0, len(ids) - 2 * PROMPT, PROMPT):
        text, half = (tokenizer.decode(ids[start : start + size]) for size in (2 * PROMPT, PROMPT))
        if len(tokenizer.encode(text)) == 2 * PROMPT and tokenizer.encode(text)[:PROMPT] == tokenizer.encode(half):
            texts.append((text, half))
    return texts[:count]


def run_opd(
    folder: Path,
    teacher: Path,
    student: Path,
    texts: list[tuple[str, str]],
    *,
    steps: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """One run through a daemon of its own."""
    folder.mkdir()
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for file, rows in zip(files, (texts, texts[:1]), strict=True):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in rows), encoding="utf-8")
    values = {
        "trainer": "on_policy",
        "trainer_options": options,
        "teacher_model_path": str(teacher),
        "base_model_path": str(student),
        "prompts_path": str(files[0]),
        "validation_prompts_path": str(files[1]),
        "num_steps": steps,
        "batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 0,
        "divergence": "reverse_kl",
        "signal": "exact",
        "temperature": 1.0,
        "kl_weight": 1.0,
        "ce_weight": 0.0,
        "max_generation_tokens": COMPLETION,
        "max_eval_samples": 0,
        "eval_every": 10_000,
        "checkpoint_every": 10_000,
        "use_cache": False,
        "lora": {"rank": RANK, "scale": 2.0},
    }
    with LocalDaemon(Home(folder / "home")) as daemon, daemon.client() as client, ResidentPeak(daemon.pid) as peak:
        run_id = finished_run(client, values)
        done, _, _ = client.metrics(run_id)
    return {
        "steps": [row["step_milliseconds"] / 1000 for row in done],
        "tokens": sum(row["tokens"] for row in done),
        "peak_bytes": peak.bytes,
        "phases": {name: [row[f"{name}_milliseconds"] for row in done] for name in ("rollout", "teacher", "student")},
    }


def finished_run(client: Client, values: dict[str, Any]) -> str:
    """Create a run and wait for its end."""
    run, revision = client.create_run(values)
    for item in client.watch(revision, run.run_id):
        if isinstance(item, Event) and item.kind is EventKind.RUN_STATE and RunState(item.payload["state"]).resting:
            break
    found, _ = client.run(run.run_id)
    if found.state is not RunState.SUCCEEDED:
        raise RuntimeError(f"the run ended {found.state}: {found.error_message}")
    return run.run_id


class ResidentPeak:
    """Most bytes a process and its children hold together, looked at ten times a second.

    To know which pages two processes share, every page is walked while its process waits, so that is done rarely:
    libraries, which they share, hardly change.
    """

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        looks, processes, twice = 0, [self._process], 0
        while not self._done.wait(0.1):
            if looks % LOOKS_AT_SHARED == 0:
                processes = [self._process, *self._process.children(recursive=True)]
                twice = sum(map(counted_twice, processes))
            looks += 1
            self.bytes = max(self.bytes, sum(map(resident_bytes, processes)) - twice)


def resident_bytes(process: psutil.Process) -> int:
    """All that is resident, shared or not; 0 for a process that has ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def counted_twice(process: psutil.Process) -> int:
    """Resident bytes that are others' too, a page that n processes share as all but an n-th, where the system tells."""
    try:
        found = process.memory_full_info()
    except psutil.NoSuchProcess:
        return 0
    return int(found.rss - getattr(found, "pss", found.rss))


def run_trl(folder: Path, teacher: Path, student: Path, texts: list[tuple[str, str]], steps: int) -> dict[str, Any]:
    """The same in the bench environment."""
    settings = {
        "teacher": str(teacher),
        "student": str(student),
        "prompts": [half for _, half in texts],
        "steps": steps,
        "batch": BATCH,
        "completion": COMPLETION,
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
        "threads": os.cpu_count(),
        "output": str(folder / "trl"),
    }
    file = folder / "settings.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    command = [str(ENVIRONMENT), str(Path(__file__).parent / "trl" / "torch_side.py"), str(file)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def step_seconds(result: dict[str, Any]) -> float:
    """Mean seconds of a step, the first two left out: steps may come in pairs."""
    return statistics.fmean(result["steps"][2:])


def show(name: str, result: dict[str, Any]) -> None:
    """One side."""
    print(
        f"{name:16} {step_seconds(result):6.2f} s a step, {result['tokens']:.0f} tokens generated, "
        f"peak {result['peak_bytes'] / 1e9:.2f} GB"
    )
    for phase, milliseconds in result.get("phases", {}).items():
        print(f"       {phase:9} {statistics.fmean(milliseconds[2:]) / 1000:6.2f} s")


if __name__ == "__main__":
    main()
