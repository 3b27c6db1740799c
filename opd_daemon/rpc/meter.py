"""Counting calls: how many of each method ended with which code, how long they took, how many are under way."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc

from opd_daemon.errors import Code
from opd_daemon.rpc.interceptor import Context, Details, Handler

# Upper bounds in seconds: from a look-up to a forward pass over a long batch.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
OK = "OK"
UNKNOWN_METHOD = "unknown"


@dataclass(slots=True)
class MethodTally:
    """Calls of one method so far. `buckets` has calls by duration, the last entry those beyond the last bound."""

    by_code: Counter[str] = field(default_factory=Counter)
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    seconds: float = 0.0
    under_way: int = 0

    def add(self, code: str, seconds: float) -> None:
        """Count one call that has ended."""
        self.by_code[code] += 1
        self.buckets[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds


class CallTally:
    """Calls by method. Used on the event loop only, so it takes plain numbers and no locks."""

    def __init__(self) -> None:
        self.methods: dict[str, MethodTally] = {}

    def of(self, method: str) -> MethodTally:
        """The tally of `/package.Service/Method`."""
        tally = self.methods.get(method)
        if tally is None:
            tally = self.methods[method] = MethodTally()
        return tally

    def refused(self) -> None:
        """Count a call of a method that isn't there: one label for all, or callers could make labels without end."""
        self.of(UNKNOWN_METHOD).add(Code.UNIMPLEMENTED, 0.0)


class Meter(grpc.aio.ServerInterceptor):
    """Counts every call. It stands outside the border, so it sees the codes that clients see."""

    def __init__(self, calls: CallTally) -> None:
        self._calls = calls

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler]], handler_call_details: Details
    ) -> Handler:
        """Count what becomes of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: grpcio answers UNIMPLEMENTED
            self._calls.refused()
            return None
        tally = self._calls.of(handler_call_details.method)
        decode, encode = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_one_answer(handler.unary_unary, tally), decode, encode)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_many_answers(handler.unary_stream, tally), decode, encode)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(_one_answer(handler.stream_unary, tally), decode, encode)
        return grpc.stream_stream_rpc_method_handler(_many_answers(handler.stream_stream, tally), decode, encode)


def _one_answer(behaviour: Any, tally: MethodTally) -> Callable[[Any, Context], Awaitable[Any]]:
    async def answer(request: Any, context: Context) -> Any:
        with _Measured(tally, context):
            return await behaviour(request, context)

    return answer


def _many_answers(behaviour: Any, tally: MethodTally) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
        with _Measured(tally, context):
            async with aclosing(behaviour(request, context)) as inner:
                async for answer in inner:
                    yield answer

    return answers


class _Measured:
    """One call, from its beginning to whatever ends it. A class, as this is on the way of every call."""

    __slots__ = ("_context", "_started", "_tally")

    def __init__(self, tally: MethodTally, context: Context) -> None:
        self._tally = tally
        self._context = context

    def __enter__(self) -> None:
        self._tally.under_way += 1
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            code = OK
        elif issubclass(kind, grpc.aio.AbortError):
            code = _code_name(self._context)
        else:  # a client that has gone: cancelled, or a generator closed
            code = Code.CANCELLED
        self._tally.under_way -= 1
        self._tally.add(code, time.perf_counter() - self._started)


def _code_name(context: Context) -> str:
    """The canonical name of the code a call was aborted with; grpcio gives it as a number or as its enum."""
    code: Any = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else _NAMES.get(code, "UNKNOWN")


_NAMES = {status.value[0]: status.name for status in grpc.StatusCode}
