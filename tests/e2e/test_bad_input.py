"""Whatever a person or program sends wrongly: the fault is named with its cure, and the daemon serves on."""

# One row per fault reads best as a table.
# ruff: noqa: E501
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from opd_daemon.client import Client
from opd_daemon.errors import Code, OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.types import GenerateRequest, RunState, ScoreRequest, ScoreWants
from opd_daemon.v1 import run_pb2, teacher_pb2
from opd_daemon.v1.run_pb2_grpc import RunServiceStub
from opd_daemon.v1.teacher_pb2_grpc import TeacherServiceStub
from opd_daemon.wire.errors import from_rpc_error
from tests.e2e.conftest import DaemonProcess
from tests.e2e.test_main_job import configuration, wait_for
from tests.tiny import write_tiny_qwen2

VOCABULARY, CONTEXT = 403, 512
OK_ROWS = b"".join(json.dumps({"prompt": f"Tell me about number {number}."}).encode() + b"\n" for number in range(24))


@dataclass(frozen=True)
class Stage:
    """One daemon for every row of the tables, and a folder of models and files, good and bad."""

    daemon: DaemonProcess
    client: Client
    folder: Path

    @property
    def runs(self) -> RunServiceStub:
        return RunServiceStub(self.client.channel)

    @property
    def teacher(self) -> TeacherServiceStub:
        return TeacherServiceStub(self.client.channel)

    def values(self, **changes: Any) -> dict[str, Any]:
        files = (self.folder / "teacher", self.folder / "student", self.folder / "rows.jsonl")
        return configuration(*files, **{"run_id": "", **changes})

    def check(self, **changes: Any) -> None:
        self.client.create_run(self.values(**changes), validate_only=True)

    def check_model(self, name: str, file: str, content: str) -> None:
        """Check a run whose student is a good folder with one bad file."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for entry in (self.folder / "student").iterdir():
            (folder / entry.name).write_bytes(entry.read_bytes())
        (folder / file).write_text(content)
        self.check(base_model_path=str(folder))

    def check_rows(self, content: bytes) -> None:
        path = self.folder / "faulty.jsonl"
        path.write_bytes(content)
        self.check(prompts_path=str(path))

    def score(self, *ids: int, wants: ScoreWants | None = None, **changes: Any) -> None:
        request = ScoreRequest(np.asarray(ids, np.int32), 1, wants or ScoreWants(token_stats=True), **changes)
        self.client.score([request])

    def score_raw(self, data: bytes, **outputs: Any) -> None:
        tokens = teacher_pb2.TokenInput(token_ids=teacher_pb2.TokenIds(ids=data))
        sequences = [teacher_pb2.ScoredSequence(tokens=tokens)]
        request = teacher_pb2.ComputeLogprobsRequest(sequences=sequences, outputs=teacher_pb2.LogprobOutputs(**outputs))
        list(self.teacher.ComputeLogprobs(request))

    def generate(self, *ids: int, max_tokens: int = 4, **changes: Any) -> None:
        self.client.generate([GenerateRequest(ids, max_tokens, **changes)])

    def watch(self, **request: Any) -> None:
        next(iter(self.runs.WatchEvents(run_pb2.WatchEventsRequest(**request))))

    def raw_channel(self, method: str, data: bytes, token: str | None) -> None:
        """One call without stubs; `token` None sends none."""
        metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        with grpc.insecure_channel(self.client.connection.endpoint.address) as channel:
            call: Any = channel.unary_stream(f"/opd_daemon.v1.{method}")
            list(call(data, metadata=metadata, timeout=10))

    @property
    def token(self) -> str:
        return self.client.connection.endpoint.token


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("bad_input")
    write_tiny_qwen2(folder / "teacher", seed=1, layers=3)
    write_tiny_qwen2(folder / "student", seed=2)
    write_tiny_qwen2(folder / "shuffled", seed=3, shuffled_vocab=True)
    write_tiny_qwen2(folder / "superset", seed=4, extra_tokens=("<tool>", "</tool>"))
    write_tiny_qwen2(folder / "padded", seed=5, vocab=1024)
    (folder / "no_model").mkdir()
    (folder / "rows.jsonl").write_bytes(OK_ROWS)
    home = Home(folder / "home")
    home.root.mkdir()
    process = DaemonProcess(home)
    with process.client() as client:
        for _ in client.load_teacher(str(folder / "teacher")):
            pass
        yield Stage(process, client, folder)
    process.stop()


def refusal(wrong: Callable[[], object]) -> OpdError:
    try:
        wrong()
    except OpdError as error:
        return error
    except grpc.RpcError as error:
        return from_rpc_error(error)
    pytest.fail("it was accepted")


Row = tuple[Callable[[Stage], object], Reason, str, str]
CONFIG, REQUEST, PAGE = Reason.INVALID_RUN_CONFIG, Reason.INVALID_REQUEST, Reason.INVALID_PAGE_TOKEN

# What is sent; the reason; the field ("" for none); a fragment of the line a person reads.
FAULTS: dict[str, Row] = {
    # Models
    "no folder": (lambda s: s.check(base_model_path=f"{s.folder}/nope"), CONFIG, "config.base_model_path", "/nope: no such folder; give"),
    "no teacher": (lambda s: s.check(teacher_model_path=f"{s.folder}/nope"), CONFIG, "config.teacher_model_path", "no such folder; give"),
    "no model": (lambda s: s.check(base_model_path=f"{s.folder}/no_model"), CONFIG, "config.base_model_path", "no config.json"),
    "unknown ~user": (lambda s: s.check(base_model_path="~no_such_user/x"), CONFIG, "config.base_model_path", "no such folder"),
    "long name": (lambda s: s.check(base_model_path=f"{s.folder}/" + 300 * "n"), CONFIG, "config.base_model_path", "no such folder"),
    "control character": (lambda s: s.check(prompts_path="/a\0b"), CONFIG, "config.prompts_path", "control character"),
    "broken config": (lambda s: s.check_model("m1", "config.json", "{"), CONFIG, "config.base_model_path", "not valid JSON"),
    "deep config": (lambda s: s.check_model("m2", "config.json", 99_999 * "["), CONFIG, "config.base_model_path", "not valid JSON"),
    "broken tokenizer": (lambda s: s.check_model("m3", "tokenizer.json", '{"model": {"vocab": "x"}}'), CONFIG, "config.base_model_path", "tokenizer.json is broken"),
    "no adapter": (lambda s: s.check(student_adapter_path=f"{s.folder}/no_model"), CONFIG, "config.student_adapter_path", "adapter_config.json: no such file"),
    "other tokenizer": (lambda s: s.check(teacher_model_path=f"{s.folder}/shuffled"), CONFIG, "config.teacher_model_path", "id 0 is 'Ď' / '!'"),
    "load nothing": (lambda s: list(s.client.load_teacher("")), REQUEST, "model_path", "name a model folder"),
    "load no folder": (lambda s: list(s.client.load_teacher(f"{s.folder}/nope")), Reason.MODEL_NOT_FOUND, "", "/nope'; give a folder"),
    "load no model": (lambda s: list(s.client.load_teacher(f"{s.folder}/no_model")), Reason.MODEL_NOT_FOUND, "", "no config.json; give"),
    "load long name": (lambda s: list(s.client.load_teacher(f"{s.folder}/" + 300 * "n")), Reason.MODEL_NOT_FOUND, "", "give a folder"),
    # Rows
    "broken line": (lambda s: s.check_rows(b'{"prompt": "a"}\n{"prompt": "b"\n'), CONFIG, "config.prompts_path", "faulty.jsonl:2: not JSON"),
    "no rows": (lambda s: s.check_rows(b""), CONFIG, "config.prompts_path", "holds no rows; give"),
    "wrong keys": (lambda s: s.check_rows(OK_ROWS + b'{"question": "a"}\n'), CONFIG, "config.prompts_path", 'faulty.jsonl:25: has "question"; give {"prompt"}'),
    "not UTF-8": (lambda s: s.check_rows(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n'), CONFIG, "config.prompts_path", "faulty.jsonl:2: not UTF-8"),
    "endless number": (lambda s: s.check_rows(OK_ROWS + b'{"prompt": ' + 5000 * b"1" + b"}\n"), CONFIG, "config.prompts_path", "faulty.jsonl:25: not a row"),
    "no file": (lambda s: s.check(prompts_path=f"{s.folder}/nope.jsonl"), CONFIG, "config.prompts_path", "/nope.jsonl: no such file"),
    "no prompts": (lambda s: s.check(prompts_path=""), CONFIG, "config.prompts_path", "give a JSONL file"),
    # Values
    "batch 0": (lambda s: s.check(batch_size=0), CONFIG, "config.batch_size", "0: input should be greater than or equal to 1"),
    "negative rate": (lambda s: s.check(learning_rate=-1e-5), CONFIG, "config.learning_rate", "-1e-05: input should be greater than 0"),
    "NaN": (lambda s: s.check(temperature=math.nan), CONFIG, "config.temperature", "nan: input should be a finite number"),
    "too many ids": (lambda s: s.check(top_k=1000), CONFIG, "config.top_k", f"the vocabulary has {VOCABULARY} ids"),
    "no ids": (lambda s: s.check(top_k=0), CONFIG, "config.top_k", "greater than or equal to 1"),
    "no room": (lambda s: s.check(max_generation_tokens=CONTEXT), CONFIG, "config.max_generation_tokens", f"context of {CONTEXT} tokens"),
    "nothing to learn": (lambda s: s.check(kl_weight=0.0, ce_weight=0.0), CONFIG, "config.kl_weight", "raise one of them"),
    "too large for the wire": (lambda s: s.check(warmup_steps=2**40), CONFIG, "config.warmup_steps", "less than or equal to"),
    "unknown field": (lambda s: s.check(bach_size=2), CONFIG, "config.bach_size", "did you mean batch_size?"),
    "wrong type": (lambda s: s.check(batch_size="four"), CONFIG, "config.batch_size", "valid integer"),
    "unknown option": (lambda s: s.check(trainer_options={"x": math.nan}), CONFIG, "config.trainer_options.x", "no such option"),
    "unknown trainer": (lambda s: s.check(trainer="magic"), CONFIG, "config.trainer", "there are: dataset, mixed, offline, on_policy, sft"),
    "unknown preset": (lambda s: s.client.create_run(s.values(), preset="turbo"), CONFIG, "preset", "there are fast, memory, quality"),
    "path as a name": (lambda s: s.check(run_id="../x"), CONFIG, "config.run_id", "letters, digits"),
    "output below a file": (lambda s: s.check(output_adapter_path=f"{s.folder}/rows.jsonl/out"), CONFIG, "config.output_adapter_path", "is a file, not a folder; choose another"),
    "output name too long": (lambda s: s.check(output_adapter_path=f"{s.folder}/" + 300 * "n"), CONFIG, "config.output_adapter_path", "choose another folder"),
    # Scores and completions
    "id of no token": (lambda s: s.score(1, VOCABULARY), REQUEST, "sequences[0].tokens.token_ids", f"id {VOCABULARY} at place 1 is no token"),
    "negative id": (lambda s: s.score(1, -1), REQUEST, "sequences[0].tokens.token_ids", "id -1 at place 1 is no token"),
    "empty sequence": (lambda s: s.score(), REQUEST, "sequences[0].tokens.token_ids", "0 tokens; a token to score needs one before it"),
    "too long": (lambda s: s.score(*[1] * (CONTEXT + 1)), REQUEST, "sequences[0].tokens.token_ids", f"{CONTEXT + 1} tokens; teacher takes at most {CONTEXT}"),
    "top_k 0": (lambda s: s.score_raw(bytes(8), top_k=0), REQUEST, "outputs.top_k", "use 1 or more"),
    "top_k too large": (lambda s: s.score(1, 2, wants=ScoreWants(top_k=VOCABULARY + 1)), REQUEST, "outputs.top_k", f"between 1 and {VOCABULARY}"),
    "half an id": (lambda s: s.score_raw(bytes(7)), REQUEST, "sequences[0].tokens.token_ids", "7 bytes"),
    "temperature of log Z": (lambda s: s.score(1, 2, wants=ScoreWants(log_z_temperatures=(math.nan,))), REQUEST, "outputs.log_z_temperatures", "positive number"),
    "candidate of no token": (lambda s: s.score(1, 2, candidate_ids=np.array([[VOCABULARY]], np.int32)), REQUEST, "sequences[0].candidate_ids", f"id {VOCABULARY}"),
    "text of no token": (lambda s: s.client.detokenize([-1]), REQUEST, "tokens.token_ids", "id -1 at place 0 is no token"),
    "empty prompt": (lambda s: s.generate(), REQUEST, "prompts[0].tokens.token_ids", "at least one token"),
    "prompt of no token": (lambda s: s.generate(VOCABULARY), REQUEST, "prompts[0].tokens.token_ids", "is no token"),
    "no room to answer": (lambda s: s.generate(1, max_tokens=CONTEXT), REQUEST, "prompts[0].max_tokens", f"at most {CONTEXT} together"),
    "NaN for sampling": (lambda s: s.generate(1, temperature=math.nan), REQUEST, "prompts[0].temperature", "0 (greedy) or positive"),
    # Pages and cursors
    "page of nobody": (lambda s: s.runs.ListRuns(run_pb2.ListRunsRequest(page_token="x")), PAGE, "page_token", "not a token"),
    "endless page": (lambda s: s.runs.ListMetrics(run_pb2.ListMetricsRequest(run_id="x", page_token=30 * "9")), PAGE, "page_token", "not a token"),
    "negative page": (lambda s: s.runs.ListRuns(run_pb2.ListRunsRequest(page_size=-1)), REQUEST, "page_size", "-1 is negative; use 0"),
    "unknown state": (lambda s: s.runs.ListRuns(run_pb2.ListRunsRequest(states=[99])), REQUEST, "states", "99 is no state"),  # type: ignore[list-item]
    "cursor in the future": (lambda s: s.watch(after_revision=2**62), Reason.REVISION_IN_FUTURE, "", "the newest revision is"),
    "negative cursor": (lambda s: s.watch(after_revision=-1), REQUEST, "after_revision", "use 0 for everything kept"),
    "other store": (lambda s: s.watch(expected_store_id="other"), Reason.STORE_CHANGED, "", "not other: start again with after_revision 0"),
    # Who calls, and with what
    "no message": (lambda s: s.raw_channel("RunService/GetRun", b"\xff\xff", s.token), Reason.MALFORMED_MESSAGE, "", "no message of this call's type"),
    "no message to score": (lambda s: s.raw_channel("TeacherService/ComputeLogprobs", b"\x0a\x7f", s.token), Reason.MALFORMED_MESSAGE, "", "no message of this call's type"),
    "no token": (lambda s: s.raw_channel("RunService/ListRuns", b"", None), Reason.MISSING_TOKEN, "", "authorization: Bearer"),
    "wrong token": (lambda s: s.raw_channel("RunService/ListRuns", b"", "guess"), Reason.WRONG_TOKEN, "", "discovery file"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_and_the_daemon_serves_on(stage: Stage, name: str) -> None:
    wrong, reason, field, fragment = FAULTS[name]
    error = refusal(lambda: wrong(stage))
    assert error.reason is reason, error
    assert [violation.field for violation in error.violations] == ([field] if field else [])
    told = error.violations[0].description if field else error.message
    assert fragment in told
    assert "\n" not in told
    assert stage.client.teacher()[0] == "READY"


@pytest.mark.parametrize(
    ("name", "code"),
    [("no message", Code.INVALID_ARGUMENT), ("no token", Code.UNAUTHENTICATED), ("wrong token", Code.UNAUTHENTICATED)],
)
def test_callers_without_our_stubs_see_the_status_code(stage: Stage, name: str, code: Code) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        FAULTS[name][0](stage)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code().name == code


@pytest.mark.parametrize(
    "call", ["GetRun", "StopRun", "ResumeRun", "DeleteRun", "ListMetrics", "ListCheckpoints", "DownloadAdapter", "WatchEvents"]
)  # fmt: skip
@pytest.mark.parametrize("run_id", ["nope", "../nope", "a\0b"])
def test_unknown_runs_are_not_found(stage: Stage, call: str, run_id: str) -> None:
    message = getattr(run_pb2, f"{call}Request")(run_id=run_id)

    def ask() -> None:
        answer = getattr(stage.runs, call)(message)
        if call in ("DownloadAdapter", "WatchEvents"):
            next(iter(answer))

    error = refusal(ask)
    assert error.reason is Reason.RUN_NOT_FOUND
    assert f"no run {run_id!r}" in error.message
    assert stage.client.teacher()[0] == "READY"


@pytest.mark.parametrize(("role", "folder"), [("teacher", "superset"), ("base", "superset"), ("teacher", "padded")])
def test_wider_and_larger_vocabularies_are_no_fault(stage: Stage, role: str, folder: str) -> None:
    stage.check(**{f"{role}_model_path": str(stage.folder / folder)})


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_closed_output_folder_is_refused(stage: Stage) -> None:
    closed = stage.folder / "closed"
    closed.mkdir(mode=0o500)
    error = refusal(lambda: stage.check(output_adapter_path=str(closed / "out")))
    assert [violation.field for violation in error.violations] == ["config.output_adapter_path"]
    assert "choose another place" in error.violations[0].description


def test_stop_twice_and_resume_while_running_are_conflicts(stage: Stage) -> None:
    run, _ = stage.client.create_run(stage.values(num_steps=5000))
    try:
        wait_for(stage.client, run.run_id, lambda run: run.state is RunState.RUNNING and run.step >= 1)
        for wrong in (stage.client.resume, stage.client.delete):
            error = refusal(lambda wrong=wrong: wrong(run.run_id))  # type: ignore[misc]
            assert error.reason is Reason.RUN_STATE_CONFLICT
            assert "is RUNNING and can't be" in error.message
    finally:
        stage.client.stop(run.run_id)
    assert wait_for(stage.client, run.run_id, lambda run: run.state.resting).state is RunState.STOPPED
    error = refusal(lambda: stage.client.stop(run.run_id))
    assert error.reason is Reason.RUN_STATE_CONFLICT
    assert "is STOPPED and has nothing to stop" in error.message
    page = run_pb2.ListMetricsRequest(run_id=run.run_id, page_token=30 * "9")
    assert refusal(lambda: stage.runs.ListMetrics(page)).reason is Reason.INVALID_PAGE_TOKEN


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
