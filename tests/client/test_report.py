"""Reports over the wire: that of a run which is done, of one that was stopped, and of none."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from opd_daemon.client import Client, LocalDaemon
from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import Run, RunState

WAIT_SECONDS = 120.0


@pytest.fixture
def values(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> dict[str, object]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {number}?"}) + "\n" for number in range(8)))
    return {
        "base_model_path": str(tiny_student),
        "teacher_model_path": str(tiny_teacher),
        "prompts_path": str(prompts),
        "num_steps": 2,
        "max_generation_tokens": 4,
        "lora": {"rank": 2},
    }


def wait_for(client: Client, run_id: str, *states: RunState) -> Run:
    deadline = time.monotonic() + WAIT_SECONDS
    while (run := client.run(run_id)[0]).state not in states:
        assert time.monotonic() < deadline, run
        assert run.state is not RunState.FAILED, run.error_message
        time.sleep(0.05)
    return run


def test_a_finished_run_has_its_report_with_pictures_until_it_is_deleted(
    client: Client, daemon: LocalDaemon, values: dict[str, object]
) -> None:
    run, _ = client.create_run({**values, "run_id": "reported"})
    assert run.report_path == ""
    done = wait_for(client, "reported", RunState.SUCCEEDED)
    written = daemon.home.run("reported").report
    assert done.report_path == str(written)
    page, *pictures = client.report("reported")
    assert page.name == "reported.html"
    assert page.content == written.read_bytes()
    text = page.content.decode()
    for words in ("reported", "Learning", "Plan and reality", "Answers", "Token by token"):
        assert words in text
    assert {"reverse_kl.png", "time_by_phase.png"} <= {picture.name for picture in pictures}
    assert all(picture.content.startswith(b"\x89PNG") for picture in pictures)

    written.unlink()
    assert next(client.report("reported")).content.startswith(b"<!doctype html>")
    assert written.is_file()

    client.delete("reported")
    assert not written.exists()
    assert not daemon.home.run("reported").pictures.exists()


def test_a_run_has_no_report_before_it_rests_and_a_stopped_one_has_it_when_asked(
    client: Client, values: dict[str, object]
) -> None:
    long = {**values, "run_id": "stopped-early", "num_steps": 5000, "eval_every": 5000}
    client.create_run(long)
    deadline = time.monotonic() + WAIT_SECONDS
    while client.run("stopped-early")[0].step < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(OpdError) as early:
        list(client.report("stopped-early"))
    assert early.value.reason is Reason.REPORT_NOT_FOUND
    assert "RUNNING" in early.value.message
    client.stop("stopped-early")
    stopped = wait_for(client, "stopped-early", RunState.STOPPED)
    assert stopped.report_path == ""
    text = next(client.report("stopped-early")).content.decode()
    assert "STOPPED" in text
    assert f"{stopped.step} of 5000" in text


def test_what_has_no_report_says_so(client: Client, values: dict[str, object]) -> None:
    with pytest.raises(OpdError) as unknown:
        list(client.report("nobody"))
    assert unknown.value.reason is Reason.RUN_NOT_FOUND
    client.create_run({**values, "run_id": "before-it", "num_steps": 5000})
    client.create_run({**values, "run_id": "never-began"})
    client.stop("never-began")
    with pytest.raises(OpdError) as nothing:
        list(client.report("never-began"))
    assert nothing.value.reason is Reason.REPORT_NOT_FOUND
    assert "nothing to report" in nothing.value.message
    client.stop("before-it")
    wait_for(client, "before-it", RunState.STOPPED)
