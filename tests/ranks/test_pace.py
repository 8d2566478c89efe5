"""Ranks hear on every path which of them has worked longest before a meeting, and count their wait for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fleet.collectives.communicator import Communicator
from fleet.collectives.pace import Pace
from fleet.values import MEETINGS

WORKED_S = 100.0


def pace_of(comm: Communicator) -> Pace:
    fabric = comm._endpoint.fabric
    assert fabric is not None
    return fabric.generation.pace


def meet(comm: Communicator, name: str, count: int) -> None:
    n, x = comm.world_size, np.ones(count * comm.world_size, np.float32)
    if name == "all_reduce":
        comm.all_reduce(x)
    elif name == "all_gather":
        comm.all_gather(x, np.ones(count, np.float32))
    elif name == "reduce_scatter":
        comm.reduce_scatter(np.empty(count, np.float32), x.reshape(n, count))
    elif name == "all_to_all":
        comm.all_to_all(np.empty((n, count), np.float32), x.reshape(n, count))
    else:
        comm.barrier()


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("transport", ["ipc", "shared", 2])
def test_all_ranks_hear_of_the_longest_work(run_world: Any, transport: str | int, n: int) -> None:
    def paced(comm: Communicator) -> None:
        pace, recorder = pace_of(comm), comm._endpoint.order.recorder
        comm.barrier()
        for slow, count in ((n - 1, 10), (0, 100_000), (n // 2, 0)):
            for name in sorted(MEETINGS):
                waited_s, squares = pace.waited_s, pace.waited_squares
                # As if this rank had worked so long: a rank's work begins when it leaves a meeting.
                pace.left -= WORKED_S * (2 if comm.rank == slow else 1)
                meet(comm, name, count)
                assert recorder.last is not None
                longest_s = comm._path.longest_work(recorder.last)
                assert 2 * WORKED_S <= longest_s < 2.5 * WORKED_S, (name, count, longest_s)
                if comm.rank == slow:
                    assert pace.waited_s == pytest.approx(waited_s, abs=1e-9)  # work is told in whole ns on some paths
                else:
                    took_s = recorder.last.ended - recorder.last.started
                    assert pace.waited_s == pytest.approx(waited_s + took_s)  # no rank waits longer than its call takes
                    assert pace.waited_squares == pytest.approx(squares + took_s**2)

    run_world(n, paced, transport=transport)


@pytest.mark.parametrize("transport", ["ipc", "shared", 2])
def test_work_before_a_broadcast_counts_at_the_next_meeting(run_world: Any, transport: str | int) -> None:
    def paced(comm: Communicator) -> None:
        pace, recorder = pace_of(comm), comm._endpoint.order.recorder
        comm.barrier()
        pace.left -= WORKED_S * (2 if comm.rank == 1 else 1)
        comm.broadcast(np.ones(3), root=1)
        comm.reduce(np.ones(3), root=0)
        comm.barrier()
        assert recorder.last is not None
        assert comm._path.longest_work(recorder.last) > 2 * WORKED_S
        comm.barrier()  # the work has been told, and does not count again
        assert comm._path.longest_work(recorder.last) < WORKED_S

    run_world(4, paced, transport=transport)


def test_a_wait_for_a_message_is_no_work(run_world: Any) -> None:
    def paced(comm: Communicator) -> None:
        pace = pace_of(comm)
        comm.barrier()
        left, x = pace.left, np.ones(3)
        if comm.rank == 0:
            comm.send(x, 1)
        else:
            comm.recv(x, 0)
            assert pace.left > left
        comm.barrier()

    run_world(2, paced)


def test_nothing_is_told_where_no_pace_is_kept(run_world: Any) -> None:
    def paced(comm: Communicator) -> None:
        pace, recorder = pace_of(comm), comm._endpoint.order.recorder
        comm._conductor._pace = pace = Pace(is_kept=False)
        comm.barrier()
        pace.left -= WORKED_S
        comm.barrier()
        assert recorder.last is not None
        assert comm._path.longest_work(recorder.last) == pace.waited_s == 0.0

    run_world(2, paced, transport="shared")
