"""Deadlines that hold whatever else goes on: full queues, other messages, other threads' calls, ranks that stay away."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest

from fleet.bus.lock import Lock
from fleet.bus.mesh import Mesh
from fleet.collectives.communicator import Communicator
from fleet.errors import CollectiveTimeout, UsageError

SOON_S = 8.0  # what takes some tenths of a second, on a machine that does much else
LONG_S = 60.0


@contextmanager
def meshes(tmp_path: Path, count: int) -> Iterator[list[Mesh]]:
    made = [Mesh(Lock(), f"ipc://{tmp_path}/m{number}") for number in range(count)]
    try:
        yield made
    finally:
        for mesh in made:
            mesh.close(linger=False)


def nobody(tmp_path: Path) -> str:
    """An address where nobody listens, so that what is sent there fills its queue."""
    return f"ipc://{tmp_path}/nobody"


def fill(mesh: Mesh, address: str) -> None:
    with contextlib.suppress(TimeoutError):
        while True:
            mesh.send(address, b"head", b"payload", monotonic())


def test_a_full_queue_of_one_peer_holds_up_no_send_to_another(tmp_path: Path) -> None:
    waits, over = threading.Event(), threading.Event()

    def check() -> None:
        waits.set()
        if over.is_set():
            raise KeyError("over")

    with meshes(tmp_path, 2) as (mesh, other):
        fill(mesh, nobody(tmp_path))
        failures: list[BaseException] = []

        def send() -> None:
            try:
                mesh.send(nobody(tmp_path), b"head", b"payload", monotonic() + LONG_S, check=check)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        assert waits.wait(SOON_S)
        mesh.send(other.endpoint, b"head", b"other", monotonic() + SOON_S)
        found = None
        while found is None:
            found = other.receive()
        assert found[0].bytes == b"headother"
        started = monotonic()
        with pytest.raises(TimeoutError):  # its own deadline, not that of the thread that is there before it
            mesh.send(nobody(tmp_path), b"head", b"payload", monotonic() + 0.1)
        assert monotonic() - started < SOON_S
        over.set()
        thread.join()
        assert isinstance(failures[0], KeyError)


def test_closing_waits_for_the_threads_that_use_the_sockets(tmp_path: Path) -> None:
    """Else libzmq aborts the process, or the thread sees an error that has nothing to do with it."""
    with meshes(tmp_path, 1) as (mesh,):
        fill(mesh, nobody(tmp_path))
        ready = threading.Barrier(3)
        failures: list[BaseException] = []

        def use(act: Any) -> None:
            ready.wait()
            try:
                while True:
                    act()
            except BaseException as error:
                failures.append(error)

        acts = (mesh.receive, lambda: mesh.send(nobody(tmp_path), b"head", b"payload", monotonic() + LONG_S))
        threads = [threading.Thread(target=use, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        ready.wait()
        mesh.close(linger=False)
        for thread in threads:
            thread.join()
        assert [str(error) for error in failures] == ["this communicator is closed"] * 2
        assert all(isinstance(error, UsageError) for error in failures)


def send_until(gave_up: threading.Event, comm: Communicator) -> None:
    """Sends rank 0 what it does not wait for, for a time that is far too long."""
    until = monotonic() + SOON_S
    while not gave_up.is_set() and monotonic() < until:
        with contextlib.suppress(CollectiveTimeout):  # it reads no more once it has given up
            comm.send(np.zeros(1), 0, tag=5, timeout_s=0.5)
    assert gave_up.is_set()


def test_a_receive_keeps_its_deadline_while_other_messages_arrive(run_world: Any) -> None:
    gave_up = threading.Event()

    def flood(comm: Communicator) -> None:
        if comm.rank == 0:
            with pytest.raises(CollectiveTimeout):
                comm.recv(np.zeros(1), 1, tag=6, timeout_s=0.2)
            gave_up.set()
            return
        send_until(gave_up, comm)

    run_world(2, flood)


def test_a_collective_keeps_its_deadline_while_other_messages_arrive(run_world: Any) -> None:
    """Also where it waits in shared memory, and looks at what hosts send meanwhile."""
    gave_up = threading.Event()

    def flood(comm: Communicator) -> None:
        if comm.rank == 0:
            with pytest.raises(CollectiveTimeout):
                comm.barrier(timeout_s=0.2)
            gave_up.set()
        elif comm.rank == 2:
            send_until(gave_up, comm)

    run_world(4, flood, transport=2)


def test_a_send_that_found_no_room_was_not_sent(run_world: Any) -> None:
    """The next message with that tag takes its number, and is found."""
    full = threading.Event()
    sent_counts: list[int] = []

    def numbers(comm: Communicator) -> None:
        x = np.zeros(1000)  # copied into one frame
        if comm.rank == 0:
            with contextlib.suppress(CollectiveTimeout):
                while True:
                    x[:] = len(sent_counts)
                    comm.send(x, 1, tag=3, timeout_s=0.1)
                    sent_counts.append(1)
            with pytest.raises(CollectiveTimeout, match=r"send\(float64\[1000\], tag=3\) to rank 1 on rank 0"):
                comm.send(x, 1, tag=3, timeout_s=0.1)
            full.set()
            x[:] = -1
            comm.send(x, 1, tag=3)
        else:
            assert full.wait(LONG_S)
            for number in range(len(sent_counts)):
                comm.recv(x, 0, tag=3)
                assert (x == number).all()
            comm.recv(x, 0, tag=3)
            assert (x == -1).all()

    run_world(2, numbers)


def test_asynchronous_sends_return_at_once_and_arrive_in_order(run_world: Any) -> None:
    """Also where both ranks send far more than there is room for, before either receives."""
    count = 1500

    def exchange(comm: Communicator) -> None:
        peer = 1 - comm.rank
        sent = [np.full(900, step + comm.rank, np.float64) for step in range(count)]
        works: list[Any] = [comm.send(x, peer, tag=2, async_op=True) for x in sent]
        last = threading.Thread(target=comm.send, args=(np.full(900, -1.0), peer, 2))
        last.start()
        x = np.zeros(900)
        for step in range(count):
            comm.recv(x, peer, tag=2)
            assert (x == step + peer).all()
        comm.recv(x, peer, tag=2)
        assert (x == -1).all()
        last.join()
        for work in works:
            work.wait()

    run_world(2, exchange)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("transport", ["ipc", "shared"])
def test_the_clock_runs_while_another_call_has_its_turn(run_world: Any, transport: str, asynchronous: bool) -> None:
    """The call before it goes on and completes; behind the one that was given up, this rank is out of step."""
    gave_up = threading.Event()

    def turns(comm: Communicator) -> None:
        x = np.ones(3)
        if comm.rank == 1:
            assert gave_up.wait(LONG_S)
            comm.all_reduce(x)
            return
        first = comm.all_reduce(x, async_op=True, timeout_s=LONG_S)
        while not comm._endpoint.order.recorder.operations:  # it has begun; nobody tells, hence the poll
            gave_up.wait(0.001)
        started = monotonic()
        behind: Any = None
        if asynchronous:
            behind = comm.barrier(async_op=True, timeout_s=0.2)
            with pytest.raises(TimeoutError, match="still under way"):
                behind.wait(0.01)
        with pytest.raises(
            CollectiveTimeout, match=r"barrier\(\).*not begun after 0\.2 s on rank 0.*all_red"
        ) as caught:
            behind.wait() if behind else comm.barrier(timeout_s=0.2)
        assert monotonic() - started < SOON_S
        gave_up.set()
        assert first is not None
        first.wait()
        assert (x == 2).all()
        with pytest.raises(CollectiveTimeout) as repeated:
            comm.barrier()
        assert repeated.value is caught.value

    run_world(2, turns, transport=transport)


def test_the_clock_runs_while_another_thread_is_in_a_call(run_world: Any) -> None:
    gave_up = threading.Event()

    def turns(comm: Communicator) -> None:
        x = np.ones(3)
        if comm.rank == 1:
            assert gave_up.wait(LONG_S)
            comm.all_reduce(x)
            return
        thread = threading.Thread(target=lambda: comm.all_reduce(x, timeout_s=LONG_S))
        thread.start()
        while not comm._endpoint.order.recorder.operations:  # it has begun; nobody tells, hence the poll
            gave_up.wait(0.001)
        with pytest.raises(CollectiveTimeout, match="not begun"):
            comm.barrier(timeout_s=0.2)
        gave_up.set()
        thread.join()
        assert (x == 2).all()

    run_world(2, turns)


@pytest.mark.parametrize(("n", "transport"), [(2, "shared"), (4, 2)])
def test_a_split_that_not_all_come_to_keeps_its_deadline(run_world: Any, n: int, transport: str | int) -> None:
    """The ranks agree on the table of colors, and one is gone before they find a path."""

    def split(comm: Communicator) -> None:
        if comm.rank == n - 1:
            comm.all_gather(np.empty((n, 2), np.int64), np.array([0, 0]))
            return
        started = monotonic()
        with pytest.raises(CollectiveTimeout, match=r"^split\(color=0\).*not complete after"):
            comm.split(0, timeout_s=0.5)
        assert monotonic() - started < SOON_S

    run_world(n, split, transport=transport)


def test_memory_that_not_all_come_to_make_keeps_its_deadline(run_world: Any) -> None:
    def empty(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.barrier()
            return
        with pytest.raises(CollectiveTimeout, match=r"^empty.*not complete after"):
            comm.empty(1000, timeout_s=0.5)

    run_world(2, empty, transport="shared")


def test_communicators_close_together(run_world: Any) -> None:
    """Not each after the last one's second."""
    took: list[float] = []

    def leave(comm: Communicator) -> None:
        made = [comm.split(0) for _ in range(6)]
        if comm.rank == 0:
            for child in made:
                assert child is not None
                child.barrier(async_op=True, timeout_s=LONG_S)
            started = monotonic()
            comm.close()
            took.append(monotonic() - started)

    run_world(2, leave, transport="shared")
    assert took[0] < 5.0


@pytest.mark.parametrize("transport", ["ipc", "shared"])
def test_what_goes_on_when_a_communicator_closes_says_so(run_world: Any, transport: str) -> None:
    works: list[Any] = []

    def leave(comm: Communicator) -> None:
        if comm.rank == 0:
            works.append(comm.all_reduce(np.ones(100_000), async_op=True, timeout_s=LONG_S))
            works.append(comm.recv(np.ones(3), 1, async_op=True, timeout_s=LONG_S))

    run_world(2, leave, transport=transport)
    for work in works:
        with pytest.raises(UsageError, match="this communicator is closed"):
            work.wait(SOON_S)


def test_asynchronous_sends_that_find_no_room_in_time_end_without_anybody_waiting(run_world: Any) -> None:
    over, ended = threading.Event(), threading.Semaphore(0)

    def send(comm: Communicator) -> None:
        if comm.rank == 0:
            works = []
            while len(works) < 2000:
                works.append(comm.send(np.ones(1 << 13), 1, timeout_s=1.0, async_op=True))
                works[-1].add_done_callback(lambda _: ended.release())
            assert all(ended.acquire(timeout=SOON_S) for _ in works)
            assert isinstance(works[-1].exception(), CollectiveTimeout)
            over.set()
        else:
            assert over.wait(LONG_S)

    run_world(2, send)
