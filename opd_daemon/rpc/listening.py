"""Addresses beyond the unix socket: loopback as it is, anything else only with TLS."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from opd_daemon.addresses import is_loopback, join_address, split_address
from opd_daemon.errors import OpdError, Reason


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Files of a server's identity, as PEM. client_ca: who signs the certificates clients must show, None for none."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """What gRPC needs of them.

        Raises:
            OpdError: INVALID_REQUEST naming the file that is missing, broken or doesn't go with the other.
        """
        self._check()
        try:
            pair = (self.key.read_bytes(), self.certificate.read_bytes())
            clients = self.client_ca.read_bytes() if self.client_ca else None
        except OSError as fault:
            raise _refused(f"{fault.filename}: can't be read ({fault.strerror})") from None
        return grpc.ssl_server_credentials([pair], root_certificates=clients, require_client_auth=clients is not None)

    def _check(self) -> None:
        """Find broken files, of which gRPC itself says nothing: it lets every handshake fail."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as fault:
            what = f"--tls-cert {self.certificate} and --tls-key {self.key}"
            raise _refused(f"{what}: {_why(fault)}; give a PEM certificate and its PEM key, not encrypted") from None
        if self.client_ca:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ValueError) as fault:
                raise _refused(f"--tls-client-ca {self.client_ca}: {_why(fault)}; give PEM certificates") from None


@dataclass(frozen=True, slots=True)
class Listener:
    """One more address to serve. Without `tls` it has to be this machine's own."""

    host: str
    port: int
    tls: ServerTls | None = None

    @classmethod
    def parse(cls, address: str, tls: ServerTls | None) -> Listener:
        """From `HOST:PORT`.

        Raises:
            OpdError: INVALID_REQUEST for what is no address, or one that others can reach without TLS.
        """
        try:
            host, port = split_address(address)
        except ValueError as fault:
            raise _refused(f"--listen {fault}") from None
        if tls is None and not is_loopback(host):
            cure = "give --tls-cert and --tls-key, or listen on 127.0.0.1 and reach it through ssh -L"
            raise _refused(f"--listen {address}: other machines can reach it, so it needs TLS; {cure}")
        return cls(host, port, tls)

    def bind(self, server: grpc.aio.Server) -> str:
        """Take the address; returns it with the port that was free where 0 was asked for.

        Raises:
            OpdError: INVALID_REQUEST when it is taken or not this machine's.
        """
        wanted = join_address(self.host, self.port)
        try:
            if self.tls:
                bound = server.add_secure_port(wanted, self.tls.credentials())
            else:
                bound = server.add_insecure_port(wanted)
        except RuntimeError:
            raise _refused(f"--listen {wanted}: in use, or no address of this machine; choose another") from None
        return join_address(self.host, bound)


def _why(fault: Exception) -> str:
    if isinstance(fault, ssl.SSLError):
        return (fault.reason or "not PEM").replace("_", " ").lower()
    return getattr(fault, "strerror", None) or "not PEM"


def _refused(message: str) -> OpdError:
    return OpdError(Reason.INVALID_REQUEST, message)
