"""Who greets whom: each pair both ways or not at all, all of them in small worlds, few in large ones."""

from __future__ import annotations

import pytest

from fleet.collectives.greeting import ALL_AT_MOST, check_addresses, partners
from fleet.errors import Blocked, SameAddress, Unreachable
from fleet.world import Member


def addresses(count: int, per_host: int) -> list[str]:
    return [f"tcp://10.0.{rank // per_host}.1:{50052 + rank % per_host}" for rank in range(count)]


@pytest.mark.parametrize("count", [2, 3, 8, 16, 17, 64, 1000])
@pytest.mark.parametrize("per_host", [1, 3, 8])
def test_who_greets_is_greeted_and_no_network_is_asked_about_ones_own_machine(count: int, per_host: int) -> None:
    where = addresses(count, per_host)
    found = [partners(rank, where, ()) for rank in range(count)]
    for rank, peers in enumerate(found):
        assert all(rank in found[peer] for peer in peers)
        assert all(peer // per_host != rank // per_host for peer in peers)
        assert len(peers) <= max(ALL_AT_MOST, 2 * count.bit_length())
        if count <= ALL_AT_MOST:
            assert len(peers) == sum(peer // per_host != rank // per_host for peer in range(count))
        elif per_host == 1:
            assert {(rank + 1) % count, (rank - 1) % count} <= set(peers)


def test_who_shares_memory_or_needs_no_network_is_not_greeted() -> None:
    assert partners(0, addresses(4, 1), (0, 1)) == [2, 3]
    assert partners(0, ["ipc:///tmp/a", "ipc:///tmp/b"], ()) == []
    assert partners(0, ["tcp://[fd00::1]:1", "tcp://[fd00::1]:2", "tcp://[fd00::2]:1"], ()) == [2]


def test_two_ranks_at_one_address_are_named() -> None:
    """Each machine's worker says 127.0.0.1, since its ORCHESTRATOR_ADDR is a tunnel's end."""
    members = [Member(rank, f"w{rank}", "127.0.0.1", 7, f"tcp://127.0.0.1:{50052 + rank % 2}") for rank in range(3)]
    check_addresses(members[:2])
    with pytest.raises(SameAddress) as raised:
        check_addresses(members)
    assert str(raised.value).startswith(
        "rank 0 (worker w0, pid 7) and rank 2 (worker w2, pid 7) are both at tcp://127.0.0.1:50052, and only one"
    )


def test_a_loopback_address_is_no_firewall() -> None:
    way = Blocked(1, "tcp://10.0.0.6:50052", 0, "tcp://127.0.0.1:50052")
    text = str(Unreachable("fleet.init()", 20.0, [way]))
    assert "does not reach rank 0 at tcp://127.0.0.1:50052: only its own machine reaches a loopback address" in text
    assert "firewall" not in text
