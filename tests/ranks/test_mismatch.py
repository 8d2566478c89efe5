"""Ranks that differ or do not come, on every path: told at once, both calls and lines named; a lost world ends all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np
import pytest
from local_rendezvous import killed

from fleet.collectives.communicator import Communicator
from fleet.collectives.generations import RankActivity
from fleet.errors import CollectiveMismatch, CollectiveTimeout, Late, UsageError, WorldChanged, rank_set

Signature = Callable[[Communicator], Any]

AT_ONCE_S = 5.0  # a tenth of a second, on a machine that does much else

# The last rank's call, all others' call, and how both are written.
DIFFERENT: dict[str, tuple[Signature, Signature, str, str]] = {
    "op": (
        lambda comm: comm.all_reduce(np.ones(9), "max"),
        lambda comm: comm.all_reduce(np.ones(9)),
        "all_reduce(float64[9], op=max)",
        "all_reduce(float64[9], op=sum)",
    ),
    "large op": (
        lambda comm: comm.all_reduce(np.ones(300_000), "max"),
        lambda comm: comm.all_reduce(np.ones(300_000)),
        "all_reduce(float64[300000], op=max)",
        "all_reduce(float64[300000], op=sum)",
    ),
    "dtype": (
        lambda comm: comm.all_reduce(np.ones(9, np.int32)),
        lambda comm: comm.all_reduce(np.ones(9, np.float32)),
        "all_reduce(int32[9], op=sum)",
        "all_reduce(float32[9], op=sum)",
    ),
    "size": (
        lambda comm: comm.all_reduce(np.ones(10)),
        lambda comm: comm.all_reduce(np.ones(100_000)),
        "all_reduce(float64[10], op=sum)",
        "all_reduce(float64[100000], op=sum)",
    ),
    "root of a reduction": (
        lambda comm: comm.reduce(np.ones(9), 1),
        lambda comm: comm.reduce(np.ones(9), 0),
        "reduce(float64[9], op=sum, root=1)",
        "reduce(float64[9], op=sum, root=0)",
    ),
    "root of a broadcast": (
        lambda comm: comm.broadcast(np.ones(9), 1),
        lambda comm: comm.broadcast(np.ones(9), 0),
        "broadcast(float64[9], root=1)",
        "broadcast(float64[9], root=0)",
    ),
    "collective": (
        lambda comm: comm.barrier(),
        lambda comm: comm.scan(np.ones(9)),
        "barrier()",
        "scan(float64[9], op=sum)",
    ),
    "wire": (
        lambda comm: comm.all_reduce(np.ones(9, np.float32), wire="bf16"),
        lambda comm: comm.all_reduce(np.ones(9, np.float32)),
        "all_reduce(float32[9], op=sum, wire=bf16)",
        "all_reduce(float32[9], op=sum)",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize(
    ("n", "transport"), [(3, "ipc"), (2, "tcp"), (2, "shared"), (3, "shared"), (4, 2), (3, 2), (5, 3)]
)
def test_a_mismatch_is_found_at_once(run_world: Any, n: int, transport: str | int, case: str) -> None:
    last, others, last_text, others_text = DIFFERENT[case]

    def differ(comm: Communicator) -> float:
        comm.barrier()
        started = monotonic()

        def calls() -> None:
            (last if comm.rank == n - 1 else others)(comm)
            comm.barrier()  # a root goes on, and learns of it here

        with pytest.raises((CollectiveMismatch, CollectiveTimeout)) as caught:
            calls()
        if isinstance(caught.value, CollectiveMismatch):
            assert monotonic() - started < AT_ONCE_S
        raise caught.value

    results = run_world.caught(n, differ, transport=transport, timeout_s=1.0)
    found = [error for error in results if isinstance(error, CollectiveMismatch)]
    assert found, results
    for error in found:
        assert {error.rank == n - 1, error.peer == n - 1} == {True, False}
        assert last_text in str(error)
        assert others_text in str(error)
    # One that waits for a rank that has left with an error learns of it from its agent, which there is none of here.
    assert all(isinstance(error, CollectiveMismatch | CollectiveTimeout) for error in results), results


@pytest.mark.parametrize("case", ["op", "large op", "size", "root of a broadcast", "collective"])
def test_hosts_that_differ(run_world: Any, case: str) -> None:
    """The ranks of each host agree among themselves, so only what goes between the hosts can tell."""
    last, others, last_text, others_text = DIFFERENT[case]

    def differ(comm: Communicator) -> None:
        comm.barrier()
        (last if comm.rank > 1 else others)(comm)
        comm.barrier()

    results = run_world.caught(4, differ, transport=2, timeout_s=1.0)
    found = [error for error in results if isinstance(error, CollectiveMismatch)]
    assert found, results
    assert all(last_text in str(error) and others_text in str(error) for error in found)
    assert all(isinstance(error, CollectiveMismatch | CollectiveTimeout) for error in results), results


@pytest.mark.parametrize("transport", ["ipc", "shared"])
def test_both_lines_are_named(run_world: Any, transport: str) -> None:
    """This rank's own line is known here; its peer's comes from the agents, for whom the test stands in."""
    comms: dict[int, Communicator] = {}

    def ask(rank: int) -> list[RankActivity]:
        record = comms[rank]._endpoint.order.recorder.last
        assert record is not None
        late = Late(rank, "h", 1, "is somewhere")
        return [RankActivity(late, record.sequence, not record.ended, str(record.signature), record.where)]

    def differ(comm: Communicator) -> None:
        comms[comm.rank] = comm
        comm.barrier()
        if comm.rank:
            comm.all_reduce(np.ones(4), "max")  # this line
        else:
            comm.all_reduce(np.ones(4), "min")  # and this one

    results = run_world.caught(2, differ, transport=transport, inquire=[lambda *_: ask(1), lambda *_: ask(0)])
    lines = {error.rank: error.line for error in results if isinstance(error, CollectiveMismatch)}
    assert len(lines) == 2, results
    assert len(set(lines.values())) == 2
    for error in results:
        assert error.line.startswith("test_mismatch.py:")
        assert error.line.endswith(" in differ")
        assert error.peer_line == lines[error.peer]
        for rank, op in ((0, "min"), (1, "max")):
            assert f"rank {rank} called all_reduce(float64[4], op={op}) at {lines[rank]}" in str(error)
        assert "#1 barrier()" in error.recent[-2]
        assert "#2 all_reduce(float64[4]" in error.recent[-1]
    assert len({str(error) for error in results}) == 1, "both say the same"


# Everything that waits for all or for the last rank.
WAITING: dict[str, Signature] = {
    "small all_reduce": lambda comm: comm.all_reduce(np.ones(3)),
    "all_reduce": lambda comm: comm.all_reduce(np.ones(300_000)),
    "half all_reduce": lambda comm: comm.all_reduce(np.ones(300_000, np.float16)),
    "reduce_scatter": lambda comm: comm.reduce_scatter(np.ones(3), np.ones(3 * comm.world_size)),
    "scan": lambda comm: comm.scan(np.ones(3)),
    "broadcast": lambda comm: comm.broadcast(np.ones(3), root=comm.world_size - 1),
    "scatter": lambda comm: comm.scatter(np.ones(3), None, root=comm.world_size - 1),
    "all_gather": lambda comm: comm.all_gather(np.ones(3 * comm.world_size), np.ones(3)),
    "all_to_all": lambda comm: comm.all_to_all(np.ones(comm.world_size), np.ones(comm.world_size)),
    "barrier": lambda comm: comm.barrier(),
    "split": lambda comm: comm.split(0),
    "all_gather_object": lambda comm: comm.all_gather_object("x"),
    "empty": lambda comm: comm.empty(3),
    "recv": lambda comm: comm.recv(np.ones(3), comm.world_size - 1),
    "recv from any": lambda comm: comm.recv(np.ones(3)),
}


@pytest.mark.parametrize(("n", "transport"), [(3, "ipc"), (3, "shared"), (4, 2), (3, 2)])
@pytest.mark.parametrize("case", WAITING)
def test_a_lost_world_ends_every_wait(run_world: Any, n: int, transport: str | int, case: str) -> None:
    waiting = threading.Barrier(n)

    def wait(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == n - 1:
            waiting.wait()
            run_world.tell(killed(n - 1))
            return
        waiting.wait()
        started = monotonic()

        def calls() -> None:
            WAITING[case](comm)
            comm.barrier()  # a scan over sockets waits only for the ranks before

        with pytest.raises(WorldChanged, match=rf"rank {n - 1} \(worker-{n - 1}, .* pid 812\) is gone: killed"):
            calls()
        assert monotonic() - started < AT_ONCE_S
        with pytest.raises(WorldChanged):
            comm.barrier()

    run_world(n, wait, transport=transport, timeout_s=30.0)


@pytest.mark.parametrize(("n", "transport"), [(3, "ipc"), (3, "shared"), (4, 2)])
def test_a_timeout_names_who_is_late(run_world: Any, n: int, transport: str | int) -> None:
    """With what the agents know, for whom the test stands in; and the ranks that came."""
    last = Late(n - 1, "h2", 812, "is at train.py:41 in load_batch")
    known = [
        *(
            RankActivity(Late(r, "h", 1, "is inside"), 2, True, "all_reduce(float64[3], op=sum)", "a.py:1")
            for r in range(n - 1)
        ),
        RankActivity(last, 1, False, "barrier()", "train.py:41 in load_batch"),
    ]

    def late(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == n - 1:
            return
        with pytest.raises(CollectiveTimeout) as caught:
            comm.all_reduce(np.ones(3), timeout_s=0.3)
        error = caught.value
        assert list(error.late) == [last]
        assert error.culprits == [n - 1]
        came = rank_set(range(n - 1), n)
        assert f"ranks {came} came, waiting for rank {n - 1} (h2, pid 812): it is at train.py:41" in str(error)
        assert str(error).startswith(f"all_reduce(float64[3], op=sum) #2 at {error.line}: not complete after 0.3 s")
        assert "\n" not in str(error)

    run_world(n, late, transport=transport, inquire=[lambda *_: known] * n)


def test_a_timeout_in_shared_memory_names_who_is_late_without_agents(run_world: Any) -> None:
    def late(comm: Communicator) -> None:
        if comm.rank == 1:
            return
        with pytest.raises(CollectiveTimeout, match=r"waiting for rank 1 .*has not come"):
            comm.barrier(timeout_s=0.2)

    run_world(3, late, transport="shared")


@pytest.mark.parametrize("transport", ["ipc", "shared"])
def test_splits_that_do_not_fit_are_refused_by_all(run_world: Any, transport: str) -> None:
    """Also by the ranks whose own splits do: nobody waits for data that was never sent."""

    def uneven(comm: Communicator) -> None:
        x_splits = [2, 2, 2] if comm.rank == 0 else [1, 1, 1]
        comm.all_to_all(np.zeros(4), np.zeros(sum(x_splits)), [2, 1, 1] if comm.rank < 2 else [1, 1, 2], x_splits)

    results = run_world.caught(3, uneven, transport=transport, timeout_s=10.0)
    for error in results:
        assert isinstance(error, UsageError)
        assert str(error).startswith("rank 0 sends 2 elements to rank 2, whose out has room for 1: x_splits of one")
