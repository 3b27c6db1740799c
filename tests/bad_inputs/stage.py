"""A real daemon with a tiny teacher, files good and bad, and the shape of a row: what is sent, what must come back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import psutil
import pytest

from opd_daemon.client import Client
from opd_daemon.errors import Code, OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.types import GenerateRequest, ScoreRequest, ScoreWants
from opd_daemon.v1 import run_pb2, teacher_pb2
from opd_daemon.v1.run_pb2_grpc import RunServiceStub
from opd_daemon.v1.teacher_pb2_grpc import TeacherServiceStub
from opd_daemon.wire.errors import from_rpc_error
from tests.e2e.conftest import DaemonProcess
from tests.e2e.test_main_job import configuration
from tests.tiny import write_tiny_qwen2

VOCABULARY, CONTEXT = 403, 512
OK_ROWS = b"".join(json.dumps({"prompt": f"Tell me about number {number}."}).encode() + b"\n" for number in range(24))


class Outcome(NamedTuple):
    """What a refusal says to programs."""

    code: Code
    reason: Reason


CONFIG = Outcome(Code.INVALID_ARGUMENT, Reason.INVALID_RUN_CONFIG)
REQUEST = Outcome(Code.INVALID_ARGUMENT, Reason.INVALID_REQUEST)
MALFORMED = Outcome(Code.INVALID_ARGUMENT, Reason.MALFORMED_MESSAGE)
PAGE = Outcome(Code.INVALID_ARGUMENT, Reason.INVALID_PAGE_TOKEN)
NO_MODEL = Outcome(Code.NOT_FOUND, Reason.MODEL_NOT_FOUND)
IN_FUTURE = Outcome(Code.OUT_OF_RANGE, Reason.REVISION_IN_FUTURE)
STORE_CHANGED = Outcome(Code.FAILED_PRECONDITION, Reason.STORE_CHANGED)
MISMATCH = Outcome(Code.FAILED_PRECONDITION, Reason.TOKENIZER_MISMATCH)
NO_TOKEN = Outcome(Code.UNAUTHENTICATED, Reason.MISSING_TOKEN)
WRONG_TOKEN = Outcome(Code.UNAUTHENTICATED, Reason.WRONG_TOKEN)


class Fault(NamedTuple):
    """A row: its number in the checklist, what is sent, what comes back.

    field: of the only violation, "" when there is none. told: a fragment of the line a person reads.
    """

    number: int
    send: Callable[[Stage], object]
    outcome: Outcome
    field: str
    told: str


@dataclass(frozen=True)
class Stage:
    """One daemon for every row of a table, and a folder of models and files, good and bad."""

    daemon: DaemonProcess
    client: Client
    folder: Path

    @property
    def runs(self) -> RunServiceStub:
        return RunServiceStub(self.client.channel)

    @property
    def teacher(self) -> TeacherServiceStub:
        return TeacherServiceStub(self.client.channel)

    @property
    def token(self) -> str:
        return self.client.connection.endpoint.token

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),)

    @property
    def port(self) -> int:
        return int(json.loads(self.daemon.home.discovery.read_text())["port"])

    @property
    def log(self) -> str:
        return (self.daemon.home.root / "daemon.log").read_text()

    @cached_property
    def process(self) -> psutil.Process:
        return psutil.Process(self.daemon.process.pid)

    def megabytes(self) -> float:
        """Memory of the daemon that is in use."""
        return float(self.process.memory_info().rss) / 1e6

    def values(self, **changes: Any) -> dict[str, Any]:
        files = (self.folder / "teacher", self.folder / "student", self.folder / "rows.jsonl")
        return configuration(*files, **{"run_id": "", **changes})

    def check(self, **changes: Any) -> None:
        # For a named machine, so that this one is not measured for it.
        self.client.create_run(self.values(**changes), validate_only=True, machine="M4 Max 64 GB")

    def create_raw(self, fields: bytes) -> None:
        """Check a run with fields of its configuration that are bytes."""
        known = run_pb2.CreateRunRequest(validate_only=True, machine="M4 Max 64 GB").SerializeToString()
        config = self.values()
        del config["trainer"]
        config["lora"] = run_pb2.LoraConfig(rank=4)
        data = run_pb2.RunConfig(**config).SerializeToString() + fields
        self.raw_call("RunService/CreateRun", known + b"\x12" + encoded_size(len(data)) + data)

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

    def pipe(self) -> Path:
        path = self.folder / "pipe"
        if not path.exists():
            os.mkfifo(path)
        return path

    def score(self, *ids: int, wants: ScoreWants | None = None, **changes: Any) -> None:
        request = ScoreRequest(np.asarray(ids, np.int32), 1, wants or ScoreWants(token_stats=True), **changes)
        self.client.score([request])

    def score_raw(self, data: bytes, *, sequence: dict[str, Any] | None = None, **outputs: Any) -> None:
        tokens = teacher_pb2.TokenInput(token_ids=teacher_pb2.TokenIds(ids=data))
        sequences = [teacher_pb2.ScoredSequence(tokens=tokens, **(sequence or {}))]
        request = teacher_pb2.ComputeLogprobsRequest(sequences=sequences, outputs=teacher_pb2.LogprobOutputs(**outputs))
        list(self.teacher.ComputeLogprobs(request))

    def score_many(self, count: int) -> None:
        sequence = teacher_pb2.ScoredSequence(
            tokens=teacher_pb2.TokenInput(token_ids=teacher_pb2.TokenIds(ids=bytes(8)))
        )
        outputs = teacher_pb2.LogprobOutputs(token_stats=True)
        list(
            self.teacher.ComputeLogprobs(
                teacher_pb2.ComputeLogprobsRequest(sequences=count * [sequence], outputs=outputs)
            )
        )

    def score_expecting(self, tokenizer: str) -> None:
        list(self.teacher.ComputeLogprobs(teacher_pb2.ComputeLogprobsRequest(expected_tokenizer_digest=tokenizer)))

    def tokenize(self, **tokens: Any) -> None:
        self.teacher.Tokenize(teacher_pb2.TokenizeRequest(tokens=teacher_pb2.TokenInput(**tokens)))

    def prune(self, size: int) -> None:
        self.teacher.PruneCache(teacher_pb2.PruneCacheRequest(max_bytes=size))

    def generate(self, *ids: int, max_tokens: int = 4, **changes: Any) -> None:
        self.client.generate([GenerateRequest(ids, max_tokens, **changes)])

    def watch(self, **request: Any) -> None:
        with closing_call(self.runs.WatchEvents(run_pb2.WatchEventsRequest(**request))) as call:
            next(iter(call))

    def raw_call(self, method: str, data: bytes, token: str | None = "", **options: Any) -> list[bytes]:
        """One call without stubs; `token` None sends none, "" the right one."""
        metadata = () if token is None else (("authorization", f"Bearer {token or self.token}"),)
        unlimited = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(self.client.connection.endpoint.address, options=unlimited) as channel:
            call: Any = channel.unary_stream(f"/opd_daemon.v1.{method}")
            return list(call(data, metadata=options.pop("metadata", metadata), timeout=30, **options))

    def serves(self) -> bool:
        """Whether the daemon answers as if nothing had been."""
        return self.daemon.process.poll() is None and self.client.teacher()[0] == "READY"


def encoded_size(size: int) -> bytes:
    """A length as it stands before a field's bytes."""
    encoded = b""
    while size > 127:
        encoded, size = encoded + bytes([size & 127 | 128]), size >> 7
    return encoded + bytes([size])


@contextmanager
def closing_call(call: Any) -> Iterator[Any]:
    """A streaming call that is cancelled in the end."""
    try:
        yield call
    finally:
        call.cancel()


@contextmanager
def raised(folder: Path, furnish: Callable[[Home], None] = lambda _: None) -> Iterator[Stage]:
    """A stage in `folder`, its teacher loaded; `furnish` puts things into the home before the daemon starts."""
    write_tiny_qwen2(folder / "teacher", seed=1, layers=3)
    write_tiny_qwen2(folder / "student", seed=2)
    (folder / "rows.jsonl").write_bytes(OK_ROWS)
    home = Home(folder / "home")
    home.root.mkdir()
    furnish(home)
    process = DaemonProcess(home)
    try:
        with process.client() as client:
            for _ in client.load_teacher(str(folder / "teacher")):
                pass
            yield Stage(process, client, folder)
        assert process.stop() == 0
    finally:
        if process.process.poll() is None:
            process.kill()


def refusal(wrong: Callable[[], object]) -> OpdError:
    """The error with which something is refused; its code on the wire is the one of the map."""
    try:
        wrong()
    except OpdError as fault:
        error, sent = fault, fault.__context__
    except grpc.RpcError as fault:
        error, sent = from_rpc_error(fault), fault
    else:
        pytest.fail("it was accepted")
    # What gRPC itself refuses comes without a reason, so the client can only guess one.
    assert not isinstance(sent, grpc.Call) or sent.code().name == error.metadata.get("grpc_code", error.code)
    return error


def check(stage: Stage, fault: Fault) -> None:
    """Send a row's fault: it is refused as the row says, in one line, and the daemon serves on."""
    error = refusal(lambda: fault.send(stage))
    assert (error.code, error.reason) == fault.outcome, error
    assert [violation.field for violation in error.violations] == ([fault.field] if fault.field else [])
    told = error.violations[0].description if fault.field else error.message
    assert fault.told in told
    assert "\n" not in told
    assert stage.serves()
