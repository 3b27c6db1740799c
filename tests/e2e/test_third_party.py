"""The README's trainer, packaged and installed as a stranger would, trains a student."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd_daemon.errors import OpdError
from opd_daemon.home import Home
from opd_daemon.types import RunState
from tests.e2e.conftest import DaemonProcess
from tests.e2e.test_main_job import configuration, wait_for

README = Path(__file__).parents[2] / "README.md"
PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "somebodys-trainer"
version = "0.1"
dependencies = ["opd-daemon"]

[tool.hatch.build.targets.wheel]
only-include = ["my_trainer.py"]

"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder to put on the path, with the package installed in it."""
    text = README.read_text()
    (module,) = re.findall(r'```python\n("""my_trainer\.py.*?)```', text, re.DOTALL)
    (entry_point,) = re.findall(r"```toml\n(\[project\.entry-points\.opd_daemon\].*?)```", text, re.DOTALL)
    source, target = tmp_path / "somebodys-trainer", tmp_path / "site"
    source.mkdir()
    (source / "my_trainer.py").write_text(module)
    (source / "pyproject.toml").write_text(PYPROJECT + entry_point)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=120)
    return target


def test_trainer_of_a_separate_package_runs(
    installed: Path,
    tiny_teacher: Path,
    tiny_student: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed))
    home = Home(tmp_path / "home")
    home.root.mkdir()
    daemon = DaemonProcess(home)
    try:
        with daemon.client() as client:
            assert "my_trainer" in {trainer.name for trainer in client.trainers()}
            values = configuration(tiny_teacher, tiny_student, prompts, trainer="my_trainer", num_steps=2)
            run, _ = client.create_run(values)
            finished = wait_for(client, run.run_id, lambda run: run.state.resting)
            assert finished.state is RunState.SUCCEEDED, finished.error_message
    finally:
        daemon.stop()


DIVERGENCE = """
from typing import Annotated

from pydantic import BaseModel, Field

from opd_daemon import DivergenceInfo, hookimpl


class Options(BaseModel):
    order: Annotated[float, Field(gt=1)] = 2.0


def make(options, temperature):
    import mlx.core as mx
    from mlx.nn import log_softmax
    from opd_daemon.distill import Divergence

    class Renyi(Divergence):
        def values(self, logits, signal):
            s, t = (log_softmax(each / self.temperature, axis=-1) for each in (logits, signal.logits))
            powers = mx.where(logits > -1e29, options.order * s + (1 - options.order) * t, -mx.inf)
            return mx.logsumexp(powers, axis=-1) / (options.order - 1)

    return Renyi("renyi", temperature)


@hookimpl
def opd_divergences():
    yield DivergenceInfo("renyi", "Of a chosen order, student from teacher.", make, Options, ("exact",))
"""


def test_divergence_of_a_separate_package_trains(
    tiny_teacher: Path, tiny_student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "somebodys_divergence-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-divergence\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[opd_daemon]\nsomebodys = somebodys_divergence\n")
    (tmp_path / "site" / "somebodys_divergence.py").write_text(DIVERGENCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    home = Home(tmp_path / "home")
    home.root.mkdir()
    daemon = DaemonProcess(home)
    try:
        with daemon.client() as client:
            assert {entry.name: entry.plugin for entry in client.divergences()}["renyi"] == "somebodys"
            chosen = {"divergence": "renyi", "signal": "exact", "num_steps": 2}
            values = configuration(tiny_teacher, tiny_student, prompts, **chosen)
            with pytest.raises(OpdError, match="greater than 1"):
                client.create_run({**values, "divergence_options": {"order": 0.5}})
            run, _ = client.create_run({**values, "divergence_options": {"order": 1.5}})
            finished = wait_for(client, run.run_id, lambda run: run.state.resting)
            assert finished.state is RunState.SUCCEEDED, finished.error_message
            metrics = finished.latest_metrics
            assert metrics["kl_mean"] > metrics["reverse_kl"] / 4 > 0
            assert metrics["exact"]
    finally:
        daemon.stop()
