"""Parts of different lengths, which the paths take and no public call has yet: all paths, world sizes and lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from grid import TRANSPORTS, WORLD_SIZES

from fleet.collectives import reduce
from fleet.collectives.communicator import Communicator
from fleet.collectives.header import pack_call
from fleet.collectives.operation import Signature

# Of the part of each rank, repeated: none, one, few, more than what goes without a copy, several blocks.
LENGTHS = [(0,), (1, 0), (3, 1, 0, 7), (0, 20_000, 5), (300_000, 2, 0)]


@pytest.mark.parametrize("dtype", ["int64", "float16"])
@pytest.mark.parametrize("n", WORLD_SIZES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_parts_of_different_lengths(run_world: Any, n: int, transport: str | int, dtype: str) -> None:
    def uneven(comm: Communicator) -> None:
        rank, path, conductor = comm.rank, comm._path, comm._conductor
        for number, some in enumerate(LENGTHS):
            lengths = [some[other % len(some)] for other in range(n)]
            ones = [np.full(length, other + 1, dtype) for other, length in enumerate(lengths)]
            kernel = reduce.kernel("sum", dtype, n, 1.0)
            gather = Signature(pack_call("all_gather", "", dtype, (number,)))
            scatter = Signature(pack_call("reduce_scatter", "sum", dtype, (number,)), kernel)

            found = [np.zeros(length, dtype) for length in lengths]
            conductor.run(gather, path.all_gather, (found, ones[rank]))
            for other, part in enumerate(found):
                assert (part == other + 1).all()

            out = np.zeros(lengths[rank], dtype)
            conductor.run(scatter, path.reduce_scatter, (out, ones))
            assert (out == n * (rank + 1)).all()
            for other, part in enumerate(ones):
                assert (part == other + 1).all(), "the input changed"

    run_world(n, uneven, transport=transport)


def test_a_communicator_says_what_it_is(run_world: Any) -> None:
    def told(comm: Communicator) -> None:
        assert repr(comm) == f"<fleet communicator: rank {comm.rank} of 2, path {comm.path}>"

    run_world(2, told, transport=TRANSPORTS[0])
