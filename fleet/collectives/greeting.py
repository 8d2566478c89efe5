"""Greetings between the ranks of a new world, which show that the ranks reach each other over the network.

Each rank greets ranks of other machines that it will send to, and waits for their greetings. Behind a firewall a rank finds
out for itself which greetings do not come.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from fleet.collectives.channel import Channel
from fleet.collectives.header import pack_call
from fleet.collectives.inbox import Key
from fleet.collectives.operation import Operation, Signature
from fleet.errors import SameAddress
from fleet.world import Member

HEARD_WITHIN_S = 20.0  # after all have joined: enough for a lost packet or two, and for a busy machine
ALL_AT_MOST = 16  # ranks of a world in which each rank greets all others


class Unheard(Exception):
    """No greeting came from these ranks of the world in time."""

    def __init__(self, ranks: Sequence[int], within_s: float) -> None:
        super().__init__(ranks)
        self.ranks = ranks
        self.within_s = within_s


def check_addresses(members: Sequence[Member]) -> None:
    """Raises SameAddress if two ranks have one address, such as those of two machines that both advertise 127.0.0.1."""
    seen: dict[str, int] = {}
    for rank, member in enumerate(members):
        before = seen.setdefault(member.address, rank)
        if before != rank:
            first, second = (f"rank {r} (worker {members[r].worker_id}, pid {members[r].pid})" for r in (before, rank))
            raise SameAddress(first, second, member.address)


def partners(rank: int, addresses: Sequence[str], machine: Sequence[int]) -> list[int]:
    """The ranks that `rank` greets, which are also those that greet it. `machine` are the ranks of its own machine.

    In a large world they are the neighbours at distances of 1, 2, 4, ... in both directions, which rings and trees use
    first. That takes about as many messages as a barrier, and no N² connections.
    """
    count = len(addresses)
    near: Sequence[int] = range(count)
    if count > ALL_AT_MOST:
        steps = [1 << power for power in range((count - 1).bit_length())]
        near = sorted({(rank + step) % count for step in steps} | {(rank - step) % count for step in steps})
    mine = _host(addresses[rank])
    return [peer for peer in near if peer not in machine and mine and _host(addresses[peer]) not in ("", mine)]


def greet(channel: Channel, ranks: Sequence[int], deadline: float) -> None:
    """Exchanges greetings with these ranks of the channel. Raises Unheard."""
    started = monotonic()
    deadline = min(deadline, started + HEARD_WITHIN_S)
    greeting = Operation(Signature(pack_call("barrier")), started, deadline - started)
    for rank in ranks:
        channel.send(greeting, rank, 0, 0, b"")
    awaited = {(channel.communicator_id, greeting.sequence, channel.members[rank], 0, 0): rank for rank in ranks}

    def find() -> Key | None:
        return next((key for key in awaited if channel.inbox.has(key)), None)

    while awaited:
        try:
            key, _, _ = channel.inbox.take(find, deadline, channel.look_up)
        except TimeoutError:
            raise Unheard([channel.members[rank] for rank in awaited.values()], deadline - started) from None
        del awaited[key]


def _host(endpoint: str) -> str:
    """The host of an endpoint; empty for a file, which no network leads to."""
    return endpoint.rpartition(":")[0] if endpoint.startswith("tcp:") else ""
