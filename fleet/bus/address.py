"""Addresses: how they are written, which one of this machine a peer can reach, and who holds a port.

Never trusts a host name of its own making: peers often cannot resolve it (see docs/decisions.md).
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from fleet.errors import ConfigError

NAME_WITHIN_S = 2.0


def parse(text: str, default_port: int, setting: str) -> tuple[str, int]:
    """('host', port) from host, host:port, tcp://host:port or [v6]:port. Raises ConfigError that names `setting`."""
    rest = text.removeprefix("tcp://")
    host, colon, port = rest.rpartition(":")
    if not colon or host.endswith(":") or (":" in host and not host.endswith("]")):
        host, port = rest, str(default_port)  # no port, or a bare IPv6 address
    host = host.removeprefix("[").removesuffix("]")
    if not host or "/" in rest or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{setting} is {text!r}: it must be HOST:PORT, such as orchestrator:{default_port}")
    return host, int(port)


def endpoint(host: str, port: int) -> str:
    """The ZeroMQ endpoint of a host and port.

    `localhost` is the IPv4 one: what listens on this machine's ports often does so on IPv4 alone, and ZeroMQ tries only
    the first address that a name has.
    """
    host = "127.0.0.1" if host == "localhost" else host
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name counts if all its addresses do."""
    if host in ("*", "", "0.0.0.0", "::"):
        return False
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def local_address_towards(host: str, port: int) -> str | None:
    """The address of this machine's interface that routes to `host`, None while the name does not resolve.

    Connecting a UDP socket sends nothing, it only asks the kernel for the route.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in infos:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return None


def name_of(address: str) -> str:
    """The name that DNS has for an address, without its domain; empty if it has none.

    Of a container under Compose that is `tensorfleet-worker-3`: it stays the same when the container is made anew.
    """
    import dns.exception
    import dns.resolver

    try:
        # Not gethostbyaddr: a container's own address is in its /etc/hosts, under the container's id.
        name = str(dns.resolver.resolve_address(address, lifetime=NAME_WITHIN_S)[0]).rstrip(".")
    except (dns.exception.DNSException, OSError, ValueError):
        return ""
    return name.partition(".")[0]


def free_port(host: str = "") -> int:
    """A TCP port that is free now. Another process may take it before it is used; the kernel hands it out late."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def holder_of(bound: str) -> str:
    """Who listens on the port of a tcp endpoint, as ' (held by ...)'; empty where that cannot be found out."""
    import psutil

    port = bound.rpartition(":")[2]
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == int(port):
                if connection.pid is None:
                    return ", held by a process of another user"
                name = " ".join(psutil.Process(connection.pid).cmdline()) or "?"
                return f", held by pid {connection.pid}: {name[:120]}"
    return ""
