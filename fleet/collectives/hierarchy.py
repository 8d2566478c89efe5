"""Path between several hosts with several ranks each: shared memory inside a host, sockets between hosts.

all_reduce: reduce-scatter inside each host into as many shares as the smallest host has ranks, one all-reduce per share
across the hosts, all-gather inside. Each byte crosses the network once per host instead of once per rank, and all ranks
of a host drive the network at once. Halves travel between hosts rounded once per host. The other collectives, but for
broadcast and barrier, go over sockets between all ranks.
Source: the two-level scheme of Jia et al., "Highly Scalable Deep Learning Training System with Mixed-Precision", 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fleet.collectives.buffer import Array
from fleet.collectives.channel import Channel
from fleet.collectives.operation import Operation
from fleet.collectives.shared import SharedPath, share
from fleet.collectives.sockets import SocketPath
from fleet.values import CollectivePath


class HierarchicalPath:
    """Path of the channel's ranks. `hosts` are the ranks of each host, in the order of their first ranks.

    `local` is the path of this host's ranks, None if this rank is the only one.
    """

    name: CollectivePath = "hierarchical"

    def __init__(self, channel: Channel, local: SharedPath | None, hosts: Sequence[Sequence[int]]) -> None:
        self._everyone = everyone = SocketPath(channel)
        self._local = local
        self._channel = channel
        self._hosts = hosts
        self._shares = min(len(host) for host in hosts)
        self._host_of = {rank: number for number, host in enumerate(hosts) for rank in host}
        self.index, self.count = everyone.index, everyone.count
        position = hosts[self._host_of[self.index]].index(self.index)
        # The other collectives go between all ranks.
        self.reduce, self.reduce_scatter, self.scan = everyone.reduce, everyone.reduce_scatter, everyone.scan
        self.all_gather, self.all_to_all = everyone.all_gather, everyone.all_to_all
        self.gather, self.scatter = everyone.gather, everyone.scatter
        # Between the ranks with this one's number on their hosts, if it has a share.
        self._across: SocketPath | None = None
        if position < self._shares:
            self._across = SocketPath(channel, [host[position] for host in hosts])

    def begin(self, operation: Operation) -> None:
        if self._local is not None:
            self._local.begin(operation)
        self._everyone.begin(operation)

    def tell_work(self, operation: Operation, work_s: float) -> None:
        if self._local is not None:
            self._local.tell_work(operation, work_s)
        self._everyone.tell_work(operation, work_s)

    def longest_work(self, operation: Operation) -> float:
        here = self._local.longest_work(operation) if self._local is not None else 0.0
        return max(here, self._everyone.longest_work(operation))

    def all_reduce(self, operation: Operation, flat: Array) -> None:
        local, shares = self._local, self._shares
        if not flat.nbytes:
            self._everyone.all_reduce(operation, flat)
            return
        across = self._across
        if local is None:  # the only rank of its host: there is one share, the whole
            assert across is not None
            across.all_reduce(operation, flat)
            return
        mine = np.empty_like(flat[share(len(flat), local.index, shares)]) if across is not None else None
        local.reduce_to_shares(operation, flat, mine, shares)
        if across is not None and mine is not None:
            self._share_work(operation)
            across.all_reduce(operation, mine)
            self._share_work(operation)
        local.spread_shares(operation, flat, mine, shares)

    def broadcast(self, operation: Operation, flat: Array, root: int) -> None:
        """Between the hosts by one rank each, the root or the first one; then inside each host."""
        host = self._hosts[self._host_of[self.index]]
        first = [ranks[0] for ranks in self._hosts]
        leads = root if self._host_of[root] == self._host_of[self.index] else host[0]
        if self.index == leads:
            ranks = [root if self._host_of[root] == n else rank for n, rank in enumerate(first)]
            SocketPath(self._channel, ranks).broadcast(operation, flat, ranks.index(root))
        if self._local is not None:
            self._local.broadcast(operation, flat, host.index(leads))

    def barrier(self, operation: Operation) -> None:
        local = self._local
        if local is not None:
            local.barrier(operation)
        if self._across is not None and (local is None or local.index == 0):
            self._share_work(operation)
            self._across.barrier(operation)
            self._share_work(operation)
        if local is not None:
            local.barrier(operation)

    def _share_work(self, operation: Operation) -> None:
        """Tells the ranks of this host and of the others what either have told of their work."""
        self.tell_work(operation, self.longest_work(operation))
