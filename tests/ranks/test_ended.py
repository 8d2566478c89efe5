"""A rank that has ended with 0, on every path: who waits for it is told, who does not need it goes on."""

from __future__ import annotations

import threading
from time import monotonic
from typing import Any

import numpy as np
import pytest
from local_rendezvous import ended
from test_mismatch import WAITING

from fleet.collectives.communicator import Communicator
from fleet.errors import RankEnded

AT_ONCE_S = 8.0  # some tenths of a second, on a machine that does much else
PATHS = [(3, "ipc"), (3, "shared"), (4, 2), (3, 2)]


@pytest.mark.parametrize(("n", "transport"), PATHS)
@pytest.mark.parametrize("case", [case for case in WAITING if case != "recv from any"])
def test_who_waits_for_a_rank_that_has_ended_is_told(run_world: Any, n: int, transport: str | int, case: str) -> None:
    waiting = threading.Barrier(n)

    def wait(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == n - 1:
            waiting.wait()
            run_world.tell(ended(n - 1, {0: 1}))
            return
        waiting.wait()
        started = monotonic()

        def calls() -> None:
            WAITING[case](comm)
            comm.barrier()  # a scan over sockets waits only for the ranks before

        with pytest.raises(RankEnded) as caught:
            calls()
        assert monotonic() - started < AT_ONCE_S
        assert caught.value.culprits == [n - 1]
        said = str(caught.value)
        assert said.startswith(f"rank {n - 1} (worker-{n - 1}, host h{n - 1}, pid 812) has ended (exit code 0) ")
        if case == "all_reduce":
            assert "all_reduce(float64[300000], op=sum) #2, which others called at test_mismatch.py:" in said

    run_world(n, wait, transport=transport, timeout_s=30.0)


@pytest.mark.parametrize(("n", "transport"), PATHS)
def test_who_does_not_need_it_goes_on(run_world: Any, n: int, transport: str | int) -> None:
    """It took part in the last collective of all; another communicator and messages between others are none of its."""
    slow, gone = threading.Event(), threading.Event()

    def go_on(comm: Communicator) -> None:
        others = comm.split(0 if comm.rank < n - 1 else 1)
        assert others is not None
        x = np.full(1000, 1.0)  # one block: the last one need not wait for others to take it
        if comm.rank == 1:
            assert slow.wait(30)
        if comm.rank == n - 1:
            comm.gather(None, x, 0)
            run_world.tell(ended(n - 1, {0: 2}))
            gone.set()
            return
        out = np.empty((n, len(x))) if comm.rank == 0 else None
        if comm.rank == 0:
            assert gone.wait(30)
            slow.set()
        comm.gather(out, x, 0)  # rank 0 waits for rank 1, and knows that the last one has ended
        if out is not None:
            assert (out == 1).all()
        for _ in range(3):
            others.all_reduce(x)
        assert (x == (n - 1) ** 3).all()
        if comm.rank == 0:
            comm.send(x, 1)
        elif comm.rank == 1:
            comm.recv(x)

    run_world(n, go_on, transport=transport, timeout_s=30.0)


@pytest.mark.parametrize("transport", ["ipc", "shared"])
def test_one_that_ended_without_a_word_is_named_by_who_waits_for_itself(run_world: Any, transport: str) -> None:

    def wait(comm: Communicator) -> None:
        if comm.rank == 1:
            run_world.tell(ended(1, None))
            return
        with pytest.raises(RankEnded, match=r"rank 1 .* will not call barrier"):
            comm.barrier()

    run_world(2, wait, transport=transport, timeout_s=30.0)


def test_what_it_sent_before_is_received(run_world: Any) -> None:

    def receive(comm: Communicator) -> None:
        x = np.full(100_000, 7.0)
        if comm.rank == 1:
            comm.send(x, 0)
            run_world.tell(ended(1, {0: 0}))
            return
        comm.recv(x, 1)
        assert (x == 7).all()
        with pytest.raises(
            RankEnded, match=r"has ended \(exit code 0\) before recv\(float64\[100000\], tag=0\) from rank 1"
        ):
            comm.recv(x, 1)

    run_world(2, receive, timeout_s=30.0)
