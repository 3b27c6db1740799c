"""grpcio's asyncio server, without the call that ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # compiled, without types

# What accepts calls of registered methods, in versions of grpcio that know of them.
REGISTERED = "_request_registered_call"
NO_SUCH_METHOD = "this daemon has no such method; its services are told by reflection"


class _CoreServer(cygrpc.AioServer):  # type: ignore[misc]
    """Answers calls of unknown methods itself.

    grpcio decodes their paths in the loop that accepts all calls. Bytes that are not UTF-8, from anyone who can
    connect, end that loop, and memory that its core still writes to is freed (seen with 1.85.3: a segmentation fault
    within some hundred such calls). Every method of ours is registered with the core, which knows it without that
    decoding: what comes to this place is unknown, whatever it is called.

    refused: called for each of them.
    """

    refused: Callable[[], None]

    async def _request_call(self) -> Any:
        """Never returns: the loop gets no call whose path it would decode."""
        refusals: set[asyncio.Task[None]] = set()
        while True:
            call = await super()._request_call()
            self.refused()
            task = asyncio.create_task(_refuse(call))
            refusals.add(task)
            task.add_done_callback(refusals.discard)


async def _refuse(call: Any) -> None:
    context = cygrpc._ServicerContext(call, None, None, asyncio.get_running_loop())  # noqa: SLF001
    try:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, NO_SUCH_METHOD)
    except (grpc.aio.AbortError, cygrpc.ExecuteBatchError):  # that is how it ends; or the client has left
        return


def core_server(
    options: Sequence[tuple[str, int]],
    interceptors: Sequence[grpc.aio.ServerInterceptor],
    refused: Callable[[], None],
) -> grpc.aio.Server:
    """A server for generated services, whose methods are all registered; not yet bound.

    refused: called for each call of an unknown method that never reaches the interceptors.
    """
    usual = cygrpc.AioServer
    if not hasattr(usual, REGISTERED):  # every call would come to that place
        return grpc.aio.server(options=options, interceptors=interceptors)
    cygrpc.AioServer = _CoreServer
    try:
        server = grpc.aio.server(options=options, interceptors=interceptors)
    finally:
        cygrpc.AioServer = usual
    server._server.refused = refused  # type: ignore[attr-defined]  # noqa: SLF001
    return server
