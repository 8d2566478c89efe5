"""Addresses as people write them, IPv6 among them, and where a socket listens that others reach at one."""

from __future__ import annotations

import socket

import pytest

from fleet import config
from fleet.bus.address import endpoint, is_ipv6, listening_host, parse, shown
from fleet.errors import ConfigError

READ = {
    "orchestrator": ("orchestrator", 50051),
    "orchestrator:1": ("orchestrator", 1),
    "tcp://orchestrator:1": ("orchestrator", 1),
    "10.0.0.1": ("10.0.0.1", 50051),
    "10.0.0.1:65535": ("10.0.0.1", 65535),
    "*:0": ("*", 0),
    "::1": ("::1", 50051),
    "[::1]": ("::1", 50051),
    "[::1]:7": ("::1", 7),
    "tcp://[2001:db8::a:5]:7": ("2001:db8::a:5", 7),
    "[2001:db8::a:5]": ("2001:db8::a:5", 50051),
    "2001:db8::a:5": ("2001:db8::a:5", 50051),  # not port 5
    "::": ("::", 50051),
    "[::]:0": ("::", 0),
    "fe80::1%eth0": ("fe80::1%eth0", 50051),
    "[fe80::1%eth0]:7": ("fe80::1%eth0", 7),
    "::ffff:10.0.0.1": ("::ffff:10.0.0.1", 50051),
}
REFUSED = [
    "", ":", ":1", "host:", "host:x", "host:-1", "host:70000", "a/b", "a/b:1", "[]:5", "[::1", "::1]", "[::1]:", "[::1]:x",
    "[::1]x", "a:b:c", "[a:b]:1", "[host]:1", "::1::", "http://host:1", "[[::1]]:1", "::g",
]  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_read(text: str) -> None:
    assert parse(text, 50051, "ORCHESTRATOR_ADDR") == READ[text]


@pytest.mark.parametrize("text", REFUSED)
def test_refused_with_what_is_legal(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"ORCHESTRATOR_ADDR is .* it must be HOST:PORT, such as orchestrator:50051 or \[::1\]"
    ):
        parse(text, 50051, "ORCHESTRATOR_ADDR")


@pytest.mark.parametrize("host", ["orchestrator", "10.0.0.1", "*", "::1", "2001:db8::a:5", "fe80::1%eth0"])
def test_what_is_shown_is_read_again(host: str) -> None:
    assert parse(shown(host, 7), 50051, "--bind") == (host, 7)
    assert parse(endpoint(host, 7), 50051, "--bind") == (host, 7)
    assert is_ipv6(host) == (":" in host)


@pytest.mark.parametrize("text", ["::1", "[::1]"])
def test_fleet_host_may_have_brackets(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_HOST", text)
    assert config.advertised_host() == "::1"


def test_a_socket_listens_where_it_is_reached_and_nowhere_else() -> None:
    assert listening_host("127.0.0.1") == "127.0.0.1"
    assert listening_host("127.0.0.3") == "127.0.0.3"
    assert listening_host("localhost") == "127.0.0.1"
    if socket.has_ipv6:
        assert listening_host("::1") in ("::1", "*")  # where the machine has none


@pytest.mark.parametrize("advertised", ["203.0.113.7", "2001:db8::7", "no.such.name.invalid"])
def test_it_listens_everywhere_where_the_address_is_not_this_machines(advertised: str) -> None:
    assert listening_host(advertised) == "*"


def test_a_name_that_is_loopback_only_here_is_not_where_others_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian gives a machine's own name the address 127.0.1.1."""
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    assert listening_host("this-machine") == "*"
