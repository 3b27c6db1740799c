"""Bytes, frames and connections that are no good: refused by the protocol or by us, and the daemon serves on."""

# One row per fault reads best as a table.
# ruff: noqa: E501
from __future__ import annotations

import gzip
import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import pytest

from opd_daemon.errors import Code, Reason
from opd_daemon.v1 import run_pb2
from opd_daemon.wire.errors import from_rpc_error
from tests.bad_inputs import frames
from tests.bad_inputs.soak import SOAK, soak_only
from tests.bad_inputs.stage import (
    MALFORMED,
    NO_TOKEN,
    REQUEST,
    WRONG_TOKEN,
    Fault,
    Stage,
    check,
    closing_call,
    raised,
    refusal,
)

GET_RUN = "RunService/GetRun"
DEADLINE_EXCEEDED, UNIMPLEMENTED = 4, 12
HUGE = 65 << 20
CONNECTIONS = 10_000 if SOAK else 300
IDLE = 800
WITHIN = 100.0  # MB that memory may grow by

FAULTS: dict[str, Fault] = {
    "no message": Fault(1, lambda s: s.raw_call(GET_RUN, b"\xff\xff"), MALFORMED, "GetRunRequest", "doesn't end; send the whole message"),
    "cut off": Fault(1, lambda s: s.raw_call("TeacherService/ComputeLogprobs", b"\x0a\x7f"), MALFORMED, "sequences", "of 127 bytes 0 are there"),
    "not UTF-8": Fault(2, lambda s: s.raw_call(GET_RUN, b"\x0a\x02\xff\xfe"), MALFORMED, "run_id", "byte 0 of 2 is not UTF-8"),
    "deep not UTF-8": Fault(2, lambda s: s.raw_call("RunService/CreateRun", b"\x12\x04\x1a\x02a\xff"), MALFORMED, "config.trainer", "byte 1 of 2 is not UTF-8"),
    "wrong wire type": Fault(4, lambda s: s.raw_call(GET_RUN, b"\x08\x05"), REQUEST, "run_id", "empty: name a run"),
    "no token": Fault(73, lambda s: s.raw_call("RunService/ListRuns", b"", None), NO_TOKEN, "", "authorization: Bearer"),
    "wrong token": Fault(73, lambda s: s.raw_call("RunService/ListRuns", b"", "guess"), WRONG_TOKEN, "", "discovery file"),
}  # fmt: skip

# What is sent on a connection of its own, for GetRun; the gRPC status, or None for a closed connection.
RAW: dict[str, tuple[int, bytes, tuple[tuple[str, str | bytes], ...], int | None]] = {
    "length too short": (1, frames.message(b"\x0a\x01x", length=1), (), 3),
    "length of 4 GB": (5, frames.message(b"\x0a\x01x", length=2**32 - 1), (), 8),
    "compressed by nothing": (16, frames.message(b"\x0a\x01x", compressed=1), (), 13),
    "compressed garbage": (16, frames.message(b"\x0a\x01x", compressed=1), (("grpc-encoding", "gzip"),), 13),
    "unknown compression": (16, frames.message(b"\x0a\x01x", compressed=1), (("grpc-encoding", "brotli"),), 13),
    "two messages": (1, 2 * frames.message(b"\x0a\x01x"), (), 5),
    "no deadline": (13, frames.message(b"\x0a\x01x"), (("grpc-timeout", "soon"),), 13),
    "name of bytes": (1, frames.message(b"\x0a\x01x"), (("opd-client", b"\xff\xfe"),), 5),
}  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with raised(tmp_path_factory.mktemp("wire")) as built:
        yield built


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_and_the_daemon_serves_on(stage: Stage, name: str) -> None:
    check(stage, FAULTS[name])


@pytest.mark.parametrize("name", RAW)
def test_a_call_by_hand_gets_the_status_of_the_protocol(stage: Stage, name: str) -> None:
    _, body, headers, expected = RAW[name]
    received = frames.answer(stage.port, frames.call(f"/opd_daemon.v1.{GET_RUN}", stage.token, body, headers))
    assert frames.status(received) == expected
    assert stage.serves()


def test_a_call_whose_message_comes_after_its_deadline_is_past_it(stage: Stage) -> None:
    """Fault 13."""
    whole = frames.call(
        f"/opd_daemon.v1.{GET_RUN}", stage.token, frames.message(b"\x0a\x01x"), (("grpc-timeout", "1n"),)
    )
    # The core counts whole milliseconds, of which the first is long enough to answer in.
    received = frames.answer(stage.port, whole, pause=(len(whole) - 1, 0.1))
    assert frames.status(received) == DEADLINE_EXCEEDED
    assert stage.serves()


@pytest.mark.parametrize("name", ["no message", "no token", "wrong token"])
def test_callers_without_our_stubs_see_the_status_code(stage: Stage, name: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        FAULTS[name].send(stage)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code().name == FAULTS[name].outcome.code


@pytest.mark.parametrize("path", [b"/opd_daemon.v1\xc9/GetRun", b"/\xff", b"", b"/nothing"])
def test_a_path_of_no_method_is_unimplemented_whatever_it_is_made_of(own: Stage, path: bytes) -> None:
    """grpcio's own loop would end with one that is not UTF-8, and every call under way with it."""
    for token in (own.token, "guess"):
        received = frames.answer(own.port, frames.call(path, token, frames.message(b"")))
        assert frames.status(received) == UNIMPLEMENTED
    assert own.serves()


def test_fields_of_a_newer_version_are_no_fault(stage: Stage) -> None:
    assert stage.raw_call("RunService/ListRuns", b"\xf8\x7f\x05\xfa\x7f\x03abc")


def test_a_request_of_5_mb_is_judged_and_one_of_65_mb_is_not_taken(stage: Stage) -> None:
    error = refusal(lambda: stage.client.run("x" * 5_000_000))
    assert error.reason is Reason.RUN_NOT_FOUND
    assert len(error.message) < 1_000
    before = stage.megabytes()
    assert refusal(lambda: stage.raw_call(GET_RUN, bytes(HUGE))).metadata["grpc_code"] == Code.RESOURCE_EXHAUSTED
    assert stage.megabytes() - before < WITHIN
    assert stage.serves()


def test_metadata_of_200_kb_is_not_taken(stage: Stage) -> None:
    headers = (*stage.headers, ("x", 200_000 * "a"))
    error = refusal(lambda: stage.raw_call(GET_RUN, b"", metadata=headers))
    assert error.metadata["grpc_code"] == Code.RESOURCE_EXHAUSTED
    assert stage.serves()


@pytest.mark.parametrize("method", ["RunService/Explode", "NoService/GetRun", "RunService/", "../RunService/GetRun"])
def test_an_unknown_method_is_unimplemented(stage: Stage, method: str) -> None:
    assert refusal(lambda: stage.raw_call(method, b"")).reason is Reason.NOT_IMPLEMENTED
    assert stage.serves()


def test_a_gzip_bomb_is_not_unpacked_beyond_the_limit(stage: Stage) -> None:
    before = stage.megabytes()
    error = refusal(lambda: stage.raw_call(GET_RUN, bytes(256 << 20), compression=grpc.Compression.Gzip))
    assert error.metadata["grpc_code"] == Code.RESOURCE_EXHAUSTED
    assert stage.megabytes() - before < WITHIN
    assert stage.serves()


def garbage(number: int) -> bytes:
    """What other programs say to a port, and noise."""
    noise = random.Random(number)
    choices = [
        b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"POST /opd_daemon.v1.RunService/ListRuns HTTP/1.1\r\nContent-Length: 4\r\n\r\n",
        bytes.fromhex("16030100a5010000a10303") + noise.randbytes(160),
        noise.randbytes(noise.randrange(1, 2000)),
        frames.PREFACE + noise.randbytes(noise.randrange(1, 500)),
        frames.PREFACE
        + frames.frame(noise.randrange(256), noise.randrange(256), noise.randrange(8), noise.randbytes(40)),
        frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, noise.randbytes(60)),
        frames.PREFACE + frames.frame(frames.HEADERS, 4, 1, noise.randbytes(50), length=noise.randrange(1 << 24)),
    ]
    return choices[number % len(choices)]


def test_whatever_is_said_to_the_port_the_daemon_serves_on(stage: Stage) -> None:
    before = stage.megabytes()
    for number in range(CONNECTIONS):
        with frames.connected(stage.port) as connection:
            connection.sendall(garbage(number))
            if number % 10 == 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes by a reset
    assert stage.megabytes() - before < WITHIN
    assert stage.serves()


def test_idle_connections_cost_nobody_anything(stage: Stage) -> None:
    with ExitStack() as open_connections:
        for number in range(IDLE):
            connection = open_connections.enter_context(frames.connected(stage.port))
            connection.sendall(frames.PREFACE[: number % 25])
        assert stage.serves()
        began = time.monotonic()
        stage.client.runs()
        assert time.monotonic() - began < 5


@soak_only
def test_a_half_open_client_is_gone_within_keepalive(stage: Stage) -> None:
    watch = frames.call("/opd_daemon.v1.RunService/WatchEvents", stage.token, frames.message(b""))
    began = time.monotonic()
    with frames.connected(stage.port, 120) as connection:
        connection.sendall(watch)
        received = connection.recv(65536)
        # Who leaves the settings without an answer is dropped for that; this one only leaves pings without one.
        connection.sendall(frames.frame(frames.SETTINGS, frames.ACKNOWLEDGED, 0))
        while piece := connection.recv(65536):
            received += piece
    assert time.monotonic() - began < 100
    assert frames.frame(frames.PING, 0, 0)[3:] in received
    assert stage.serves()


def test_a_reset_in_the_middle_of_a_stream_ends_it(stage: Stage) -> None:
    path = "/opd_daemon.v1.RunService/WatchEvents"
    with frames.connected(stage.port) as connection:
        head = frames.frame(frames.HEADERS, frames.END_HEADERS, 1, frames.request_headers(path, stage.token))
        body = frames.frame(frames.DATA, frames.END_STREAM, 1, frames.message(b""))
        connection.sendall(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0) + head + body)
        assert connection.recv(65536)
        connection.sendall(frames.frame(frames.RESET, 0, 1, b"\0\0\0\x08"))
        connection.sendall(frames.frame(frames.PING, 0, 0, b"12345678"))
        received = b""
        while b"12345678" not in received:
            received += connection.recv(65536)
    assert stage.serves()


def test_no_error_text_speaks_of_our_insides(stage: Stage) -> None:
    for name, fault in FAULTS.items():
        error = refusal(lambda fault=fault: fault.send(stage))  # type: ignore[misc]
        assert not any(word in str(error) for word in ("Traceback", "opd_daemon/", ".py", "<class")), name


def test_gzip_itself_is_no_fault(stage: Stage) -> None:
    body = frames.message(gzip.compress(b"\x0a\x01x"), compressed=1)
    data = frames.call(f"/opd_daemon.v1.{GET_RUN}", stage.token, body, [("grpc-encoding", "gzip")])
    assert frames.status(frames.answer(stage.port, data)) == 5


def test_a_watch_that_is_left_costs_nothing_after(stage: Stage) -> None:
    for _ in range(50):
        with closing_call(stage.runs.WatchEvents(run_pb2.WatchEventsRequest())) as call:
            next(iter(call))
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(call))
        assert from_rpc_error(caught.value).reason is Reason.CANCELLED
    assert stage.serves()
