"""Network addresses as people write them: `HOST:PORT`, and whether they can be reached from other machines."""

from __future__ import annotations

import ipaddress

# gRPC's own ways to say what an address is.
PREFIXES = ("dns:///", "dns:", "ipv4:", "ipv6:")


def is_this_machine(address: str) -> bool:
    """Whether a gRPC address stays on this machine: a unix socket or a loopback address. In doubt it doesn't."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    for prefix in PREFIXES:
        address = address.removeprefix(prefix)
    try:
        host, _ = split_address(address)
    except ValueError:
        return False
    return is_loopback(host)


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's own: `localhost` or a loopback address, in its plain notation."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_address(address: str) -> tuple[str, int]:
    """Host, without the brackets of IPv6, and port.

    Raises:
        ValueError: the address is not HOST:PORT.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    well_formed = bool(colon and bare) and (bracketed or ":" not in bare) and "/" not in bare and bare.isprintable()
    if not well_formed or not (port.isascii() and port.isdecimal()) or int(port) > 65_535:
        raise ValueError(f"{address!r} is not HOST:PORT, such as 192.168.1.5:7000 or [::1]:7000")
    return bare, int(port)


def join_address(host: str, port: int) -> str:
    """`HOST:PORT`, with the brackets IPv6 needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
