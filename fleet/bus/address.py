"""Addresses: their written form, the ones of this machine that a peer can reach, and the holders of ports.

This machine's own host name is never handed out: peers often cannot resolve it (see docs/decisions.md).
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket

from fleet.errors import ConfigError

NAME_WITHIN_S = 2.0
EVERY_INTERFACE = ("*", "", "0.0.0.0", "::")  # hosts to listen on, which are no place to go to
_ADDRESS = re.compile(
    r"(?:\[(?P<bracketed>[^\[\]/]+:[^\[\]/]*)\]|(?P<plain>[^\[\]:/]+))(?::(?P<port>[0-9]{1,5}))?|(?P<bare>[^\[\]/]*:[^\[\]/]*:[^\[\]/]*)"
)


def parse(text: str, default_port: int, setting: str) -> tuple[str, int]:
    """('host', port) from HOST or HOST:PORT, with or without tcp:// before it. Raises ConfigError, which names `setting`.

    An IPv6 address with a port stands in brackets, as in [::1]:50051. Without brackets the whole text is the address.
    """
    found = _ADDRESS.fullmatch(text.removeprefix("tcp://"))
    host = found and (found["bracketed"] or found["plain"] or found["bare"])
    port = (found and found["port"]) or str(default_port)
    if not host or int(port) > 65535 or (":" in host and not is_ipv6(host)):
        raise ConfigError(
            f"{setting} is {text!r}: it must be HOST:PORT, such as orchestrator:{default_port} or [::1]:{default_port}"
        )
    return host, int(port)


def is_ipv6(host: str) -> bool:
    """Whether `host` is an IPv6 address. A link-local one may name its interface (fe80::1%eth0)."""
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def shown(host: str, port: int | str) -> str:
    """A host and port as a person writes them. `parse` reads this form."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def endpoint(host: str, port: int | str) -> str:
    """The ZeroMQ endpoint of a host and port. For port '*' the system chooses one.

    `localhost` becomes its IPv4 address: servers of this machine often listen on IPv4 alone, and ZeroMQ tries only the
    first address of a name.
    """
    return f"tcp://{shown('127.0.0.1' if host == 'localhost' else host, port)}"


def listening_host(advertised: str) -> str:
    """The host for a socket to bind to, if peers reach it at `advertised`: that address alone, where this is possible.

    Otherwise '*', which is all interfaces. The address may belong to a NAT or to a machine that publishes a container's
    ports, or `advertised` may be a name with several addresses.
    """
    advertised = "127.0.0.1" if advertised == "localhost" else advertised
    try:
        infos = {(info[0], info[4]) for info in socket.getaddrinfo(advertised, 0, type=socket.SOCK_STREAM)}
    except OSError:
        return "*"
    if len(infos) != 1:
        return "*"
    ((family, address),) = infos
    host = str(address[0])
    if host != advertised and is_loopback(host):
        return "*"  # this machine's own name in its own /etc/hosts; peers find its real address
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except OSError:
        return "*"
    return host


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. For a name, all its addresses must be loopback ones."""
    if host in EVERY_INTERFACE:
        return False
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def local_address_towards(host: str, port: int) -> str | None:
    """The address of this machine's interface that routes to `host`; None while the name does not resolve.

    Connecting a UDP socket sends nothing: the kernel only looks up the route.
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


def obstacle(host: str, port: int, within_s: float) -> str:
    """The reason why no TCP connection can be made, in words; empty if one can."""
    try:
        socket.create_connection((host, port), within_s).close()
    except socket.gaierror:
        return "its name does not resolve"
    except ConnectionRefusedError:
        return "nothing listens there"
    except TimeoutError:
        return f"not even a connection is made within {within_s:g} s: a firewall between, or a machine that is off"
    except OSError as error:
        return str(error.strerror)
    return ""


def resolved(tcp_endpoint: str) -> set[tuple[str, int]]:
    """The addresses and ports of an endpoint; empty if its name does not resolve."""
    host, _, port = tcp_endpoint.removeprefix("tcp://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    with contextlib.suppress(OSError):
        infos = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        return {(str(info[4][0]).partition("%")[0], int(port)) for info in infos}
    return set()


def connected_to() -> set[tuple[str, int]] | None:
    """The addresses and ports of this process's TCP peers; None if the system does not tell."""
    import psutil

    try:
        found = psutil.Process().net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    made = [c.raddr for c in found if c.status == psutil.CONN_ESTABLISHED and c.raddr]
    return {(address.ip.removeprefix("::ffff:"), address.port) for address in made}


def name_of(address: str) -> str:
    """The DNS name of an address, without its domain; empty if there is none.

    A container under Compose is called `tensorfleet-worker-3`, for example. The name outlives the container.
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
    """A TCP port that is free now. Another process may take it before its use; the kernel hands such ports out again late."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def holder_of(bound: str) -> str:
    """The listener on the port of a tcp endpoint, as ', held by ...'; empty if that cannot be found out."""
    import psutil

    port = bound.rpartition(":")[2]
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == int(port):
                if connection.pid is None:
                    return ", held by a process of another user"
                return f", held by {process_in_words(connection.pid)}"
    return ""


def process_in_words(pid: int) -> str:
    """A process in words: its pid and, if that can be read, its command line."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        if words := " ".join(psutil.Process(pid).cmdline()):
            return f"pid {pid}: {words[:120]}"
    return f"pid {pid}"
