"""The one place every call passes: token, decoding, and errors that say nothing about our insides."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from opd_daemon.errors import OpdError, Reason
from opd_daemon.rpc.access import Gate, caller
from opd_daemon.wire.errors import to_status

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Details = grpc.HandlerCallDetails
# grpcio's stubs describe handlers of the synchronous server only.
Handler = Any


class Border(grpc.aio.ServerInterceptor):
    """Wraps every handler: admits the caller, decodes the request itself, maps every exception to a status.

    grpcio by itself answers a malformed message and an unhandled exception with UNKNOWN and our own text, and leaves
    a client hanging when a handler raises CancelledError of its own; see docs/decisions.md.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler]], handler_call_details: Details
    ) -> Handler:
        """Put the border around the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: grpcio answers UNIMPLEMENTED
            return None
        call = _Call(self._gate, handler_call_details, handler)
        encode = handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(call.unary_unary, None, encode)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(call.unary_stream, None, encode)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(call.stream_unary, None, encode)
        return grpc.stream_stream_rpc_method_handler(call.stream_stream, None, encode)


class _Call:
    """One method's handler with the border around it."""

    def __init__(self, gate: Gate, details: Details, handler: Handler) -> None:
        self._gate = gate
        self._method = details.method
        self._authorization = _header(details)
        self._handler = handler

    async def unary_unary(self, data: bytes, context: Context) -> Any:
        try:
            self._admit()
            return await self._handler.unary_unary(self._decoded(data), context)
        except BaseException as error:  # noqa: BLE001 - nothing unmapped may pass
            await self._refuse(error, context)

    async def unary_stream(self, data: bytes, context: Context) -> AsyncIterator[Any]:
        try:
            self._admit()
            async for response in self._handler.unary_stream(self._decoded(data), context):
                yield response
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - nothing unmapped may pass
            await self._refuse(error, context)

    async def stream_unary(self, requests: AsyncIterator[bytes], context: Context) -> Any:
        try:
            self._admit()
            return await self._handler.stream_unary(self._all_decoded(requests), context)
        except BaseException as error:  # noqa: BLE001 - nothing unmapped may pass
            await self._refuse(error, context)

    async def stream_stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        try:
            self._admit()
            async for response in self._handler.stream_stream(self._all_decoded(requests), context):
                yield response
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - nothing unmapped may pass
            await self._refuse(error, context)

    def _admit(self) -> None:
        caller.set(self._gate.admit(self._method, self._authorization))

    def _decoded(self, data: bytes) -> Any:
        try:
            return self._handler.request_deserializer(data)
        except DecodeError:
            raise OpdError(Reason.MALFORMED_MESSAGE, "the request is no message of this call's type") from None

    async def _all_decoded(self, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in requests:
            yield self._decoded(data)

    async def _refuse(self, error: BaseException, context: Context) -> None:
        """Answer with the error's status; never returns."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, asyncio.CancelledError):
            if context.cancelled() or context.done():
                raise error
            error = OpdError(Reason.SHUTTING_DOWN, "the daemon is stopping; try again when it is back")
        if not isinstance(error, OpdError):
            if not isinstance(error, Exception):
                raise error
            log.error("%s failed", self._method, exc_info=error)
            error = OpdError(Reason.INTERNAL, "internal error; the daemon's log has the details")
        await context.abort_with_status(rpc_status.to_status(to_status(error)))


def _header(details: Details) -> str | None:
    for key, value in details.invocation_metadata or ():
        if key == "authorization":
            return value if isinstance(value, str) else value.decode("latin-1")
    return None
