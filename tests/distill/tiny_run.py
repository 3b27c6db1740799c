"""A whole tiny training that can be ended at any moment and taken up again, in this process or as one of its own.

`python tiny_run.py FOLDER` does the run described by FOLDER/settings.json, from its newest checkpoint on if there is
one, and tells on standard output what it reports.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from opd_daemon import blas

blas.preload()

from opd_trainers import opd_trainers

from opd_daemon.config import parse_config
from opd_daemon.distill.checkpoints import latest
from opd_daemon.distill.rollouts import read_log
from opd_daemon.distill.session import run_trainer
from opd_daemon.distill.token_table import read_token_tables
from opd_daemon.home import Home, RunFolders
from opd_daemon.types import EventKind
from tests.distill.local_teacher import LocalTeacher

# What the clock, the memory and the cache say differs from one attempt to the next.
NOT_COMPARED = ("milliseconds", "per_second", "seconds", "seconds_elapsed", "seconds_remaining", "bytes", "cache")


class Told:
    """Keeps, and shows, what a run reports."""

    def __init__(self, show: Callable[[str], None] = lambda _: None) -> None:
        self.events: list[tuple[EventKind, dict[str, Any]]] = []
        self._show = show

    def started(self) -> None:
        self._show("started")

    def event(self, kind: EventKind, payload: dict[str, Any]) -> None:
        self.events.append((kind, payload))
        self._show(f"{kind} {payload.get('step', '')}")

    def gauges(self, values: dict[str, float]) -> None:
        pass

    def settle(self) -> None:
        self._show("settled")

    def of(self, kind: EventKind) -> list[dict[str, Any]]:
        return [payload for other, payload in self.events if other == kind]


def folders_of(folder: Path) -> RunFolders:
    return Home(folder / "home").run("run")


def prepare(folder: Path, teacher: Path, student: Path, **changes: Any) -> Path:
    """Write a run's settings and rows into a new folder."""
    folder.mkdir(parents=True)
    rows = [{"prompt": f"Tell me about {i}", "completion": "The tide comes in twice a day."} for i in range(11)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "base_model_path": str(student),
        "teacher_model_path": str(teacher),
        "prompts_path": str(folder / "rows.jsonl"),
        "output_adapter_path": str(folder / "adapter"),
        "num_steps": 7,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-2,
        "warmup_steps": 1,
        "temperature": 1.0,
        "max_generation_tokens": 8,
        "max_eval_samples": 2,
        "eval_every": 3,
        "checkpoint_every": 2,
        "keep_last_n": 2,
        "lora": {"rank": 4, "dropout": 0.1},
        **changes,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def go(
    folder: Path,
    reporter: Told,
    *,
    teacher: LocalTeacher | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    memory_halvings: int = 0,
) -> bool:
    """Do the run, or what is left of it. True when it is complete."""
    config = parse_config(json.loads((folder / "settings.json").read_text()))
    folders = folders_of(folder)
    return run_trainer(
        run_id="run",
        config=config,
        trainer={info.name: info for info in opd_trainers()}[config.trainer],
        folders=folders,
        teacher=teacher or LocalTeacher(Path(config.teacher_model_path)),
        reporter=reporter,
        should_stop=should_stop,
        resume_from=latest(folders.checkpoints),
        memory_halvings=memory_halvings,
    )


def result(folder: Path) -> dict[str, Any]:
    """Everything a finished run leaves behind that may not depend on how often it was ended."""
    folders = folders_of(folder)
    adapters = [folder / "adapter", folders.checkpoints / "final", folders.checkpoints / "best"]
    return {
        "adapters": [(path / "adapters.safetensors").read_bytes() for path in adapters],
        "steps": [comparable(row) for row in read_log(folders.train_metrics)],
        "evaluations": [comparable(row) for row in read_log(folders.eval_metrics)],
        "rollouts": read_log(folders.rollouts),
        "samples": read_log(folders.samples),
        "tables": read_token_tables(folders.token_tables),
    }


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    left_out = {name for name in row if name.endswith(NOT_COMPARED) or name.startswith(NOT_COMPARED)}
    return {name: value for name, value in row.items() if name not in {*left_out, "checkpoint_path"}}


if __name__ == "__main__":
    go(Path(sys.argv[1]), Told(lambda line: sys.stdout.write(line + "\n") and sys.stdout.flush()))
