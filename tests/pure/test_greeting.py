"""Who greets whom: each pair both ways or not at all, all of them in small worlds, few in large ones."""

from __future__ import annotations

import pytest

from fleet.collectives.greeting import ALL_AT_MOST, partners


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
