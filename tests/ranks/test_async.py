"""Several collectives of one rank under way: asynchronous ones in order, communicators side by side, threads, objects."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from grid import TRANSPORTS

from fleet.collectives.communicator import Communicator
from fleet.collectives.work import Work
from fleet.errors import CollectiveTimeout, UsageError

COUNTS = (1, 1000, 70_000, 300_000)


@pytest.mark.parametrize(("n", "transport"), [(1, "ipc"), *((n, t) for n in (2, 5) for t in TRANSPORTS), (3, "tcp")])
def test_asynchronous_calls_go_on_in_order(run_world: Any, n: int, transport: str | int) -> None:
    def calls(comm: Communicator) -> None:
        rank = comm.rank
        chain = np.full(1000, rank, np.int64)
        works: list[Any] = []
        tensors = [np.full(count, rank + step, np.int64) for step, count in enumerate(COUNTS * 3)]
        for x in tensors:
            works.append(comm.all_reduce(x, async_op=True))
        # Each works on the last one's result.
        works.append(comm.all_reduce(chain, async_op=True))
        works.append(comm.broadcast(chain, n - 1, async_op=True))
        works.append(comm.scan(chain, async_op=True))
        gathered, mine = np.empty((n, 9)), np.full(9, rank + 0.5)
        works.append(comm.all_gather(gathered, mine, async_op=True))
        turned = np.empty((n, 9))
        works.append(comm.all_to_all(turned, np.repeat(np.arange(n) + rank * 10.0, 9).reshape(n, 9), async_op=True))
        works.append(comm.barrier(async_op=True))
        assert all(isinstance(work, Work) for work in works)
        after = np.full(5, rank)
        comm.all_reduce(after, "max")  # behind them all
        assert (after == n - 1).all()
        assert all(work.done() for work in works)
        for work in works:
            work.wait()
            assert work.exception() is None
        for step, x in enumerate(tensors):
            assert (x == n * step + n * (n - 1) // 2).all()
        assert (chain == n * (n - 1) // 2 * (rank + 1)).all()
        assert (gathered == np.arange(n)[:, None] + 0.5).all()
        assert (turned == np.arange(n)[:, None] * 10 + rank).all()

    run_world(n, calls, transport=transport)


@pytest.mark.parametrize("transport", ["ipc", "shared"])
def test_an_asynchronous_call_that_fails_says_so_to_whoever_waits(run_world: Any, transport: str) -> None:
    def late(comm: Communicator) -> None:
        if comm.rank == 1:
            return
        first = comm.all_reduce(np.ones(3), timeout_s=0.2, async_op=True)
        second = comm.barrier(async_op=True)
        assert first is not None
        assert second is not None
        if not first.done():
            with pytest.raises(UsageError, match="still goes on"):
                first.exception()
        with pytest.raises(TimeoutError, match=r"still under way after 0\.01 s"):
            first.wait(0.01)
        for work in (first, second):
            with pytest.raises(CollectiveTimeout, match="all_reduce") as caught:
                work.wait()
            assert work.exception() is caught.value

    run_world(2, late, transport=transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_communicators_in_two_threads(run_world: Any, transport: str | int) -> None:
    """Each thread has a communicator of its own; both are under way at once, with messages between two ranks besides."""
    n = 4

    def threads(comm: Communicator) -> None:
        pairs = comm.split(comm.rank % 2)
        everybody = comm.split(0, key=-comm.rank)
        assert pairs is not None
        assert everybody is not None
        failures: list[BaseException] = []

        def work(which: Communicator, want: float, salt: int) -> None:
            try:
                for step in range(40):
                    x = np.full(COUNTS[step % 3], which.rank + step * salt, np.float64)
                    which.all_reduce(x)
                    assert (x == which.world_size * step * salt + want).all()
                    which.barrier()
            except BaseException as error:
                failures.append(error)

        def points() -> None:
            try:
                for step in range(40):
                    x = np.full(20_000, comm.rank + step)
                    comm.send(x, (comm.rank + 1) % n, tag=step % 3)
                    comm.recv(x, (comm.rank - 1) % n, tag=step % 3)
                    assert (x == (comm.rank - 1) % n + step).all()
            except BaseException as error:
                failures.append(error)

        running = [
            threading.Thread(target=work, args=(pairs, 1.0, 3)),
            threading.Thread(target=work, args=(everybody, 6.0, 7)),
            threading.Thread(target=points),
        ]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if failures:
            raise failures[0]
        comm.barrier()

    run_world(n, threads, transport=transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_split(run_world: Any, n: int, transport: str | int) -> None:
    def split(comm: Communicator) -> None:
        rank = comm.rank
        # Turned around, and without the last rank where there are several.
        found = comm.split(None if 0 < rank == n - 1 else rank % 2, key=-rank)
        members = sorted((r for r in range(max(1, n - 1)) if r % 2 == rank % 2), reverse=True)
        if 0 < rank == n - 1:
            assert found is None
        else:
            assert found is not None
            assert found.world_size == len(members)
            assert members[found.rank] == rank
            for count in (3, 70_000):
                x = np.full(count, float(rank))
                found.all_reduce(x)
                assert (x == sum(members)).all()
                x.fill(rank)
                found.broadcast(x, found.world_size - 1)
                assert (x == members[-1]).all()
            everyone = np.empty(found.world_size, np.int64)
            found.all_gather(everyone, np.array([rank]))
            assert everyone.tolist() == members
            if found.world_size > 1:
                to, source = (found.rank + 1) % found.world_size, (found.rank - 1) % found.world_size
                found.send(np.array([rank]), to)
                got = np.array([-1])
                found.recv(got, source)
                assert got == members[source]
            again = found.split(0, key=rank)  # a split of a split
            assert again is not None
            assert again.rank == members[::-1].index(rank)
            again.barrier()
        x = np.full(70_000, 1.0)
        comm.all_reduce(x)  # the old one goes on
        assert (x == n).all()

    run_world(n, split, transport=transport)


@pytest.mark.parametrize(("n", "transport"), [(1, "ipc"), *((3, t) for t in TRANSPORTS)])
def test_objects(run_world: Any, n: int, transport: str | int) -> None:
    def objects(comm: Communicator) -> None:
        everything = {"rank": comm.rank, "text": "ü" * comm.rank, "array": np.arange(50_000)}
        got = comm.broadcast_object(everything if comm.rank == n - 1 else "not looked at", root=n - 1)
        assert got["rank"] == n - 1
        assert (got["array"] == everything["array"]).all()
        assert comm.broadcast_object() is None
        mine = [comm.rank] * (10 ** (comm.rank + 1))  # of very different sizes
        assert comm.all_gather_object(mine) == [[rank] * 10 ** (rank + 1) for rank in range(n)]

    run_world(n, objects, transport=transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_messages_from_any_rank(run_world: Any, transport: str | int) -> None:
    n = 4

    def points(comm: Communicator) -> None:
        if comm.rank:
            for count in (1, 30_000):
                comm.send(np.full(count, comm.rank), 0, tag=count)
            work = comm.send(np.full(30_000, comm.rank), 0, tag=3, async_op=True)
            assert isinstance(work, Work)
            work.wait()
        else:
            for count in (30_000, 1):  # not in the order in which they were sent
                x, sources = np.empty(count, np.int64), []
                for _ in range(n - 1):
                    source = comm.recv(x, tag=count)
                    assert (x == source).all()
                    sources.append(source)
                assert sorted(sources) == [1, 2, 3]
            tensors = [np.empty(30_000, np.int64) for _ in range(n - 1)]
            works = [comm.recv(x, tag=3, async_op=True) for x in tensors]
            for x, work in zip(tensors, works, strict=True):
                assert isinstance(work, Work)
                work.wait()
                assert (x == work.source).all()
            assert sorted(work.source for work in works) == [1, 2, 3]
        comm.barrier()

    run_world(n, points, transport=transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_done_callbacks_run_in_the_progress_thread_and_may_go_on(run_world: Any, transport: str | int) -> None:
    """A callback issues the next collective, as a hook does that reduces one bucket after the other."""
    n, steps = 4, 5

    def chained(comm: Communicator) -> None:
        seen: list[int] = []
        threads: set[str] = set()
        over = threading.Event()
        x = np.ones(1000, np.int64)

        def on_done(work: Work) -> None:
            assert work.exception() is None
            seen.append(int(x[0]))
            threads.add(threading.current_thread().name)
            if len(seen) < steps:
                following = comm.all_reduce(x, async_op=True)
                assert following is not None
                following.add_done_callback(on_done)
            else:
                over.set()

        with comm._endpoint.order.running:  # so that it is not done before the callback is there
            first = comm.all_reduce(x, async_op=True)
            assert first is not None
            first.add_done_callback(on_done)
        assert over.wait(20)
        assert seen == [n**step for step in range(1, steps + 1)]
        assert threads == {"fleet-progress"}
        comm.barrier()

    run_world(n, chained, transport=transport)


def test_collectives_of_a_callback_come_before_later_ones_however_far_the_script_is(run_world: Any) -> None:
    """Rank 0 has made its next call before the callback runs, rank 1 makes it after, and rank 2 calls the callback itself."""

    def hooked(comm: Communicator) -> None:
        x, y, over = np.full(10, 2), np.full(1000, 3), threading.Event()
        told: list[str] = []

        def on_done(_: Work) -> None:
            if comm.rank == 0:
                with pytest.raises(UsageError, match="comes after the callback"):
                    later[0].wait()
                told.append("told")
            comm.all_reduce(x)
            inner = comm.all_reduce(x, async_op=True)
            assert inner is not None
            inner.wait()
            over.set()

        later: list[Work] = []
        held = comm._endpoint.order.running if comm.rank < 2 else threading.Lock()
        with held:
            first = comm.barrier(async_op=True)
            assert first is not None
            if comm.rank == 2:
                first.wait()
            first.add_done_callback(on_done)
            if comm.rank == 0:
                later.append(comm.all_reduce(y, async_op=True))  # type: ignore[arg-type]
        if comm.rank == 0:
            later[0].wait()
        else:
            comm.all_reduce(y)
        assert over.wait(20)
        assert (x == 2 * comm.world_size**2).all()
        assert (y == 3 * comm.world_size).all()
        assert len(told) == (comm.rank == 0)
        comm.barrier()

    run_world(3, hooked)


def test_asynchronous_receives_of_one_tag_are_in_the_order_of_their_calls(run_world: Any) -> None:
    def messages(comm: Communicator) -> None:
        for _ in range(20):
            if comm.rank == 0:
                for number in range(6):
                    comm.send(np.full(3, number), 1)
                comm.recv(np.empty(3, np.int64), 1)
            else:
                got = np.empty((6, 3), np.int64)
                works = [comm.recv(row, 0, async_op=True) for row in got[:5]]
                assert comm.recv(got[5], 0) == 0  # after the others, too
                for work in works:
                    assert isinstance(work, Work)
                    work.wait()
                    assert work.source == 0
                assert got[:, 0].tolist() == list(range(6))
                comm.send(got[0], 0)

    run_world(2, messages)


def test_an_asynchronous_receive_whose_turn_does_not_come_in_time_says_from_whom(run_world: Any) -> None:
    def late(comm: Communicator) -> None:
        if comm.rank == 0:
            first = comm.recv(np.empty(3), 1, async_op=True)
            second = comm.recv(np.empty(3), 1, async_op=True, timeout_s=0.1)
            assert isinstance(first, Work)
            assert isinstance(second, Work)
            with pytest.raises(CollectiveTimeout, match="from rank 1"):
                second.wait()
            comm.barrier()
            first.wait()
        else:
            comm.barrier()
            comm.send(np.ones(3), 0)

    run_world(2, late)


def test_callbacks_of_messages_between_two_ranks(run_world: Any) -> None:
    def messages(comm: Communicator) -> None:
        over, x = threading.Event(), np.empty(30_000)
        if comm.rank == 0:
            sent = comm.send(np.full(30_000, 7.0), 1, async_op=True)
            assert sent is not None
            sent.add_done_callback(lambda _: over.set())
        else:
            received = comm.recv(x, async_op=True)
            assert isinstance(received, Work)
            # A message back, from the thread that received.
            received.add_done_callback(lambda work: over.set() if work.source == 0 and x[0] == 7 else None)
        assert over.wait(20)
        comm.barrier()

    run_world(2, messages)


def test_a_communicator_that_a_callback_closes_waits_for_nothing(run_world: Any) -> None:
    def closes(comm: Communicator) -> None:
        over, child = threading.Event(), comm.split(0)
        assert child is not None
        with child._endpoint.order.running:
            work = child.barrier(async_op=True)
            assert work is not None
            work.add_done_callback(lambda _: (child.close(), over.set()))  # type: ignore[func-returns-value]
        assert over.wait(20)
        comm.barrier()

    run_world(2, closes)


def test_a_callback_of_a_message_that_waited_may_not_wait_for_the_next_ones(run_world: Any) -> None:
    count, go = 3000, threading.Event()  # more than the queues of both ends take

    def messages(comm: Communicator) -> None:
        x, told = np.ones(1), []
        if comm.rank == 1:
            go.wait(20)
            for _ in range(count):
                comm.recv(x, 0)
            return
        works = [comm.send(x, 1, async_op=True) for _ in range(count)]
        waiting = [work for work in works if work is not None and not work.done()]
        assert len(waiting) > 2

        def waits_for_itself(_: Work) -> None:
            try:
                comm.send(x, 1)
            except UsageError as error:
                told.append(str(error))

        waiting[1].add_done_callback(waits_for_itself)
        go.set()
        waiting[-1].wait()
        assert len(told) == 1
        assert "would wait for a call that comes after the callback" in told[0]

    run_world(2, messages)
