"""How a client reaches a daemon: a unix socket or loopback as they are, other machines only with TLS."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from opd_daemon.addresses import is_this_machine
from opd_daemon.errors import OpdError, Reason


@dataclass(frozen=True, slots=True)
class ClientTls:
    """Files, as PEM. ca: who signs the daemon's certificate, empty for the public authorities gRPC knows.

    certificate, key: this client's own, where the daemon asks for one.
    """

    ca: str = ""
    certificate: str = ""
    key: str = ""

    @classmethod
    def of_environment(cls, address: str, environment: Mapping[str, str] = os.environ) -> ClientTls | None:
        """From `$OPD_CA`, `$OPD_CLIENT_CERT` and `$OPD_CLIENT_KEY`; None where the address needs no TLS.

        Whatever leaves this machine is encrypted; on loopback only where a CA is named.
        """
        found = cls(*(environment.get(name, "") for name in ("OPD_CA", "OPD_CLIENT_CERT", "OPD_CLIENT_KEY")))
        if address.startswith("unix:") or (is_this_machine(address) and not found.ca):
            return None
        return found

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC needs of them.

        Raises:
            OpdError: INVALID_REQUEST naming the file that can't be read.
        """
        return grpc.ssl_channel_credentials(_content(self.ca), _content(self.key), _content(self.certificate))


def open_channel(address: str, tls: ClientTls | None, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
    """A channel without token. Raises as `ClientTls.credentials`."""
    if is_this_machine(address):  # whatever $http_proxy says: what goes through a proxy leaves the machine
        options = (*options, ("grpc.enable_http_proxy", 0))
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, tls.credentials(), options=options)


def _content(file: str) -> bytes | None:
    if not file:
        return None
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as fault:
        message = f"{file}: can't be read ({fault.strerror}); name a PEM file with --ca, --client-cert, --client-key"
        raise OpdError(Reason.INVALID_REQUEST, message) from None
