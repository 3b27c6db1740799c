"""Where the daemon is, and calls to it that carry the token and fail with `OpdError`."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psutil

from opd_daemon.addresses import is_this_machine
from opd_daemon.client.transport import ClientTls, open_channel
from opd_daemon.errors import OpdError, Reason
from opd_daemon.home import Home
from opd_daemon.token_file import read_token
from opd_daemon.wire import headers
from opd_daemon.wire.errors import from_rpc_error

RETRY_DELAYS = (0.1, 0.2, 0.4, 0.8, 1.6)
CHANNEL_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 2000))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A daemon's address (`unix:/…` or `host:port`) and token; pid is 0 where the discovery file was not used.

    tls: what an encrypted connection needs; None for the plain ones, which never leave this machine. web_port: 0 where
    the daemon serves no pages, or where it was not found by its discovery file.
    """

    address: str
    token: str
    pid: int = 0
    store_id: str = ""
    tls: ClientTls | None = None
    web_port: int = 0

    @property
    def remote(self) -> bool:
        """Whether the daemon may be on another machine, where this one's paths mean nothing."""
        return self.tls is not None


def find_endpoint(home: Home, address: str | None = None, token: str | None = None) -> Endpoint:
    """The daemon to talk to: the arguments, else the environment, else the home's discovery file.

    The environment is `$OPD_ADDRESS` with `$OPD_TOKEN`, or `$OPD_TOKEN_FILE`; see `ClientTls` for daemons elsewhere.

    Raises:
        OpdError: DAEMON_NOT_RUNNING when nothing names a live daemon; WRONG_TOKEN for a token file that won't do.
    """
    address = address or os.environ.get("OPD_ADDRESS")
    token = token or _token_of_environment()
    if address and token:
        return Endpoint(address, token, tls=ClientTls.of_environment(address))
    # The local daemon's token is for nobody on another machine.
    found = None if address and not is_this_machine(address) else _discovered(home)
    if found is None:
        if address:
            message = f"no token for the daemon at {address}; give --token-file FILE, or set OPD_TOKEN"
            raise OpdError(Reason.MISSING_TOKEN, message)
        raise not_running(home)
    if address:
        tls = ClientTls.of_environment(address)
        return Endpoint(address, token or found.token, store_id=found.store_id, tls=tls)
    return replace(found, token=token or found.token, tls=ClientTls.of_environment(found.address))


def _token_of_environment() -> str | None:
    token = os.environ.get("OPD_TOKEN")
    if token and not (token.isascii() and token.isprintable()):
        raise OpdError(Reason.WRONG_TOKEN, "OPD_TOKEN holds characters no token has; read it again from daemon.json")
    file = os.environ.get("OPD_TOKEN_FILE")
    return token or (read_token(Path(file).expanduser()) if file else None)


def not_running(home: Home) -> OpdError:
    """The error of every call that finds no daemon."""
    return OpdError(
        Reason.DAEMON_NOT_RUNNING,
        f"no daemon is running for {home.root}; start one with 'opd serve' in another terminal",
        home=home.root,
    )


def _discovered(home: Home) -> Endpoint | None:
    """What the discovery file says; None when there is none or its daemon has died without removing it."""
    try:
        values = json.loads(home.discovery.read_text(encoding="utf-8"))
        found = Endpoint(
            values["address"],
            values["token"],
            int(values["pid"]),
            values.get("store_id", ""),
            web_port=values.get("web_port") or 0,
        )
    except FileNotFoundError:
        return None
    except OSError as fault:
        message = f"{home.discovery}: can't be read ({fault.strerror}); check OPD_HOME"
        raise OpdError(Reason.DAEMON_NOT_RUNNING, message) from None
    except (ValueError, KeyError, TypeError):
        message = f"{home.discovery}: can't be read; delete it and start the daemon again"
        raise OpdError(Reason.DAEMON_NOT_RUNNING, message) from None
    return found if psutil.pid_exists(found.pid) else None


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class TokenInterceptor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token, and a name of its own, to every call of a channel, also to those made with stubs directly."""

    def __init__(self, token: str) -> None:
        # All connections over a unix socket look the same to the daemon, which lets clients take turns.
        self._headers = (("authorization", f"Bearer {token}"), (headers.CLIENT, uuid.uuid4().hex))

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Make the call, with the token."""
        return continuation(self._with_token(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Make the call, with the token."""
        return continuation(self._with_token(client_call_details), request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        """Make the call, with the token."""
        return continuation(self._with_token(client_call_details), request_iterator)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        """Make the call, with the token."""
        return continuation(self._with_token(client_call_details), request_iterator)

    def _with_token(self, details: Any) -> _CallDetails:
        metadata = [*(details.metadata or ()), *self._headers]
        return _CallDetails(
            details.method,
            details.timeout,
            metadata,
            details.credentials,
            getattr(details, "wait_for_ready", None),
            getattr(details, "compression", None),
        )


class Connection:
    """One channel to the daemon. After the daemon has been restarted, `renew` finds it again."""

    def __init__(self, home: Home, locate: Callable[[], Endpoint]) -> None:
        self.home = home
        self._locate = locate
        self.endpoint = locate()
        self._open()

    def _open(self) -> None:
        self._bare = open_channel(self.endpoint.address, self.endpoint.tls, CHANNEL_OPTIONS)
        self.channel = grpc.intercept_channel(self._bare, TokenInterceptor(self.endpoint.token))

    def renew(self) -> bool:
        """Look for the daemon again; whether there is one. Opens a new channel when it has moved."""
        try:
            endpoint = self._locate()
        except OpdError as error:
            if error.reason is not Reason.DAEMON_NOT_RUNNING:
                raise
            return False
        if endpoint != self.endpoint:
            self.close()
            self.endpoint = endpoint
            self._open()
        return True

    def outdated(self, error: OpdError) -> bool:
        """Whether a daemon that was restarted refuses the token of its predecessor; the new one is known then."""
        before = self.endpoint
        return error.reason is Reason.WRONG_TOKEN and self.renew() and self.endpoint != before

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._bare.close()

    def unary(self, stub: type[Any], method: str, request: Any, *, timeout: float, retry: bool = False) -> Any:
        """One answer. With `retry` (idempotent calls only) UNAVAILABLE is tried again for about three seconds.

        Raises:
            OpdError: as the daemon raised it; DAEMON_NOT_RUNNING when there is none.
        """
        delays = RETRY_DELAYS if retry else ()
        for delay in (*delays, None):
            try:
                return getattr(stub(self.channel), method)(request, timeout=timeout)
            except grpc.RpcError as fault:
                error = self.error(fault)
                if self.outdated(error):  # it was refused, so it may be made again whatever it is
                    return self.unary(stub, method, request, timeout=timeout, retry=retry)
                if delay is None or not is_unavailable(fault):
                    raise error from None
            time.sleep(delay)
            if not self.renew():
                raise not_running(self.home)
        raise AssertionError  # the last round has returned or raised

    def stream(
        self, stub: type[Any], method: str, request: Any, *, timeout: float | None = None
    ) -> Generator[Any, None, None]:
        """The answers of one streaming call; leaving the iteration cancels it.

        Raises:
            OpdError: as `unary`.
        """
        call = getattr(stub(self.channel), method)(request, timeout=timeout)
        try:
            yield from call
        except grpc.RpcError as fault:
            raise self.error(fault) from None
        finally:
            call.cancel()

    def error(self, fault: grpc.RpcError) -> OpdError:
        """The daemon's own error, or DAEMON_NOT_RUNNING in our words when nobody answered."""
        error = from_rpc_error(fault)
        if error.reason is not Reason.DAEMON_NOT_RUNNING:
            return error
        if self.endpoint.pid:
            return not_running(self.home)
        unsure = (
            "check the address and --ca" if self.endpoint.remote else "check OPD_ADDRESS, or start one with 'opd serve'"
        )
        message = f"no daemon answers at {self.endpoint.address}; {unsure}"
        return OpdError(Reason.DAEMON_NOT_RUNNING, message, address=self.endpoint.address)


def is_unavailable(fault: grpc.RpcError) -> bool:
    """Whether nothing happened, so that the same call may be tried again."""
    return isinstance(fault, grpc.Call) and fault.code() is grpc.StatusCode.UNAVAILABLE
