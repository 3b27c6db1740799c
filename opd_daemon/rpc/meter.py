"""Counting calls: how many of each method ended with which code, how long they took, how many are under way."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from opd_daemon.errors import Code
from opd_daemon.rpc.interceptor import Context, Details, Handler

# Upper bounds in seconds: from a look-up to a forward pass over a long batch.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
OK = "OK"
# One label for whatever is asked for and isn't there: else whoever calls could make labels without end.
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
        return self.methods.setdefault(method, MethodTally())


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
            self._calls.of(UNKNOWN_METHOD).add(Code.UNIMPLEMENTED, 0.0)
            return None
        tally, decode, encode = (
            self._calls.of(handler_call_details.method),
            handler.request_deserializer,
            handler.response_serializer,
        )
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_one_answer(handler.unary_unary, tally), decode, encode)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_many_answers(handler.unary_stream, tally), decode, encode)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(_one_answer(handler.stream_unary, tally), decode, encode)
        return grpc.stream_stream_rpc_method_handler(_many_answers(handler.stream_stream, tally), decode, encode)


def _one_answer(behaviour: Any, tally: MethodTally) -> Callable[[Any, Context], Awaitable[Any]]:
    async def answer(request: Any, context: Context) -> Any:
        with _measured(tally, context):
            return await behaviour(request, context)

    return answer


def _many_answers(behaviour: Any, tally: MethodTally) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
        with _measured(tally, context):
            async with aclosing(behaviour(request, context)) as inner:
                async for answer in inner:
                    yield answer

    return answers


@contextmanager
def _measured(tally: MethodTally, context: Context) -> Iterator[None]:
    started, code = time.perf_counter(), OK
    tally.under_way += 1
    try:
        yield
    except grpc.aio.AbortError:
        code = _code_name(context)
        raise
    except BaseException:  # a client that has gone: cancelled, or a generator closed
        code = Code.CANCELLED
        raise
    finally:
        tally.under_way -= 1
        tally.add(code, time.perf_counter() - started)


def _code_name(context: Context) -> str:
    """The canonical name of the code a call was aborted with; grpcio gives it as a number or as its enum."""
    code: Any = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else _NAMES.get(code, "UNKNOWN")


_NAMES = {status.value[0]: status.name for status in grpc.StatusCode}
