"""The commands against a real daemon."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from opd_daemon.cli import exits
from opd_daemon.client import Client, LocalDaemon
from opd_daemon.types import RunState
from tests.cli.conftest import Opd

LONG = ("--set", "num_steps=5000", "--set", "checkpoint_every=1", "--set", "eval_every=5000")


@pytest.fixture
def client(daemon: LocalDaemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


def wait_for(client: Client, run_id: str, *states: RunState) -> None:
    deadline = time.monotonic() + 60
    while client.run(run_id)[0].state not in states:
        assert time.monotonic() < deadline, client.run(run_id)[0]
        time.sleep(0.05)


def wait_for_step(client: Client, run_id: str) -> None:
    deadline = time.monotonic() + 60
    while client.run(run_id)[0].step < 1:
        assert time.monotonic() < deadline, client.run(run_id)[0]
        time.sleep(0.05)


def test_distill_from_plan_to_the_command_that_uses_the_adapter(opd: Opd, config_file: Path) -> None:
    outcome = opd("distill", config_file)
    assert outcome.code == exits.OK, outcome.err
    for word in ("plan:", "memory:", "assumed:", "held-out reverse KL", "mlx_lm.generate --model", "--adapter-path"):
        assert word in outcome.err
    for word in ("PENDING", "RUNNING", "step 1/2", "step 2/2", "agreement", "SUCCEEDED"):
        assert word in outcome.out
    run_id = opd("runs", "--json").json[0]["run_id"]
    assert f"{run_id}: done" in outcome.err

    assert run_id in opd("runs").out
    assert opd("status", "--json").json["state"] == "SUCCEEDED"
    assert "SUCCEEDED" in opd("status", run_id.removeprefix("distill_")).out
    metrics = opd("metrics", "last", "--json").json
    assert [row["step"] for row in metrics["steps"]] == [1, 2]
    assert "HELD-OUT" in opd("metrics").out
    watched = opd("watch", run_id)
    assert (watched.code, watched.out) == (exits.OK, "")
    assert "held-out agreement" in watched.err
    refused = opd("resume", run_id)
    assert refused.code == exits.FAILED
    assert "SUCCEEDED" in refused.err
    assert opd("delete", run_id, "--yes").code == exits.OK
    assert opd("status", run_id).code == exits.USAGE


def test_every_fault_of_a_configuration_is_one_line(opd: Opd, config_file: Path) -> None:
    outcome = opd("distill", config_file, "--set", "base_model_path=/nowhere", "--set", "prompts_path=/none.jsonl")
    assert outcome.code == exits.USAGE
    lines = outcome.err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "--set base_model_path=/nowhere",
        "--set prompts_path=/none.jsonl",
    ]


def test_a_broken_row_names_file_and_line(opd: Opd, config_file: Path) -> None:
    prompts = config_file.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "fine"}\n{"prompt": "fine too"}\n{"prompt": \n')
    outcome = opd("distill", config_file)
    assert outcome.code == exits.USAGE
    assert f"{prompts}" in outcome.err
    assert "3" in outcome.err.split("prompts.jsonl", 1)[1].split()[0]


def test_check_plans_and_starts_nothing(opd: Opd, config_file: Path) -> None:
    before = opd("runs", "--json").json
    outcome = opd("distill", config_file, "--check", "--preset", "fast")
    assert outcome.code == exits.OK
    assert "plan:" in outcome.err
    assert opd("runs", "--json").json == before


def test_the_same_distill_again_takes_the_stopped_run_up(opd: Opd, client: Client, config_file: Path) -> None:
    assert opd("distill", config_file, *LONG, "--detach").code == exits.OK
    run_id = next(client.runs()).run_id
    wait_for_step(client, run_id)
    again = opd("distill", config_file, *LONG, "--detach")
    assert f"{run_id} runs this configuration already" in again.err
    assert opd("stop", "last").code == exits.OK
    wait_for(client, run_id, RunState.STOPPED)

    asked = opd("distill", config_file, *LONG)
    assert asked.code == exits.STOPPED
    assert f"opd resume {run_id}" in asked.err
    assert asked.err.count("\n") == 1

    resumed = opd("distill", config_file, *LONG, "--resume", "--detach")
    assert resumed.code == exits.OK
    assert f"{run_id}: goes on after step" in resumed.err
    wait_for(client, run_id, RunState.RUNNING)
    client.stop(run_id)
    wait_for(client, run_id, RunState.STOPPED)
    watched = opd("watch", run_id)
    assert watched.code == exits.STOPPED
    assert f"opd resume {run_id}" in watched.err

    other = opd("distill", config_file, *LONG, "--new", "--detach")
    assert other.code == exits.OK
    newest = next(client.runs()).run_id
    assert newest != run_id
    client.stop(newest)
    wait_for(client, newest, RunState.STOPPED)


def test_run_names_may_be_shortened_until_they_are_ambiguous(opd: Opd, client: Client, config_file: Path) -> None:
    for name in ("alpha-one", "alpha-two"):
        opd("distill", config_file, "--set", f"run_id={name}", "--new", "--detach")
    assert opd("status", "alpha-o", "--json").json["run_id"] == "alpha-one"
    ambiguous = opd("status", "alpha")
    assert ambiguous.code == exits.USAGE
    assert "2 runs begin so (alpha-two, alpha-one)" in ambiguous.err
    unknown = opd("stop", "nobody")
    assert (unknown.code, unknown.err) == (exits.USAGE, "opd: RUN 'nobody': no such run; 'opd runs' lists them\n")
    for name in ("alpha-one", "alpha-two"):
        wait_for(client, name, RunState.SUCCEEDED)


def test_listings_are_also_json(opd: Opd) -> None:
    assert {entry["name"] for entry in opd("trainers", "--json").json} >= {"on_policy", "offline"}
    assert all(entry["error"] == "" for entry in opd("plugins", "--json").json)
    assert opd("teacher", "status", "--json").json["state"] == "READY"
    assert opd("cache", "stats", "--json").json["limit_bytes"] > 0
    assert "on_policy" in opd("trainers").out
    assert "in use" in opd("plugins").out
    assert "time saved" in opd("cache").out


def test_a_look_at_the_teacher(opd: Opd, tiny_teacher: Path) -> None:
    assert opd("teacher").out.startswith("state")
    assert opd("teacher", "load", tiny_teacher).code == exits.OK
    scored = opd("score", "The tide comes in", "--json").json
    assert scored["total_logprob"] == pytest.approx(sum(entry["logprob"] for entry in scored["tokens"]))
    assert all(len(entry["top"]) == 3 for entry in scored["tokens"])
    table = opd("score", "The tide comes in")
    assert "LOGPROB" in table.out
    assert "perplexity" in table.err
    answer = opd("generate", "Hello", "--max-tokens", 5, "--json").json
    assert 1 <= len(answer["tokens"]) <= 5
    assert opd("generate", "Hello", "--max-tokens", 5).out == answer["text"] + "\n"
    assert opd("score", "a").code == exits.USAGE


@pytest.mark.parametrize("path", ["/nowhere", "nobody/nothing-at-all"])
def test_a_wrong_teacher_path_is_one_line_and_the_daemon_serves_on(opd: Opd, path: str) -> None:
    outcome = opd("teacher", "load", path)
    assert outcome.code == exits.USAGE
    assert path in outcome.err
    assert "Traceback" not in outcome.err
    assert opd("teacher").code == exits.OK


def start(arguments: list[str], home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "opd_daemon.cli", *arguments],
        env={"PATH": "/usr/bin", "OPD_HOME": str(home), "HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(program: subprocess.Popen[str], word: str) -> str:
    assert program.stdout is not None
    seen = ""
    for line in program.stdout:
        seen += line
        if word in line:
            return seen
    raise AssertionError(f"{word!r} never came:\n{seen}")


def test_ctrl_c_while_watching_leaves_the_run_alone(daemon: LocalDaemon, client: Client, config_file: Path) -> None:
    program = start(["distill", str(config_file), *LONG, "--new", "--set", "run_id=detached"], daemon.home.root)
    with program:
        read_until(program, "step 2/")
        program.send_signal(signal.SIGINT)
        assert program.stdout is not None
        assert (
            "the run goes on; 'opd watch detached' looks again, 'opd stop detached' stops it" in program.stdout.read()
        )
    assert program.returncode == exits.INTERRUPTED
    assert client.run("detached")[0].state is RunState.RUNNING
    client.stop("detached")
    wait_for(client, "detached", RunState.STOPPED)


def test_ctrl_c_with_serve_stops_with_a_checkpoint_and_the_same_command_goes_on(
    tmp_path: Path, config_file: Path
) -> None:
    home = tmp_path / "served"
    program = start(["distill", str(config_file), *LONG, "--serve"], home)
    with program:
        read_until(program, "step 2/")
        program.send_signal(signal.SIGINT)
        assert program.stdout is not None
        rest = program.stdout.read()
    assert "stopping after this step, with a checkpoint" in rest
    assert "go on:   opd resume distill_" in rest
    assert program.returncode == exits.STOPPED
    assert not (home / "run" / "daemon.json").exists()
    with start(["distill", str(config_file), *LONG, "--serve", "--resume"], home) as program:
        seen = read_until(program, "step ")
        assert "goes on after step" in seen
        children = psutil.Process(program.pid).children(recursive=True)
        program.kill()
        program.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [child for child in alive if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_watch_as_json_is_one_document_a_line(daemon: LocalDaemon, client: Client, config_file: Path, opd: Opd) -> None:
    opd("distill", config_file, "--new", "--detach", "--set", "run_id=as-json", "--set", "num_steps=20")
    with start(["watch", "as-json", "--json"], daemon.home.root) as program:
        assert program.stdout is not None
        lines = program.stdout.read().splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    revisions = [entry["revision"] for entry in events if "revision" in entry]
    assert revisions == sorted(set(revisions))
    assert events[-1]["payload"]["state"] == "SUCCEEDED"
