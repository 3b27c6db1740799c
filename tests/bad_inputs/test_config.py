"""Values of a run's configuration that are no good, over the wire and in a file: all are told at once."""

# One row per fault reads best as a table.
# ruff: noqa: E501
from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest

from opd_daemon.errors import Reason
from opd_daemon.v1 import run_pb2
from tests.bad_inputs.stage import (
    CONFIG,
    CONTEXT,
    MALFORMED,
    REQUEST,
    VOCABULARY,
    Fault,
    Stage,
    check,
    encoded_size,
    refusal,
)


def sized(data: bytes) -> bytes:
    """Bytes after their length, as in a field."""
    return encoded_size(len(data)) + data


def deep(levels: int) -> bytes:
    """A Struct in a Struct in a Struct …"""
    data = b""
    for _ in range(levels):
        data = b"\x0a" + sized(b"\x0a\x01k\x12" + sized(b"\x2a" + sized(data)))
    return data


FAULTS: dict[str, Fault] = {
    "batch 0": Fault(20, lambda s: s.check(batch_size=0), CONFIG, "config.batch_size", "0: input should be greater than or equal to 1"),
    "largest number": Fault(20, lambda s: s.check(temperature=1e308), CONFIG, "config.temperature", "1e+308: input should be less than or equal to 100"),
    "infinite": Fault(20, lambda s: s.check(learning_rate=math.inf), CONFIG, "config.learning_rate", "inf: input should be a finite number"),
    "less than nothing": Fault(20, lambda s: s.check(weight_decay=-math.inf), CONFIG, "config.weight_decay", "-inf"),
    "infinite option": Fault(20, lambda s: s.check(optimizer_options={"eps": math.inf}), CONFIG, "config.optimizer_options.eps", "inf"),
    "deep options": Fault(21, lambda s: s.create_raw(b"\x22" + sized(deep(100))), MALFORMED, "config.trainer_options", "nested deeper than 100"),
    "as deep as can be": Fault(21, lambda s: s.create_raw(b"\x22" + sized(deep(30))), CONFIG, "config.trainer_options.k", "no such option"),
    "huge options": Fault(21, lambda s: s.check(trainer_options={"x": 1_000_000 * "y"}), CONFIG, "config", "use at most 65536"),
    "many options": Fault(21, lambda s: s.check(trainer_options={f"option_{n}": n for n in range(40_000)}), CONFIG, "config", "use at most 65536"),
    "unknown machine": Fault(23, lambda s: s.client.create_run(s.values(), validate_only=True, machine="Cray 1"), REQUEST, "machine", "Cray 1"),
    "negative rate": Fault(20, lambda s: s.check(learning_rate=-1e-5), CONFIG, "config.learning_rate", "-1e-05: input should be greater than 0"),
    "NaN": Fault(20, lambda s: s.check(temperature=math.nan), CONFIG, "config.temperature", "nan: input should be a finite number"),
    "too many ids": Fault(19, lambda s: s.check(top_k=1000), CONFIG, "config.top_k", f"the vocabulary has {VOCABULARY} ids"),
    "no ids": Fault(19, lambda s: s.check(top_k=0), CONFIG, "config.top_k", "greater than or equal to 1"),
    "no room": Fault(17, lambda s: s.check(max_generation_tokens=CONTEXT), CONFIG, "config.max_generation_tokens", f"context of {CONTEXT} tokens"),
    "nothing to learn": Fault(20, lambda s: s.check(kl_weight=0.0, ce_weight=0.0), CONFIG, "config.kl_weight", "raise one of them"),
    "too large for the wire": Fault(20, lambda s: s.check(warmup_steps=2**40), CONFIG, "config.warmup_steps", "less than or equal to"),
    "unknown field": Fault(4, lambda s: s.check(bach_size=2), CONFIG, "config.bach_size", "did you mean batch_size?"),
    "wrong type": Fault(20, lambda s: s.check(batch_size="four"), CONFIG, "config.batch_size", "valid integer"),
    "unknown option": Fault(20, lambda s: s.check(trainer_options={"x": math.nan}), CONFIG, "config.trainer_options.x", "no such option"),
    "unknown trainer": Fault(23, lambda s: s.check(trainer="magic"), CONFIG, "config.trainer", "there are: dataset, mixed, offline, on_policy, sft"),
    "unknown preset": Fault(23, lambda s: s.client.create_run(s.values(), preset="turbo"), CONFIG, "preset", "there are fast, memory, quality"),
    "path as a name": Fault(23, lambda s: s.check(run_id="../x"), CONFIG, "config.run_id", "letters, digits"),
    "output below a file": Fault(24, lambda s: s.check(output_adapter_path=f"{s.folder}/rows.jsonl/out"), CONFIG, "config.output_adapter_path", "is a file, not a folder; choose another"),
    "output name too long": Fault(23, lambda s: s.check(output_adapter_path=f"{s.folder}/" + 300 * "n"), CONFIG, "config.output_adapter_path", "choose another folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_and_the_daemon_serves_on(stage: Stage, name: str) -> None:
    check(stage, FAULTS[name])


def test_all_faults_are_told_at_once(stage: Stage) -> None:
    faulty = {"batch_size": 0, "learning_rate": -1.0, "temperature": math.nan}
    error = refusal(lambda: stage.check(**faulty))
    assert [violation.field for violation in error.violations] == [f"config.{name}" for name in sorted(faulty)]

    more = {
        **faulty,
        "run_id": "../x",
        "trainer": "magic",
        "base_model_path": "/nope",
        "prompts_path": "/nope.jsonl",
        "output_adapter_path": "/dev/null/x",
    }
    error = refusal(lambda: stage.check(**more))
    assert sorted(violation.field for violation in error.violations) == sorted(f"config.{name}" for name in more)


def test_a_missing_field_hides_no_other_fault(stage: Stage) -> None:
    config = run_pb2.RunConfig(teacher_model_path="/nope", kl_weight=0.0, ce_weight=0.0)
    error = refusal(lambda: stage.runs.CreateRun(run_pb2.CreateRunRequest(config=config)))
    told = {violation.field: violation.description for violation in error.violations}
    assert sorted(told) == [
        f"config.{n}" for n in ("base_model_path", "kl_weight", "prompts_path", "teacher_model_path")
    ]
    assert told["config.base_model_path"] == "missing; every run needs it"


def test_more_faults_than_a_header_holds_still_arrive(stage: Stage) -> None:
    options = {f"option_{number:03}" + "é" * 150: 1 for number in range(60)}
    for _ in range(5):  # gRPC drops headers between its two limits at random
        error = refusal(lambda: stage.check(trainer_options=options))
        assert error.reason is Reason.INVALID_RUN_CONFIG
        assert "more faults are not shown" in error.violations[-1].description


def opd(stage: Stage, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OPD_HOME": str(stage.daemon.home.root)}
    command = [sys.executable, "-m", "opd_daemon.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment, stdin=subprocess.DEVNULL, check=False
    )


def test_a_second_daemon_names_the_first(stage: Stage) -> None:
    done = opd(stage, "serve")
    pid = stage.daemon.process.pid
    assert done.returncode == 1
    assert f"a daemon already serves {stage.daemon.home.root} (pid {pid})" in done.stderr
    assert done.stderr.count("\n") == 1
    assert stage.client.teacher()[0] == "READY"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("bach_size: 2", ":4: bach_size: no such field; did you mean batch_size?"),
        ("batch_size: 0", ":4: batch_size: 0: input should be greater than or equal to 1"),
        ("temperature: .nan", ":4: temperature: nan: input should be a finite number"),
        ("1: 2", ": 1 is no name of a field"),
        ("batch_size: [", ":6: expected ',' or ']'"),
        ("output_adapter_path: rows.jsonl/x", ":4: output_adapter_path: "),
        ("base_model_path: ~no_such_user/x", ":4: base_model_path: "),
    ],
)
def test_faults_of_a_file_come_with_their_line(stage: Stage, line: str, told: str) -> None:
    file = stage.folder / "run.yaml"
    file.write_text(f"teacher_model_path: teacher\nprompts_path: rows.jsonl\nmax_generation_tokens: 8\n{line}\n")
    if not line.startswith("base_model_path"):
        file.write_text(file.read_text() + "base_model_path: student\n")
    done = opd(stage, "distill", str(file), "--check")
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.startswith(f"opd: {file}")
    assert done.stderr.count("\n") == 1
    assert stage.client.teacher()[0] == "READY"


NO_NAMES = [
    "..",
    "a/b",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    10_000 * "a",
    "😀",
    "\u202etxt",
    " ",
    ".hidden",
    "a..b",
    "-x",
    "a\\b",
]


@pytest.mark.parametrize("name", NO_NAMES, ids=range(len(NO_NAMES)))
@pytest.mark.parametrize("field", ["run_id", "session_id"])
def test_a_name_that_is_no_name_is_refused(stage: Stage, field: str, name: str) -> None:
    error = refusal(lambda: stage.check(**{field: name}))
    assert [violation.field for violation in error.violations] == [f"config.{field}"]
    assert "letters, digits" in error.violations[0].description
    assert len(error.violations[0].description) < 200
