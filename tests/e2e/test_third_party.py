"""The README's trainer, packaged and installed as a stranger would, trains a student."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
