"""Errors that tell the caller or the script what to change, and garbage of strangers that ends no rank."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fleet.collectives.communicator import Communicator
from fleet.collectives.generations import RankActivity
from fleet.errors import CollectiveMismatch, CollectiveTimeout, Late, UsageError
from tests.wanted import torch

Signature = Callable[[Communicator], None]


def read_only(*shape: int) -> Any:
    x = np.zeros(shape)
    x.flags.writeable = False
    return x


# In a world of three, on any rank but the ones that a call names: what is wrong, and words of the answer.
ILLEGAL: list[tuple[Signature, str]] = [
    (lambda comm: comm.all_reduce([1.0, 2.0]), "x is a list: it must be a NumPy array or a torch CPU tensor"),
    (lambda comm: comm.all_reduce(3.0), "x is a float"),
    (lambda comm: comm.all_reduce(None), "x is a NoneType"),
    (lambda comm: comm.all_reduce(np.float64(3)), "x is a float64"),
    (lambda comm: comm.all_reduce(np.array([1, None], object)), "dtype object: it must be one of bool"),
    (lambda comm: comm.all_reduce(np.array(["a"])), "dtype <U1"),
    (lambda comm: comm.all_reduce(np.zeros(2, "datetime64[s]")), "dtype datetime64"),
    (lambda comm: comm.all_reduce(np.zeros(2, ">f4")), "dtype >f4"),
    (lambda comm: comm.all_reduce(np.zeros(2, [("a", "f4")])), "must be one of"),
    (lambda comm: comm.all_reduce(np.zeros(2, np.longdouble)), "must be one of"),
    (lambda comm: comm.all_reduce(read_only(3)), "x is read-only, and this call writes to it"),
    (lambda comm: comm.broadcast(read_only(3), root=(comm.rank + 1) % 3), "x is read-only"),
    (lambda comm: comm.all_gather(read_only(6), np.zeros(2)), "out is read-only"),
    (lambda comm: comm.reduce_scatter(read_only(2), np.zeros(6)), "out is read-only"),
    (lambda comm: comm.recv(read_only(2), (comm.rank + 1) % 3), "x is read-only"),
    (lambda comm: comm.all_reduce(np.zeros(2), "avg"), "op is 'avg': it must be one of sum, mean"),
    (lambda comm: comm.all_reduce(np.zeros(2, int), "mean"), "mean of int64"),
    (lambda comm: comm.reduce_scatter(np.zeros(2, complex), np.zeros(6, complex), "max"), "complex128 has no order"),
    (lambda comm: comm.broadcast(np.zeros(2), root=3), "root is 3: ranks of this world are 0 to 2"),
    (lambda comm: comm.broadcast(np.zeros(2), root=-1), "root is -1"),
    (lambda comm: comm.send(np.zeros(2), 3), "dst is 3"),
    (lambda comm: comm.recv(np.zeros(2), -1), "src is -1"),
    (lambda comm: comm.gather(None, np.zeros(2), comm.rank), "out is a NoneType"),
    (lambda comm: comm.scan(np.zeros(2), "mean"), "scan knows no mean"),
    (lambda comm: comm.all_reduce(np.zeros(2), "band"), "band works on bits"),
    (lambda comm: comm.all_reduce(np.zeros(2), wire="bf16"), "goes with float32 only"),
    (lambda comm: comm.all_to_all(np.zeros(4), np.zeros(4)), "out has 4 rows, which do not divide by 3"),
    (lambda comm: comm.all_to_all(np.zeros(3), np.zeros(3), [1, 1, 2]), r"out_splits is \[1, 1, 2\]"),
    (lambda comm: comm.split(-1), "color is -1"),
    (lambda comm: comm.send(np.zeros(2), (comm.rank + 1) % 3, tag=-1), "tag is -1"),
    (lambda comm: comm.recv(np.zeros(2), (comm.rank + 1) % 3, tag=2**31), "tag is 2147483648"),
    (lambda comm: comm.send(np.zeros(2), comm.rank), "dst is this rank itself"),
    (lambda comm: comm.recv(np.zeros(2), comm.rank), "src is this rank itself"),
    (lambda comm: comm.all_gather(np.zeros(5), np.zeros(2)), r"out has shape \[5\].*must be \[6\] or \[3, 2\]"),
    (lambda comm: comm.all_gather(np.zeros((2, 3)), np.zeros(2)), r"out has shape \[2, 3\]"),
    (lambda comm: comm.all_gather(np.zeros(()), np.zeros(())), r"out has shape \[\].*must be \[3\]"),
    (lambda comm: comm.reduce_scatter(np.zeros(2), np.zeros(7)), r"x has shape \[7\].*must be \[6\] or \[3, 2\]"),
    (lambda comm: comm.reduce_scatter(np.zeros(6), np.zeros(2)), r"x has shape \[2\]"),
    (lambda comm: comm.all_gather(np.zeros(6, "f4"), np.zeros(2)), "out has dtype float32 and x has float64"),
    (lambda comm: comm.reduce_scatter(np.zeros(2, "i4"), np.zeros(6)), "x has dtype float64 and out has int32"),
]
if torch:
    ILLEGAL += [
        (lambda comm: comm.all_reduce(torch.zeros(1).expand(4)), "x is an expanded view"),
        (lambda comm: comm.all_reduce(torch.zeros(3, 1).expand(3, 4)), "x is an expanded view"),
        (lambda comm: comm.all_reduce(torch.zeros(2).to_sparse()), "sparse"),
        (lambda comm: comm.all_reduce(torch.zeros(2, dtype=torch.complex64).conj()), "conjugated"),
        (lambda comm: comm.all_reduce(torch.zeros(2, device="meta")), "x is on meta: move it to the CPU first"),
        (lambda comm: comm.all_reduce(torch.zeros(2, dtype=torch.float8_e4m3fn)), "dtype torch.float8_e4m3fn"),
    ]


def test_illegal_calls_send_nothing_and_break_nothing(run_world: Any) -> None:
    def illegal(comm: Communicator) -> None:
        for call, words in ILLEGAL:
            with pytest.raises(UsageError, match=words):
                call(comm)
            assert comm._endpoint.order.recorder.last is None
        x = np.ones(3)
        comm.all_reduce(x)
        assert (x == 3).all()

    run_world(3, illegal)


def test_after_close_every_call_is_illegal(run_world: Any) -> None:
    def closed(comm: Communicator) -> None:
        comm.barrier()
        comm.close()
        comm.close()
        peer = 1 - comm.rank
        calls: list[Signature] = [
            lambda comm: comm.all_reduce(np.zeros(2)),
            lambda comm: comm.barrier(),
            lambda comm: comm.send(np.zeros(2), peer),
            lambda comm: comm.recv(np.zeros(2), peer),
        ]
        for call in calls:
            with pytest.raises(UsageError, match="closed"):
                call(comm)

    run_world(2, closed)


def test_a_world_of_one_has_no_peers(run_world: Any) -> None:
    def alone(comm: Communicator) -> None:
        with pytest.raises(UsageError, match="this rank itself"):
            comm.send(np.zeros(2), 0)
        with pytest.raises(UsageError, match="dst is 1"):
            comm.send(np.zeros(2), 1)
        comm.close()
        with pytest.raises(UsageError, match="closed"):
            comm.barrier()

    run_world(1, alone)


# What rank 0 calls, what all others call, and how both calls are written.
DIFFERENT: list[tuple[Signature, Signature, str, str]] = [
    (
        lambda comm: comm.all_reduce(np.ones(4)),
        lambda comm: comm.all_reduce(np.ones(5)),
        "all_reduce(float64[4], op=sum)",
        "all_reduce(float64[5], op=sum)",
    ),
    (
        lambda comm: comm.all_reduce(np.ones(4), "sum"),
        lambda comm: comm.all_reduce(np.ones(4), "max"),
        "all_reduce(float64[4], op=sum)",
        "all_reduce(float64[4], op=max)",
    ),
    (
        lambda comm: comm.all_reduce(np.ones(40_000, np.float32)),
        lambda comm: comm.all_reduce(np.ones(40_000, np.int32)),
        "all_reduce(float32[40000], op=sum)",
        "all_reduce(int32[40000], op=sum)",
    ),
    (
        lambda comm: comm.all_reduce(np.ones((2, 6))),
        lambda comm: comm.all_reduce(np.ones((6, 2))),
        "all_reduce(float64[2, 6], op=sum)",
        "all_reduce(float64[6, 2], op=sum)",
    ),
    (
        lambda comm: comm.all_reduce(np.ones(2)),
        lambda comm: comm.all_reduce(np.ones(40_000)),  # another algorithm, too
        "all_reduce(float64[2], op=sum)",
        "all_reduce(float64[40000], op=sum)",
    ),
    (
        lambda comm: comm.broadcast(np.ones(4), root=0),
        lambda comm: comm.broadcast(np.ones(4), root=1),
        "broadcast(float64[4], root=0)",
        "broadcast(float64[4], root=1)",
    ),
    (
        lambda comm: comm.barrier(),
        lambda comm: comm.all_reduce(np.ones(4)),
        "barrier()",
        "all_reduce(float64[4], op=sum)",
    ),
    (
        lambda comm: comm.all_gather(np.ones((comm.world_size, 4)), np.ones(4)),
        lambda comm: comm.reduce_scatter(np.ones(4), np.ones((comm.world_size, 4))),
        "all_gather(float64[4])",
        "reduce_scatter(float64[{n}, 4], op=sum)",
    ),
]


@pytest.mark.parametrize("transport", ["ipc", "shared"])
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("case", range(len(DIFFERENT)))
def test_different_calls_name_both(run_world: Any, n: int, case: int, transport: str) -> None:
    first, others, first_text, others_text = DIFFERENT[case]

    def differ(comm: Communicator) -> None:
        comm.barrier()
        (others if comm.rank else first)(comm)
        comm.barrier()  # a root goes on, and learns of it here

    # A rank that nobody sends anything sees a peer that is late: without agents it cannot ask why.
    results = run_world.caught(n, differ, timeout_s=1.0, transport=transport)
    found = [error for error in results if isinstance(error, CollectiveMismatch)]
    assert found, results
    for error in found:
        assert {error.rank == 0, error.peer == 0} == {True, False}
        assert error.sequence == 2
        assert first_text in str(error)
        assert others_text.format(n=n) in str(error)
        assert f"rank {error.rank} called {error.call} at test_errors.py:" in str(error)
    assert all(error is None or isinstance(error, CollectiveMismatch | CollectiveTimeout) for error in results), results


def test_ranks_that_wait_for_each_other_learn_why(run_world: Any) -> None:
    """Each takes the other for the root, so nobody sends: only asking tells, also the one that asks second."""
    comms: dict[int, Communicator] = {}

    def ask(rank: int) -> list[RankActivity]:
        peer = comms[rank]
        operation = peer._endpoint.order.recorder.last
        assert operation is not None
        late = Late(rank, "h", 1, f"is in or after collective #{operation.sequence}")
        return [RankActivity(late, operation.sequence, not operation.ended, str(operation.signature), operation.where)]

    def differ(comm: Communicator) -> None:
        comms[comm.rank] = comm
        comm.barrier()
        comm.broadcast(np.ones(4), root=1 - comm.rank, timeout_s=0.2 + 0.3 * comm.rank)

    results = run_world.caught(2, differ, inquire=[lambda *_: ask(1), lambda *_: ask(0)])
    assert isinstance(results[0], CollectiveMismatch), results[0]
    assert "root=1" in str(results[0])
    assert "root=0" in str(results[0])
    assert "every rank is inside this same collective" not in str(results[1]), "rank 0 had left it, with an error"


def test_a_mismatch_breaks_the_communicator(run_world: Any) -> None:
    def differ(comm: Communicator) -> None:
        with pytest.raises((CollectiveMismatch, CollectiveTimeout)) as caught:
            comm.all_reduce(np.ones(4 + comm.rank))
        depths = []
        for _ in range(3):
            with pytest.raises(type(caught.value)) as again:
                comm.barrier()
            depths.append(len(traceback.extract_tb(again.value.__traceback__)))
        assert len(set(depths)) == 1, "what an earlier call went through is shown with a later one"
        raise caught.value

    results = run_world.caught(2, differ, timeout_s=1.0)
    assert any(isinstance(error, CollectiveMismatch) for error in results), results


def test_point_to_point_mismatch(run_world: Any) -> None:
    def differ(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.send(np.ones(3, np.float32), 1, tag=4)
            return
        with pytest.raises(CollectiveMismatch) as caught:
            comm.recv(np.ones((3, 1), np.float32), 0, tag=4)
        assert "rank 1 called recv(float32[3, 1], tag=4)" in str(caught.value)
        assert "rank 0 called send(float32[3], tag=4)" in str(caught.value)
        assert "point-to-point" in str(caught.value)

    run_world(2, differ)


LATE_CALLS: list[Signature] = [
    lambda comm: comm.all_reduce(np.ones(3)),
    lambda comm: comm.all_reduce(np.ones(70_000)),
    lambda comm: comm.all_gather(np.ones(9), np.ones(3)),
    lambda comm: comm.broadcast(np.ones(3), root=2),
    lambda comm: comm.barrier(),
]


@pytest.mark.parametrize("transport", ["ipc", "shared"])
@pytest.mark.parametrize("case", range(len(LATE_CALLS)))
def test_a_rank_that_does_not_come(run_world: Any, case: int, transport: str) -> None:
    def late(comm: Communicator) -> None:
        if comm.rank == 2:
            return
        with pytest.raises(
            CollectiveTimeout, match=r"#1 at test_errors.py:\d+ in .*: not complete after 0\.5 s"
        ) as caught:
            LATE_CALLS[case](comm)
        assert caught.value.rank == comm.rank
        assert caught.value.sequence == 1
        assert caught.value.waited_s == 0.5
        assert comm._endpoint.order.recorder.last.ended
        for again in LATE_CALLS:
            with pytest.raises(CollectiveTimeout) as repeated:
                again(comm)
            assert repeated.value is caught.value
        with pytest.raises(CollectiveTimeout):
            comm.send(np.ones(1), 1 - comm.rank)

    run_world(3, late, timeout_s=0.5, transport=transport)


def test_the_timeout_of_one_call_wins(run_world: Any) -> None:
    def late(comm: Communicator) -> None:
        if comm.rank == 0:
            with pytest.raises(CollectiveTimeout) as caught:
                comm.barrier(timeout_s=0.2)
            assert caught.value.waited_s == 0.2

    run_world(2, late, timeout_s=30.0)


def test_the_late_are_named(run_world: Any) -> None:
    """What the agents know, here told by a stand-in, decides what a timeout says."""
    absent = RankActivity(Late(1, "h1", 812, "is at train.py:41 in load_batch"), 0, False, "")
    elsewhere = RankActivity(Late(1, "h1", 812, "is in collective #1"), 1, True, "barrier()")
    slow = RankActivity(Late(1, "h1", 812, "is in collective #1"), 1, True, "all_reduce(float64[3], op=sum)")

    def wait(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.all_reduce(np.ones(3), timeout_s=0.1)

    def error_with(known: RankActivity) -> Exception:
        return run_world.caught(2, wait, inquire=[lambda *_: [known], None])[0]

    error = error_with(absent)
    assert isinstance(error, CollectiveTimeout)
    assert list(error.late) == [absent.late]
    assert "rank 0 came, waiting for rank 1 (h1, pid 812): it is at train.py:41 in load_batch" in str(error)
    error = error_with(elsewhere)
    assert isinstance(error, CollectiveMismatch)
    assert "barrier()" in str(error)
    error = error_with(slow)
    assert isinstance(error, CollectiveTimeout)
    assert "slow, not stuck" in str(error)


def test_a_receive_in_vain_breaks_nothing(run_world: Any) -> None:
    gave_up = threading.Event()

    def vain(comm: Communicator) -> None:
        x = np.zeros(3)
        if comm.rank == 0:
            assert gave_up.wait(20)
            comm.send(np.ones(3), 1)
        else:
            with pytest.raises(CollectiveTimeout, match=r"from rank 0 on rank 1: not complete after 0\.2 s"):
                comm.recv(x, 0, timeout_s=0.2)
            assert (x == 0).all()
            gave_up.set()
            comm.recv(x, 0)
            assert (x == 1).all()
        comm.all_reduce(x)

    run_world(2, vain)
