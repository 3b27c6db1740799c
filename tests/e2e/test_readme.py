"""The README's dozen lines do what they say, with nothing but grpcio and the stubs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import DaemonProcess
from tests.e2e.test_main_job import wait_for

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_client_starts_watches_and_stops_a_run(
    daemon: DaemonProcess, tiny_teacher: Path, tiny_student: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {number}."}) + "\n" for number in range(20)))
    (program,) = re.findall(r"```python\n(import json, pathlib, grpc\n.*?)```", README.read_text(), re.DOTALL)
    for placeholder, value in {
        "~/.opd/run/daemon.json": daemon.home.discovery,
        "/models/teacher": tiny_teacher,
        "/models/student": tiny_student,
        "/data/prompts.jsonl": prompts,
        "prompts_path=": "max_generation_tokens=4, prompts_path=",
        "event.step_metrics.step == 20": "event.step_metrics.step == 2",
    }.items():
        assert placeholder in program, placeholder
        program = program.replace(placeholder, str(value))
    program += "        if event.run_state_changed.state == 7:\n            raise SystemExit\n"
    environment = {**os.environ, "PYTHONPATH": str(README.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step_metrics" in done.stdout
    with daemon.client() as client:
        (run,) = client.runs()
        assert wait_for(client, run.run_id, lambda run: run.state.resting).state == "STOPPED"
