"""Whatever a handler or a caller does, the border answers with a status of the one map, and handlers are closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.rpc import interceptor
from opd_daemon.rpc.access import Gate
from opd_daemon.rpc.interceptor import Border
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.wire.errors import from_rpc_error
from tests.asynchronous import asynchronous, until

TOKEN = "secret"
SERVICE = "opd_daemon.v1.RunService"
HEADERS = (("authorization", f"Bearer {TOKEN}"),)
STYLES = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]

Act = Callable[[], None]


def handler(style: str, act: Act) -> Any:
    """A handler of this style that does `act` once it is called and, where it streams, after its first message."""

    async def unary(request: Any, context: Any) -> pb.GetRunResponse:
        if style.startswith("stream"):
            [message async for message in request]
        act()
        return pb.GetRunResponse()

    async def stream(request: Any, context: Any) -> AsyncIterator[pb.GetRunResponse]:
        if style.startswith("stream"):
            [message async for message in request]
        yield pb.GetRunResponse()
        act()

    make = getattr(grpc, f"{style}_rpc_method_handler")
    return make(
        stream if style.endswith("stream") else unary,
        pb.GetRunRequest.FromString,
        pb.GetRunResponse.SerializeToString,
    )


def new_border() -> Border:
    return Border(Gate(TOKEN, lambda _: None), Home(Path("home")))


@asynccontextmanager
async def serving(border: Border | None = None, socket: Path | None = None, **methods: Any) -> AsyncIterator[str]:
    """The address of a server behind the border with these handlers."""
    server = grpc.aio.server(interceptors=[border or new_border()])
    if socket:
        server.add_insecure_port(f"unix:{socket}")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def refusal(
    address: str, method: str, style: str, data: bytes = b"", headers: tuple[tuple[str, str], ...] = HEADERS
) -> OpdError:
    """One call, read until it fails."""

    def ask() -> None:
        with grpc.insecure_channel(address) as channel:
            call = getattr(channel, style)(f"/{SERVICE}/{method}")
            answer = call(iter([data]) if style.startswith("stream") else data, metadata=headers, timeout=10)
            list(answer if style.endswith("stream") else ())

    try:
        await asyncio.to_thread(ask)
    except grpc.RpcError as error:
        return from_rpc_error(error)
    pytest.fail("it was accepted")


class OddEnd(BaseException):
    """What a plugin might raise."""


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (ValueError("secret path /home/u/x"), Reason.INTERNAL),
        (SystemExit(3), Reason.INTERNAL),
        (OddEnd("secret path /home/u/x"), Reason.INTERNAL),
        (asyncio.CancelledError(), Reason.SHUTTING_DOWN),
        (OpdError(Reason.RUN_NOT_FOUND, "no run 'x'"), Reason.RUN_NOT_FOUND),
    ],
    ids=repr,
)
def test_every_exception_becomes_a_status_without_our_insides(style: str, fault: BaseException, reason: Reason) -> None:
    def act() -> None:
        raise fault

    @asynchronous
    async def scenario() -> None:
        async with serving(Fail=handler(style, act)) as address:
            error = await refusal(address, "Fail", style)
            assert error.reason is reason
            assert not any(word in str(error) for word in ("secret", "Error", "OddEnd", "Exit"))

    scenario()


@pytest.mark.parametrize("style", STYLES)
def test_a_malformed_message_is_refused_by_its_field(style: str) -> None:
    @asynchronous
    async def scenario() -> None:
        async with serving(Get=handler(style, lambda: None)) as address:
            error = await refusal(address, "Get", style, b"\x0a\x02\xff\xfe")
            assert error.reason is Reason.MALFORMED_MESSAGE
            assert [violation.field for violation in error.violations] == ["run_id"]

    # A stream that reads nothing has nothing to refuse.
    if style != "stream_stream":
        scenario()


@pytest.mark.parametrize("style", STYLES)
def test_who_has_no_token_is_answered_before_the_message_is_read(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(interceptor._Call, "_decoded", lambda _, data: decoded.append(data))

    @asynchronous
    async def scenario() -> None:
        async with serving(Get=handler(style, lambda: None)) as address:
            for headers, reason in (((), Reason.MISSING_TOKEN), ((("authorization", "Bearer x"),), Reason.WRONG_TOKEN)):
                error = await refusal(address, "Get", style, bytes(3 << 20), headers)
                assert error.reason is reason

    scenario()
    assert not decoded


@asynchronous
async def test_what_needs_no_token_takes_little_memory() -> None:
    async with serving() as address, grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        watched = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await anext(aiter(watched))).status == health_pb2.HealthCheckResponse.SERVING
        watched.cancel()
        large = health_pb2.HealthCheckRequest(service=3_000_000 * "x")
        for answer in (stub.Check(large), anext(aiter(stub.Watch(large)))):
            with pytest.raises(grpc.aio.AioRpcError, match="send at most 4096") as refused:
                await answer
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@asynchronous
async def test_silent_strangers_hold_up_nobody_but_strangers(tmp_path: Path) -> None:
    border, socket = new_border(), tmp_path / "s"
    over = asyncio.Event()

    async def nothing() -> AsyncIterator[bytes]:
        await over.wait()
        yield b""

    async def full() -> bool:
        return border.reading("ipv4:127.0.0.1:1").locked()

    async with (
        serving(border, socket) as address,
        grpc.aio.insecure_channel(address) as channel,
        grpc.aio.insecure_channel(f"unix:{socket}") as local,
    ):
        check = channel.stream_stream("/grpc.health.v1.Health/Check")
        silent = [asyncio.ensure_future(check(nothing()).read()) for _ in range(2 * interceptor.STRANGERS)]
        await until(full, seconds=5)
        request = health_pb2.HealthCheckRequest()
        for answer in (
            health_pb2_grpc.HealthStub(channel).Check(request, metadata=HEADERS, timeout=1),
            health_pb2_grpc.HealthStub(local).Check(request, timeout=1),
        ):
            assert (await answer).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError, match=r"(?i)deadline"):
            await health_pb2_grpc.HealthStub(channel).Check(request, timeout=0.3)
        over.set()
        await asyncio.gather(*silent, return_exceptions=True)


@asynchronous
async def test_few_strangers_watch_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "STRANGERS_WATCHING", 2)
    async with serving() as address, grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watched = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        for watch in watched:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="send the token") as refused:
            await anext(aiter(stub.Watch(health_pb2.HealthCheckRequest())))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        owner = stub.Watch(health_pb2.HealthCheckRequest(), metadata=HEADERS)
        assert (await owner.read()).status == health_pb2.HealthCheckResponse.SERVING
        watched[0].cancel()

        async def let_in() -> bool:
            try:
                return bool(await anext(aiter(stub.Watch(health_pb2.HealthCheckRequest()))))
            except grpc.aio.AioRpcError:
                return False

        await until(let_in, seconds=5)


@pytest.mark.parametrize("method", [f"/{SERVICE}/Get", "/grpc.health.v1.Health/Check"])
def test_a_flood_without_a_token_fills_no_log(caplog: pytest.LogCaptureFixture, method: str) -> None:
    @asynchronous
    async def scenario() -> None:
        async with (
            serving(Get=handler("unary_unary", lambda: None)) as address,
            grpc.aio.insecure_channel(address) as channel,
        ):
            for _ in range(80):
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary(method)(b"\xff")

    with caplog.at_level(logging.INFO, interceptor.__name__):
        scenario()
    assert 10 <= len(caplog.records) < 80


def test_what_a_worker_may_not_call_is_told_each_time(caplog: pytest.LogCaptureFixture) -> None:
    border = Border(Gate(TOKEN, lambda token: "r1" if token == "worker" else None), Home(Path("home")))

    @asynchronous
    async def scenario() -> None:
        async with serving(border, List=handler("unary_unary", lambda: None)) as address:
            for _ in range(3 * interceptor.STRANGERS_TOLD):
                error = await refusal(address, "List", "unary_unary", b"", (("authorization", "Bearer worker"),))
                assert error.reason is Reason.OUT_OF_SCOPE

    with caplog.at_level(logging.INFO, interceptor.__name__):
        scenario()
    assert len(caplog.records) == 3 * interceptor.STRANGERS_TOLD


@asynchronous
async def test_a_caller_that_goes_away_closes_the_handler_at_once() -> None:
    happened: list[str] = []

    async def endless(request: Any, context: Any) -> AsyncIterator[pb.GetRunResponse]:
        try:
            while True:
                yield pb.GetRunResponse()
                await asyncio.sleep(0.001)
        finally:
            happened.append("closed")

    method = grpc.unary_stream_rpc_method_handler(
        endless, pb.GetRunRequest.FromString, pb.GetRunResponse.SerializeToString
    )
    async with serving(Endless=method) as address, grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream(f"/{SERVICE}/Endless")(b"", metadata=HEADERS)
        await call.read()
        call.cancel()

        async def closed() -> bool:
            return happened == ["closed"]

        await until(closed, seconds=5)


@asynchronous
async def test_a_handler_that_writes_to_its_context_is_served_too() -> None:
    async with serving() as address, grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        first = await asyncio.wait_for(watch.read(), 5)
        assert first.status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


@asynchronous
async def test_no_such_method_is_unimplemented() -> None:
    async with serving() as address:
        assert (await refusal(address, "Nothing", "unary_unary")).reason is Reason.NOT_IMPLEMENTED
