"""Every call of the contract with requests that are a little or very wrong: a reason each time, nothing else happens.

`OPD_SOAK=1` sends 100 000, or `OPD_SOAK_REQUESTS`; the figures are printed. A request that once broke something is kept
in `REGRESSIONS`.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from opd_daemon.errors import OpdError, Reason
from opd_daemon.v1 import run_pb2, teacher_pb2
from tests.bad_inputs import frames
from tests.bad_inputs.mutation import Method, Mutator, methods
from tests.bad_inputs.past import STATES, with_past_runs
from tests.bad_inputs.soak import SOAK, show
from tests.bad_inputs.stage import Stage, raised

SEED = 20261126
REQUESTS = int(os.environ.get("OPD_SOAK_REQUESTS", "100000")) if SOAK else 2_000
FRAMES = 20_000 if SOAK else 150
AT_ONCE = 16
BATCH = 400
LONG = pytest.mark.timeout(7200 if SOAK else 300)
ANSWER_SECONDS = 60
MOST_MESSAGES = 20
WITHIN = 150.0  # MB that memory may grow by
FRAMINGS: list[dict[str, int]] = [
    {},
    *({"length": length} for length in (0, 1, 5, 2**31, 2**32 - 1)),
    *({"compressed": flag} for flag in (1, 2, 255)),
]

INSIDES = re.compile(
    r"Traceback|opd_daemon[/.](?!v1)|site-packages|\.py\b|<class|object at 0x|\b[A-Z]\w+(Error|Exception)\b"
)
ALLOWED = {"OK", "CANCELLED"}
FORBIDDEN = {"UNKNOWN", "INTERNAL", "DEADLINE_EXCEEDED", "DATA_LOSS"}
# grpcio's own client says this, not the daemon, when it still writes while the answer is there already.
LOST_WRITE = "Internal error from Core"
# grpcio's core says this, before anything of ours sees the message.
TOO_LARGE = "SERVER: Received message larger than max"
CALLS = {method.path.rpartition("/")[2]: method for method in methods()}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # a model may be named by its id on the hub
        with raised(tmp_path_factory.mktemp("fuzz"), with_past_runs) as built:
            yield built


def known(stage: Stage) -> dict[str, list[Any]]:
    """Values with which a request gets beyond the first check."""
    models = [str(stage.folder / "teacher"), str(stage.folder / "student")]
    return {
        "run_id": [*STATES, *STATES, "nope", ""],
        "base_model_path": models,
        "teacher_model_path": models,
        "model_path": models,
        "student_adapter_path": [""],
        "output_adapter_path": ["", str(stage.folder / "out")],
        "prompts_path": [str(stage.folder / "rows.jsonl")],
        "validation_prompts_path": ["", str(stage.folder / "rows.jsonl")],
        "expected_teacher_digest": [""],
        "expected_tokenizer_digest": [""],
        "expected_store_id": [""],
        "page_token": ["", "10"],
        "preset": ["", "fast"],
        "divergence": ["reverse_kl", "jsd"],
        "models": ["base", "teacher", "distilled"],
        # Nothing may come of it but an answer: no run, and no measuring of this machine.
        "validate_only": [True],
        "machine": ["M4 Max 64 GB"],
        "ids": [bytes(8), b"\x01\0\0\0\x02\0\0\0\x03\0\0\0\x04\0\0\0"],
        "candidate_ids": [b"", bytes(12)],
        "temperature": [0.0, 1.0],
        "max_tokens": [1, 4],
    }


class Caller:
    """Sends requests to one daemon and counts what comes back."""

    def __init__(self, stage: Stage, channel: grpc.aio.Channel) -> None:
        self._stage = stage
        self._channel = channel
        self._places = asyncio.Semaphore(AT_ONCE)
        self.codes: Counter[str] = Counter()
        self.faults: list[str] = []

    async def send(self, method: Method, requests: list[bytes]) -> None:
        """One call; whatever is wrong with its answer is kept together with the request."""
        async with self._places:
            try:
                await asyncio.wait_for(self._call(method, requests), ANSWER_SECONDS)
                code, words = "OK", ""
            except grpc.aio.AioRpcError as error:
                code, words = error.code().name, _words(error)
                if words == LOST_WRITE:
                    code = "CANCELLED"
            except TimeoutError:
                code, words = "DEADLINE_EXCEEDED", "no answer"
        self.codes[code] += 1
        bare = code not in ALLOWED and not any(reason in words for reason in (*Reason, TOO_LARGE))
        if code in FORBIDDEN or bare or INSIDES.search(words) or str(self._stage.daemon.home.root) in words:
            self.faults.append(f"{method.path} {code} {words[:300]!r}: {[request[:400] for request in requests]}")

    async def _call(self, method: Method, requests: list[bytes]) -> None:
        style = f"{'stream' if method.streams_in else 'unary'}_{'stream' if method.streams_out else 'unary'}"
        sent = iter(requests) if method.streams_in else requests[0]
        call = getattr(self._channel, style)(method.path)(sent, metadata=self._stage.headers)
        if not method.streams_out:
            await call
            return
        endless = method.path.endswith("/WatchEvents")
        try:
            for _ in range(1 if endless else MOST_MESSAGES):
                if await call.read() is grpc.aio.EOF:
                    break
        finally:
            call.cancel()


def _words(error: grpc.aio.AioRpcError) -> str:
    """Everything a refusal says."""
    said = [error.details() or ""]
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
            for detail in status.details:
                for kind in (error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()):
                    said += [str(kind)] if detail.Unpack(kind) else []
    return "\n".join(said)


async def fuzz(stage: Stage, seed: int, count: int) -> Caller:
    """Send `count` requests in batches; after each the daemon must serve, its teacher in place."""
    mutator, calls, source = Mutator(seed, known(stage)), methods(), random.Random(seed)
    async with grpc.aio.insecure_channel(stage.client.connection.endpoint.address) as channel:
        caller = Caller(stage, channel)
        for begin in range(0, count, BATCH):
            async with asyncio.TaskGroup() as group:
                for number in range(begin, min(begin + BATCH, count)):
                    method = calls[number % len(calls)]
                    requests = [mutator.request(method) for _ in range(source.choice((1, 1, 3)))]
                    group.create_task(caller.send(method, requests))
            assert stage.daemon.process.poll() is None, stage.log[-3000:]
            await asyncio.to_thread(put_in_place, stage)
    return caller


def put_in_place(stage: Stage) -> None:
    """Load the teacher again, which some request may have unloaded, and end the runs that others may have made."""
    patiently(lambda: list(stage.client.load_teacher(str(stage.folder / "teacher"), force=True)))
    for run in list(stage.client.runs()):
        if not run.state.resting:
            stage.client.stop(run.run_id)


def patiently(ask: Callable[[], object]) -> None:
    """Ask again while a load that a request has begun is under way."""
    end = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            ask()
        except OpdError as error:
            if error.reason is not Reason.TEACHER_LOADING or time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


@LONG
def test_no_request_breaks_anything(fuzzed: Stage) -> None:
    asyncio.run(fuzz(fuzzed, SEED - 1, BATCH))  # what is loaded late is loaded then
    before, began = fuzzed.megabytes(), time.monotonic()
    caller = asyncio.run(fuzz(fuzzed, SEED, REQUESTS))
    after, seconds = fuzzed.megabytes(), time.monotonic() - began
    told = ", ".join(f"{code} {count}" for code, count in caller.codes.most_common())
    show(f"{REQUESTS} requests in {seconds:.0f} s: {told}; memory {before:.0f} MB, then {after:.0f} MB")
    assert not caller.faults, "\n".join(caller.faults[:10])
    assert "Traceback" not in fuzzed.log, fuzzed.log[-3000:]
    assert after - before < WITHIN
    # Otherwise the requests would be so wrong that nothing behind the first check is ever reached.
    assert caller.codes["OK"] > 0.05 * REQUESTS


@LONG
def test_no_frame_breaks_anything(fuzzed: Stage) -> None:
    mutator, source, calls = Mutator(SEED, known(fuzzed)), random.Random(SEED), methods()
    before, codes = fuzzed.megabytes(), Counter[int | None]()
    for number in range(FRAMES):
        method = calls[number % len(calls)]
        body = frames.message(mutator.request(method), **source.choice(FRAMINGS))
        sent = frames.call(method.path, fuzzed.token, body)
        if number % 3 == 0:
            place = source.randrange(len(frames.PREFACE), len(sent))
            sent = sent[:place] + source.randbytes(source.randint(1, 9)) + sent[place + source.randint(0, 9) :]
        codes[frames.status(frames.answer(fuzzed.port, sent, seconds=0.1))] += 1
    show(f"{FRAMES} connections by hand: statuses {dict(codes)}")
    assert codes[2] == 0, "UNKNOWN"
    put_in_place(fuzzed)
    assert fuzzed.serves()
    assert fuzzed.megabytes() - before < WITHIN


# What was found: the call, the request, and the code it should have had.
REGRESSIONS: dict[str, tuple[str, bytes, str]] = {
    "run without a name": ("GetRun", b"", "INVALID_ARGUMENT"),
    "configuration larger than lists can carry": (
        "CreateRun",
        run_pb2.CreateRunRequest(config=run_pb2.RunConfig(teacher_system_prompt=100_000 * "x")).SerializeToString(),
        "INVALID_ARGUMENT",
    ),
    "more temperatures than anyone needs": (
        "ComputeLogprobs",
        teacher_pb2.ComputeLogprobsRequest(
            sequences=[teacher_pb2.ScoredSequence(tokens={"token_ids": {"ids": bytes(8)}})],
            outputs=teacher_pb2.LogprobOutputs(log_z_temperatures=100_000 * [1.0]),
        ).SerializeToString(),
        "INVALID_ARGUMENT",
    ),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_once_broke_is_refused(fuzzed: Stage, name: str) -> None:
    call, data, code = REGRESSIONS[name]
    put_in_place(fuzzed)

    async def send() -> Caller:
        async with grpc.aio.insecure_channel(fuzzed.client.connection.endpoint.address) as channel:
            caller = Caller(fuzzed, channel)
            await caller.send(CALLS[call], [data])
        return caller

    caller = asyncio.run(send())
    assert not caller.faults
    assert list(caller.codes) == [code]
    assert fuzzed.serves()


def test_one_seed_makes_one_sequence_of_requests() -> None:
    first, second = (Mutator(7, {"run_id": ["x"]}) for _ in range(2))
    for method in methods():
        assert first.request(method) == second.request(method)


def test_every_call_gets_messages_it_can_read_and_messages_it_cannot() -> None:
    for method in methods():
        read = Counter(_readable(method, Mutator(number, {}).request(method)) for number in range(60))
        assert read[True] > 10
        assert read[False] > 2, method.path


def _readable(method: Method, data: bytes) -> bool:
    try:
        GetMessageClass(method.request).FromString(data)
    except DecodeError:
        return False
    return True
