"""Path of a communicator's tensors: the protocol that all paths fulfil, and the path of a communicator of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fleet.collectives.buffer import Array
from fleet.collectives.operation import Operation
from fleet.errors import UsageError
from fleet.values import CollectivePath


class Path(Protocol):
    """Collectives of the ranks of one communicator, over flat arrays of one dtype.

    Every rank calls the same method with the same lengths. A list of parts has one array for each rank, in the order of the
    ranks; their lengths may differ, but for `gather` and `scatter`. Arguments named `out`, `flat` and the parts of `all_gather`
    and `gather` are written. The arithmetic is `operation.kernel`. A method returns when this rank's part is done and its
    memory may be changed again. A method raises TimeoutError after `operation.deadline`, and an error where another rank is
    in a different call; then what was to be written is undefined.
    """

    name: CollectivePath

    def begin(self, operation: Operation) -> None:
        """Lets the other ranks find out which operation this rank is in. Called once before the other methods."""

    def tell_work(self, operation: Operation, work_s: float) -> None:
        """Tells the other ranks how long this rank has worked before the operation. Called between `begin` and its method."""

    def longest_work(self, operation: Operation) -> float:
        """The longest work before the operation of any rank that has told it, as far as this rank has heard; else 0."""

    def all_reduce(self, operation: Operation, flat: Array) -> None:
        """flat = the combination of every rank's `flat`."""

    def reduce(self, operation: Operation, flat: Array, root: int) -> None:
        """As all_reduce, at root only; on the other ranks `flat` stays as it is."""

    def reduce_scatter(self, operation: Operation, out: Array, parts: Sequence[Array]) -> None:
        """out = the combination of every rank's part for this rank."""

    def scan(self, operation: Operation, flat: Array, exclusive: bool) -> None:
        """flat = the combination of the ranks up to this one (exclusive: before it; rank 0's stays as it is)."""

    def broadcast(self, operation: Operation, flat: Array, root: int) -> None:
        """flat = root's `flat`."""

    def all_gather(self, operation: Operation, parts: Sequence[Array], mine: Array) -> None:
        """parts[r] = rank r's `mine`."""

    def gather(self, operation: Operation, parts: Sequence[Array] | None, mine: Array, root: int) -> None:
        """At root, parts[r] = rank r's `mine`; elsewhere `parts` is None."""

    def scatter(self, operation: Operation, out: Array, parts: Sequence[Array] | None, root: int) -> None:
        """out = root's part for this rank; `parts` is None elsewhere."""

    def all_to_all(self, operation: Operation, out: Sequence[Array], parts: Sequence[Array], longest: int) -> None:
        """out[r] = rank r's part for this rank; no part of any rank has more than `longest` elements."""

    def barrier(self, operation: Operation) -> None:
        """Returns once every rank has called it."""


class AlonePath:
    """The path of a communicator of one rank: nothing travels."""

    name: CollectivePath = "alone"

    def begin(self, operation: Operation) -> None:
        pass

    def tell_work(self, operation: Operation, work_s: float) -> None:
        pass

    def longest_work(self, operation: Operation) -> float:
        return 0.0

    def all_reduce(self, operation: Operation, flat: Array) -> None:
        if operation.kernel.finishes:
            operation.kernel.finish_alone(flat)

    def reduce(self, operation: Operation, flat: Array, root: int) -> None:
        operation.kernel.finish_alone(flat)

    def reduce_scatter(self, operation: Operation, out: Array, parts: Sequence[Array]) -> None:
        out[:] = parts[0]
        operation.kernel.finish_alone(out)

    def scan(self, operation: Operation, flat: Array, exclusive: bool) -> None:
        if not exclusive:
            operation.kernel.finish_alone(flat)

    def broadcast(self, operation: Operation, flat: Array, root: int) -> None:
        pass

    def all_gather(self, operation: Operation, parts: Sequence[Array], mine: Array) -> None:
        parts[0][:] = mine

    def gather(self, operation: Operation, parts: Sequence[Array] | None, mine: Array, root: int) -> None:
        assert parts is not None
        parts[0][:] = mine

    def scatter(self, operation: Operation, out: Array, parts: Sequence[Array] | None, root: int) -> None:
        assert parts is not None
        out[:] = parts[0]

    def all_to_all(self, operation: Operation, out: Sequence[Array], parts: Sequence[Array], longest: int) -> None:
        out[0][:] = parts[0]

    def barrier(self, operation: Operation) -> None:
        pass


def all_to_all_uneven(operation: Operation, path: Path, out: Sequence[Array], parts: Sequence[Array]) -> None:
    """all_to_all with parts whose lengths each rank knows of its own alone: they are exchanged first.

    All ranks raise UsageError where what one sends is not what another expects.
    """
    count = len(parts)
    table = np.empty((count, 2 * count), np.int64)
    path.all_gather(operation, list(table), np.array([*map(len, parts), *map(len, out)]))
    sent, room = table[:, :count], table[:, count:].T
    if (sent != room).any():  # all ranks find the same, and none goes on
        source, dst = np.argwhere(sent != room)[0]
        raise UsageError(
            f"rank {source} sends {sent[source, dst]} elements to rank {dst}, whose out has room for "
            f"{room[source, dst]}: x_splits of one must be out_splits of the other"
        )
    path.all_to_all(operation, out, parts, int(sent.max()))
