"""The one place every call passes: token, decoding, and errors that say nothing about our insides."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from opd_daemon import logs
from opd_daemon.errors import FieldViolation, OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.rpc.access import STRANGER, Gate, caller
from opd_daemon.wire.errors import to_status
from opd_daemon.wire.headers import REQUEST_ID
from opd_daemon.wire.malformed import first_fault

log = logging.getLogger(__name__)

# Refusals of calls without a valid token that are told of, in a second.
STRANGERS_TOLD = 10
# Of calls that need no token: messages read at a time, the time one may take, and its size.
STRANGERS, OPEN_SECONDS, OPEN_BYTES = 4, 5.0, 4096
# Open at the same time, of calls that need no token and stream.
STRANGERS_WATCHING = 256
# What a client says may be anything; no run has a longer name.
LONGEST_RUN_ID = 128

Context = grpc.aio.ServicerContext[Any, Any]
Details = grpc.HandlerCallDetails
# grpcio's stubs describe handlers of the synchronous server only.
Handler = Any


class Border(grpc.aio.ServerInterceptor):
    """Wraps every handler: admits the caller, decodes the request itself, maps every exception to a status.

    Every call gets an id, which is in its trailing metadata and in whatever is logged meanwhile. Errors name places
    in the daemon's home as $OPD_HOME, since where that lies is nobody else's business.

    grpcio by itself answers a malformed message and an unhandled exception with UNKNOWN and our own text, and leaves
    a client hanging when a handler raises CancelledError of its own; see docs/decisions.md.
    """

    def __init__(self, gate: Gate, home: Home) -> None:
        self._gate = gate
        self._home = home
        self._strangers_second = self._strangers_told = 0
        self._watching = 0
        # Who comes by the unix socket doesn't wait for those who come by the network.
        self._reading = {local: asyncio.Semaphore(STRANGERS) for local in (True, False)}

    def reading(self, peer: str) -> asyncio.Semaphore:
        """The places at which messages of strangers are read who come the same way as `peer`."""
        return self._reading[peer.startswith("unix:")]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While a stranger is streamed to. Raises TOO_MANY_WATCHERS."""
        if self._watching >= STRANGERS_WATCHING:
            message = f"{self._watching} calls without a token are streamed to already; end some, or send the token"
            raise OpdError(Reason.TOO_MANY_WATCHERS, message, watchers=self._watching)
        self._watching += 1
        try:
            yield
        finally:
            self._watching -= 1

    def tells_of_strangers(self) -> bool:
        """Whether one more refusal without a valid token is worth a line: not every one of a flood."""
        now = int(time.monotonic())
        if now != self._strangers_second:
            self._strangers_second, self._strangers_told = now, 0
        self._strangers_told += 1
        return self._strangers_told <= STRANGERS_TOLD

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler]], handler_call_details: Details
    ) -> Handler:
        """Put the border around the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: grpcio answers UNIMPLEMENTED
            return None
        call = _Call(self, self._gate, self._home, handler_call_details, handler)
        encode = handler.response_serializer
        # As a call of this kind nothing of the request is read by itself: it may be large.
        if call.fault or call.of_stranger:
            answer = call.refused if call.fault else call.open
            return grpc.stream_stream_rpc_method_handler(answer, None, encode)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(call.unary_unary, None, encode)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(call.unary_stream, None, encode)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(call.stream_unary, None, encode)
        return grpc.stream_stream_rpc_method_handler(call.stream_stream, None, encode)


class _Call:
    """One method's handler with the border around it."""

    def __init__(self, border: Border, gate: Gate, home: Home, details: Details, handler: Handler) -> None:
        self._border = border
        self._home = home
        self._id = secrets.token_hex(8)
        self._began = time.monotonic()
        self._method = details.method
        self._handler = handler
        self._caller = STRANGER
        self.fault: OpdError | None = None
        try:
            self._caller = gate.admit(self._method, _header(details))
            self.of_stranger = self._caller is STRANGER
        except OpdError as fault:
            self.fault = fault
            self.of_stranger = fault.reason is not Reason.OUT_OF_SCOPE

    async def refused(self, _: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        self._begin(context)
        if self.fault:
            await self._refuse(self.fault, context)
        yield  # as its kind has to

    async def open(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        """A call of one request for which nobody needs a token: its message is read in turn, and must be small."""
        try:
            self._begin(context)
            data = await self._first(requests, self._border.reading(context.peer()))
        except BaseException as error:  # noqa: BLE001 - nothing unmapped may pass
            await self._refuse(error, context)
        if self._handler.unary_unary:
            yield await self.unary_unary(data, context)
            return
        try:
            with self._border.watching():
                async with aclosing(_iterated(self.unary_stream(data, context))) as responses:
                    async for response in responses:
                        yield response
        except OpdError as full:
            await self._refuse(full, context)

    async def _first(self, requests: AsyncIterator[bytes], places: asyncio.Semaphore) -> bytes:
        try:
            async with asyncio.timeout(OPEN_SECONDS), places:
                data = await anext(aiter(requests), b"")
        except TimeoutError:
            text = f"the request didn't come within {OPEN_SECONDS:.0f} s, or others were read first; send it again"
            raise OpdError(Reason.DEADLINE_EXCEEDED, text) from None
        if len(data) > OPEN_BYTES:
            raise OpdError(Reason.INVALID_REQUEST, f"a request of {len(data)} bytes; send at most {OPEN_BYTES}")
        return data

    async def unary_unary(self, data: bytes, context: Context) -> Any:
        try:
            self._begin(context)
            answer = await self._handler.unary_unary(self._decoded(data), context)
        except BaseException as error:  # noqa: BLE001 - nothing unmapped may pass
            await self._refuse(error, context)
        self._tell("OK")
        return answer

    async def unary_stream(self, data: bytes, context: Context) -> AsyncIterator[Any]:
        try:
            self._begin(context)
            answers = self._handler.unary_stream(self._decoded(data), context)
            async with aclosing(_iterated(answers)) as responses:
                async for response in responses:
                    yield response
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - nothing unmapped may pass
            await self._refuse(error, context)
        self._tell("OK")

    async def stream_unary(self, requests: AsyncIterator[bytes], context: Context) -> Any:
        try:
            self._begin(context)
            answer = await self._handler.stream_unary(self._all_decoded(requests), context)
        except BaseException as error:  # noqa: BLE001 - nothing unmapped may pass
            await self._refuse(error, context)
        self._tell("OK")
        return answer

    async def stream_stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        try:
            self._begin(context)
            answers = self._handler.stream_stream(self._all_decoded(requests), context)
            async with aclosing(_iterated(answers)) as responses:
                async for response in responses:
                    yield response
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - nothing unmapped may pass
            await self._refuse(error, context)
        self._tell("OK")

    def _begin(self, context: Context) -> None:
        logs.request_id.set(self._id)
        context.set_trailing_metadata(((REQUEST_ID, self._id),))
        caller.set(self._caller)
        logs.run_id.set(self._caller.run_id)
        # grpcio's own timer may fire only after an answer that nobody waits for any more.
        if context.time_remaining() == 0:
            raise OpdError(Reason.DEADLINE_EXCEEDED, "the deadline had passed when the call came; allow it more time")

    def _decoded(self, data: bytes) -> Any:
        decode = self._handler.request_deserializer
        try:
            message = decode(data)
        except DecodeError:
            fault = first_fault(data, decode(b"").DESCRIPTOR)
            text = "the request is no message of this call's type"
            raise OpdError(Reason.MALFORMED_MESSAGE, text, violations=[fault]) from None
        if run_id := getattr(message, "run_id", ""):
            logs.run_id.set(run_id[:LONGEST_RUN_ID])
        return message

    async def _all_decoded(self, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in requests:
            yield self._decoded(data)

    async def _refuse(self, error: BaseException, context: Context) -> NoReturn:
        """Answer with the error's status."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, asyncio.CancelledError):
            if context.cancelled() or context.done():
                self._tell("CANCELLED")
                raise error
            error = OpdError(Reason.SHUTTING_DOWN, "the daemon is stopping; try again when it is back")
        if isinstance(error, KeyboardInterrupt):
            raise error
        if not isinstance(error, OpdError):
            log.error("%s failed", self._method, exc_info=error)
            message = f"internal error; the daemon's log has the details of request {self._id}"
            error = OpdError(Reason.INTERNAL, message, request_id=self._id)
        level = logging.DEBUG if self.of_stranger and not self._border.tells_of_strangers() else logging.INFO
        self._tell(error.code, level, reason=error.reason)
        status = rpc_status.to_status(to_status(without_home(error, self._home)))
        trailing = (*(status.trailing_metadata or ()), (REQUEST_ID, self._id))
        await context.abort(status.code, status.details, trailing)
        raise AssertionError  # abort has raised

    def _tell(self, code: str, level: int = logging.DEBUG, **facts: str) -> None:
        seconds = round(time.monotonic() - self._began, 6)
        log.log(level, "%s: %s", self._method, code, extra={"code": code, "seconds": seconds, **facts})


def without_home(error: OpdError, home: Home) -> OpdError:
    """The same error, with the daemon's home called by its name."""

    def named(text: str) -> str:
        return text.replace(str(home.root), "$OPD_HOME")

    violations = [FieldViolation(fault.field, named(fault.description)) for fault in error.violations]
    metadata = {name: named(value) for name, value in error.metadata.items()}
    return OpdError(error.reason, named(error.message), violations=violations, **metadata)


async def _iterated(answers: Any) -> AsyncGenerator[Any, None]:
    """What a handler streams; it may also write to the context and yield nothing, as that of the health service does.

    A handler whose caller goes away is closed at once, so that its work ends before anything else is done.
    """
    if isinstance(answers, Awaitable):
        await answers
        return
    async with aclosing(answers):
        async for response in answers:
            yield response


def _header(details: Details) -> str | None:
    for key, value in details.invocation_metadata or ():
        if key == "authorization":
            return value if isinstance(value, str) else value.decode("latin-1")
    return None
