"""A real daemon for the command line's tests, and the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opd_daemon.cli.main import run
from opd_daemon.client import LocalDaemon
from opd_daemon.home import Home


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Opd = Callable[..., Outcome]


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Iterator[LocalDaemon]:
    with LocalDaemon(Home(tmp_path_factory.mktemp("cli") / "home")) as daemon:
        with daemon.client() as client:
            for _ in client.load_teacher(str(tiny_teacher)):
                pass
        yield daemon


@pytest.fixture
def opd_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Opd:
    """`opd …` in a home without a daemon."""
    for name in ("OPD_ADDRESS", "OPD_TOKEN", "OPD_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPD_HOME", str(tmp_path / "home"))

    def opd(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return opd


@pytest.fixture
def opd(opd_alone: Opd, daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch) -> Opd:
    """`opd …` with the tests' daemon."""
    monkeypatch.setenv("OPD_HOME", str(daemon.home.root))
    return opd_alone


@pytest.fixture
def config_file(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> Path:
    """A run of two short steps."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(8)))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base_model_path: {tiny_student}\n"
        f"teacher_model_path: {tiny_teacher}\n"
        "prompts_path: prompts.jsonl\n"
        "num_steps: 2\n"
        "max_generation_tokens: 4\n"
        "lora:\n"
        "  rank: 2\n"
    )
    return file
