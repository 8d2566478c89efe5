"""What does not belong: garbage, other worlds and wrong secrets at an inbox, and a forked child's use of a communicator."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np
import pytest
import zmq

from fleet.bounds import FRAME_LIMIT_BYTES
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Dealer, Link, Lost, Router
from fleet.bus.lock import Lock
from fleet.bus.mesh import FRAME_BYTES, Mesh
from fleet.bus.poller import Poller
from fleet.bus.strangers import Strangers
from fleet.collectives.channel import PROBE
from fleet.collectives.communicator import Communicator
from fleet.collectives.header import MAGIC, pack_call, pack_head
from fleet.errors import CollectiveTimeout, FleetError, ProtocolError, UsageError

Call = Callable[[Communicator], None]


def endpoint_of(comm: Communicator) -> str:
    return comm._endpoint.channel.inbox.mesh.endpoint


def receive_until(comm: Communicator, done: Callable[[], bool]) -> None:
    """Reads the inbox until it has what it should have; a receive that breaks nothing does it."""
    for _ in range(100):
        if done():
            return
        with contextlib.suppress(CollectiveTimeout):
            comm.recv(np.zeros(1), (comm.rank + 1) % comm.world_size, tag=99, timeout_s=0.05)
    pytest.fail("what was sent did not arrive")


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_garbage_is_counted_and_survived(run_world: Any, transport: str) -> None:
    random = np.random.default_rng(4)
    valid = pack_head((run_world.world_id, 0, 1, 1, 0, 0), pack_call("all_reduce", "sum", "float64", (3,)))
    foreign = pack_head((run_world.world_id - 1, 0, 1, 1, 0, 0), pack_call("barrier"))
    garbage = [
        [b""],
        [b"", b""],
        [MAGIC],
        [valid[:-1]],
        [valid[:20], valid[20:]],
        [b"\x01\x81\xa4type\xa9Heartbeat"],  # a control message
        [bytes(100_000)],
        [b"x", bytes(100_000)],
        [b"one", b"two", b"three", b"four"],
        *[[random.bytes(int(size))] for size in random.integers(0, 300, 50)],
    ]
    stale = [[foreign], [foreign, bytes(100_000)], [foreign + b"payload"], [foreign, b"", b"third"]]

    def survive(comm: Communicator) -> None:
        inbox = comm._endpoint.channel.inbox.receiver
        if comm.rank == 0:
            with Bus(Lock()) as bus:
                stranger = bus.socket(zmq.DEALER, 1000, FRAME_BYTES)
                bus.connect(stranger, endpoint_of(comm))
                for frames in garbage + stale:
                    stranger.send_multipart(frames)
                receive_until(comm, lambda: inbox.refused_count + inbox.stale_count >= len(garbage + stale))
            assert inbox.refused_count == len(garbage)
            assert inbox.stale_count == len(stale)
        for count in (3, 70_000):
            x = np.full(count, comm.rank + 1.0)
            comm.all_reduce(x)
            assert (x == 3).all()
        comm.barrier()

    run_world(2, survive, transport=transport)


def test_bytes_that_are_not_even_zeromq(run_world: Any) -> None:
    """A port scanner, a browser or a lost gRPC client at the TCP port itself."""
    random = np.random.default_rng(5)
    strangers = [b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f\x03", *(random.bytes(500) for _ in range(8))]

    def survive(comm: Communicator) -> None:
        if comm.rank == 0:
            port = int(endpoint_of(comm).rpartition(":")[2])
            for data in strangers:
                with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
                    stranger.sendall(data)
                    stranger.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionResetError):
                        while stranger.recv(1000):
                            pass  # its greeting; then it hangs up
        x = np.full(70_000, comm.rank + 1.0)
        comm.all_reduce(x)
        assert (x == 3).all()

    run_world(2, survive, transport="tcp")


def test_a_segment_of_the_wrong_size_is_a_protocol_error(run_world: Any) -> None:
    """Never a wrong result or a crash, not even where the head is right in everything."""
    head = pack_head((run_world.world_id, 0, 1, 1, 0, 0), pack_call("all_reduce", "sum", "float64", (3,)))

    def forged(comm: Communicator) -> None:
        if comm.rank == 0:
            with Bus(Lock()) as bus:
                stranger = bus.socket(zmq.DEALER, 10, FRAME_BYTES)
                bus.connect(stranger, endpoint_of(comm))
                stranger.send(head + bytes(8))
                with pytest.raises(ProtocolError, match="8 bytes arrived where 24 belong"):
                    comm.all_reduce(np.ones(3))

    run_world(2, forged)


def forged(random: np.random.Generator, world_id: int) -> list[bytes]:
    """A message of a member that is wrong or hostile: right in its world, and nearly right in all else."""
    pick = random.choice
    call = pack_call(
        str(pick(["all_reduce", "all_gather", "barrier", "send", "broadcast"])),
        str(pick(["", "sum", "max"])),
        str(pick(["", "float64", "float32", "bfloat16"])),
        tuple(int(n) for n in random.integers(0, 4, int(random.integers(0, 3)))) or (3,),
        int(pick([0, 1, 2, -1, 2**62])),
    )
    if random.random() < 0.3:
        call = random.bytes(int(random.integers(0, 30)))
    if random.random() < 0.5:
        call = pack_call("all_reduce", "sum", "float64", (3,))
    place = (
        world_id,
        int(pick([0, 0, 0, 1, 2, 2**32 - 1])),
        int(pick([0, 1, 2, 3, 4, 5, 300, 2**63])),
        int(pick([0, 1, 2, 3, 2**32 - 1])),
        int(pick([0, 1, 2, PROBE])),
        int(pick([0, 0, 1, 2**32 - 1])),
    )
    head = pack_head(place, call)
    payload = random.bytes(int(pick([0, 1, 8, 23, 24, 25, 4096])))
    return [head + payload] if random.random() < 0.5 else [head, payload, *([b"more"] if random.random() < 0.1 else [])]


@pytest.mark.parametrize("seed", range(int(os.environ.get("FLEET_TEST_SEEDS", "6"))))
@pytest.mark.parametrize(("n", "transport"), [(3, "ipc"), (4, 2)])
def test_a_member_that_is_wrong_or_hostile_ends_calls_with_fleets_errors_only(
    run_world: Any, n: int, transport: str | int, seed: int
) -> None:
    """Each call ends by its deadline: right, or with an error of fleet. More seeds by FLEET_TEST_SEEDS."""
    random = np.random.default_rng(seed)
    messages = [forged(random, run_world.world_id) for _ in range(60)]

    def attacked(comm: Communicator) -> None:
        if comm.rank == 0:
            with Bus(Lock()) as bus:
                hostile = bus.socket(zmq.DEALER, 1000, FRAME_BYTES)
                bus.connect(hostile, endpoint_of(comm))
                for frames in messages:
                    hostile.send_multipart(frames)
                with contextlib.suppress(FleetError):  # what it forged from another rank may well fit
                    comm.recv(np.zeros(3), timeout_s=0.1)
        for step in range(4):
            x, out = np.full(3, comm.rank + 1.0), np.empty((n, 3))
            comm.all_reduce(x)
            comm.all_gather(out, np.full(3, float(step)))
            comm.barrier()

    for result in run_world.caught(n, attacked, transport=transport, timeout_s=0.5):
        assert result is None or isinstance(result, FleetError), repr(result)
        assert not isinstance(result, UsageError), repr(result)


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
@pytest.mark.parametrize("kind", ["plain", "curve"])
def test_only_holders_of_the_secret_get_in(run_world: Any, kind: Any, transport: str) -> None:
    lock = Lock(kind, "the secret")
    strangers = [Lock(kind, "another secret"), Lock(), Lock("plain" if kind == "curve" else "curve", "the secret")]

    def guarded(comm: Communicator) -> None:
        for count in (3, 70_000):
            x = np.full(count, comm.rank + 1.0)
            comm.all_reduce(x)
            assert (x == 6).all()
        inbox = comm._endpoint.channel.inbox.receiver
        if comm.rank == 0:
            for stranger in strangers:
                assert not handshake(stranger, endpoint_of(comm))
            # Proof that the strangers' message would have been counted.
            assert handshake(lock, endpoint_of(comm))
            receive_until(comm, lambda: inbox.refused_count > 0)
            assert inbox.refused_count == 1
            assert inbox.stale_count == 0
        comm.barrier()

    run_world(3, guarded, lock=lock, transport=transport)


def handshake(lock: Lock, endpoint: str) -> bool:
    """Sends a message as somebody with this lock. Returns whether the inbox let it in."""
    refused = (
        zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_DISCONNECTED
    )
    bus = Bus(lock)
    admitted, monitor = False, None
    try:
        socket = bus.socket(zmq.DEALER, 10, FRAME_BYTES)
        monitor = socket.get_monitor_socket(refused | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        monitor.linger = 0
        bus.connect(socket, endpoint)
        with contextlib.suppress(zmq.Again):  # refused already: there is nobody to send to, and it would wait for ever
            socket.send(b"let me in", zmq.DONTWAIT)
        assert monitor.poll(10_000), "neither let in nor refused"
        event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
        admitted = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
    finally:
        if monitor is not None:
            monitor.close()  # the context would wait for it for ever
        bus.close(linger=admitted)
    return admitted


FORKED_CALLS: dict[str, Call] = {
    "all_reduce": lambda comm: comm.all_reduce(np.ones(3)),
    "large all_reduce": lambda comm: comm.all_reduce(np.ones(70_000)),
    "broadcast": lambda comm: comm.broadcast(np.ones(3), root=comm.rank),
    "barrier": lambda comm: comm.barrier(),
    "send": lambda comm: comm.send(np.ones(3), 1 - comm.rank),
    "recv": lambda comm: comm.recv(np.ones(3), 1 - comm.rank),
    "close": lambda comm: comm.close(),
}


def in_forked_child(comm: Communicator, call: Call) -> str:
    """What the call came to in a forked child: its error's name and text, or 'returned'; 'hung' after five seconds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            call(comm)
            os.write(write, b"returned")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)  # never through the parent's clean-up
    os.close(write)
    try:
        readable, _, _ = select.select([read], [], [], 5)
        if not readable:
            os.kill(pid, 9)
            return "hung"
        return os.read(read, 4096).decode() or "died"
    finally:
        os.waitpid(pid, 0)
        os.close(read)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # this is what is tested
@pytest.mark.parametrize("used_before", [False, True])
def test_use_after_fork_is_illegal(run_world: Any, used_before: bool) -> None:
    """Both with sockets that the parent had opened, and with those that the child would open."""
    found: dict[str, str] = {}

    def forks(comm: Communicator) -> None:
        if used_before:
            comm.all_reduce(np.ones(3))
            comm.send(np.ones(3), 1 - comm.rank)
            comm.recv(np.ones(3), 1 - comm.rank)
        if comm.rank == 1:  # which sends first in a tree
            found.update({name: in_forked_child(comm, call) for name, call in FORKED_CALLS.items()})
        x = np.ones(3)
        comm.all_reduce(x)
        assert (x == 2).all(), "the parent was harmed"

    run_world(2, forks, timeout_s=60.0)
    assert found.pop("close") == "returned"
    wrong = {name: answer for name, answer in found.items() if not answer.startswith("UsageError: this process")}
    assert not wrong
    assert all("forked" in answer for answer in found.values())


SECRET = "a secret for this test alone"


@pytest.mark.parametrize("kind", ["plain", "curve"])
def test_who_is_refused_is_counted_and_said_once_a_minute(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """At a rank's inbox, whose monitor the doorkeeper reads, and at a router, which reads its own."""
    with caplog.at_level(logging.WARNING, logger="fleet.bus"), Bus(Lock(kind, SECRET)) as bus:
        mine = Strangers()
        mesh = Mesh(Lock(kind, SECRET), "tcp://127.0.0.1:*", mine)
        router = Router(bus, "tcp://127.0.0.1:*")
        try:
            for endpoint, strangers in ((mesh.endpoint, mine), (router.endpoint, router.strangers)):
                caplog.clear()
                for count, knock in enumerate((wrong_secret, garbage, hang_up), 1):
                    knock(endpoint, kind)
                    deadline = monotonic() + 20
                    while strangers.refused_count < count and monotonic() < deadline:
                        mesh.receive()  # which waits a tick: what is refused sends no message
                        router.receive()
                    assert strangers.refused_count == count, knock
                assert handshake(Lock(kind, SECRET), endpoint)
                router.receive()
                assert strangers.refused_count == 3
                (record,) = [r for r in caplog.records if endpoint in r.getMessage()]
                assert f"refused at {endpoint}: 1 connections (1 in all" in record.getMessage()
        finally:
            mesh.close(linger=False)


def test_a_refused_strangers_address_is_named(caplog: pytest.LogCaptureFixture) -> None:
    strangers = Strangers("tcp://127.0.0.1:50052")
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        connection, (_, port) = listener.accept()
        with connection:
            strangers.saw(zmq.EVENT_ACCEPTED, connection.fileno())
            connection.getpeername()  # it is still open
    for _ in range(1000):
        strangers.saw(zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400)
    (record,) = caplog.records
    assert f"1 connections (1 in all; 127.0.0.1:{port} connected last)" in record.getMessage()
    assert strangers.refused_count == 1000


def test_a_members_connection_that_ends_is_not_counted() -> None:
    strangers = Strangers()
    for event in (zmq.EVENT_ACCEPTED, zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED):
        strangers.saw(event, 1 << 20)
    assert strangers.refused_count == 0
    for event in (zmq.EVENT_ACCEPTED, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_DISCONNECTED):
        strangers.saw(event, 1 << 20)
    assert strangers.refused_count == 1
    for event in (zmq.EVENT_ACCEPTED, zmq.EVENT_DISCONNECTED):
        strangers.saw(event, 1 << 20)
    assert strangers.refused_count == 2


def wrong_secret(endpoint: str, kind: Any) -> None:
    assert not handshake(Lock(kind, "another secret"), endpoint)


def garbage(endpoint: str, kind: Any) -> None:
    with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(1000):
                pass


def hang_up(endpoint: str, kind: Any) -> None:
    socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))).close()


@pytest.mark.parametrize("where", ["router", "inbox"])
def test_who_says_nothing_makes_room_for_others(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The oldest of many silent connections are hung up on, and a member's is not among them."""
    monkeypatch.setattr("fleet.bus.strangers.SILENT_AT_MOST", 10)
    monkeypatch.setattr("fleet.bus.strangers.SILENT_S", 0.0)
    lock = Lock("curve", SECRET)
    with Bus(lock) as bus, Bus(lock) as other, contextlib.ExitStack() as stack:
        if where == "router":
            router = Router(bus, "tcp://127.0.0.1:*")
            endpoint, receive = router.endpoint, router.receive
        else:
            mesh = Mesh(lock, "tcp://127.0.0.1:*", Strangers())
            stack.callback(mesh.close, linger=False)
            endpoint, receive = mesh.endpoint, lambda: [found] if (found := mesh.receive()) else []
        member = Dealer(other, endpoint, b"member")
        member.send(b"\x05hello")
        while not receive():
            pass
        address = "127.0.0.1", int(endpoint.rpartition(":")[2])
        silent = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(30)]
        ended = threading.Event()

        def read() -> None:
            with contextlib.suppress(ConnectionResetError):
                while silent[0].recv(1000):
                    pass
            ended.set()

        thread = threading.Thread(target=read)
        thread.start()
        deadline = monotonic() + 20
        while not ended.is_set() and monotonic() < deadline:
            assert not any(isinstance(thing, Lost) for thing in receive())
        thread.join()
        assert ended.is_set()
        member.send(b"\x05still here")
        while not any(isinstance(thing, Arrived | tuple) for thing in receive()):
            pass
        assert Link.DOWN not in member.changes()


def test_who_does_not_answer_is_not_taken_for_one_who_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """An orchestrator that stands still: its kernel takes connections, and nobody says a word."""
    monkeypatch.setattr("fleet.bus.context.HANDSHAKE_MS", 200)
    with socket.create_server(("127.0.0.1", 0)) as still, Bus(Lock("curve", SECRET)) as bus:
        dealer = Dealer(bus, f"tcp://127.0.0.1:{still.getsockname()[1]}", b"member")
        assert changes(dealer, 2) == [Link.DOWN] * 2
    with Bus(Lock("curve", SECRET)) as bus, Bus(Lock("curve", "another secret")) as other:
        dealer = Dealer(other, Router(bus, "tcp://127.0.0.1:*").endpoint, b"member")
        assert Link.DENIED in changes(dealer, 2)


def changes(dealer: Dealer, count: int) -> list[Link]:
    poller, found = Poller(dealer.poll_sockets), []
    while len(found) < count:
        poller.wait(10)
        found += dealer.changes()
    return found


@pytest.mark.parametrize("size_bytes", [FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES, 3 * FRAME_BYTES + 8])
def test_payloads_around_the_largest_frame_arrive_whole(run_world: Any, size_bytes: int) -> None:
    def exchange(comm: Communicator) -> None:
        sent = np.arange(size_bytes // 8, dtype=np.int64)
        if comm.rank == 0:
            comm.send(sent, 1)
            sent[:] = -1  # it belongs to the caller again
        else:
            found = np.zeros_like(sent)
            comm.recv(found, 0)
            assert (found == sent).all()

    run_world(2, exchange, transport="tcp", lock=Lock("plain", SECRET))


def test_segments_of_more_than_a_frame_are_reduced_and_sent_on(run_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a gigabyte, with smaller frames. Memory of Python's own is waited for: at exit it would go while it is sent."""
    monkeypatch.setattr("fleet.bus.mesh.FRAME_BYTES", 100_000)
    untracked: list[int] = []
    real = Mesh.send

    def send(self: Mesh, peer: int, head: bytes, payload: Any, deadline: float, track: bool = False, *rest: Any) -> Any:
        if isinstance(payload, bytearray) and not track and len(payload) > 8192:
            untracked.append(len(payload))
        return real(self, peer, head, payload, deadline, track, *rest)

    monkeypatch.setattr(Mesh, "send", send)

    def reduce(comm: Communicator) -> None:
        x = np.full(400_000, comm.rank + 1.0)
        comm.all_reduce(x)
        assert (x == 6).all()
        comm.broadcast(x, root=1)
        assert (x == 6).all()

    run_world(3, reduce, transport="tcp")
    assert not untracked


def test_pyzmq_frees_what_is_being_sent_only_after_our_own_exit_hooks() -> None:
    """Exit hooks run in the reverse order, and pyzmq registers its own with this module."""
    assert "zmq.utils.garbage" in sys.modules
    program = "import sys, fleet.bus.context; print('zmq.utils.garbage' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01%b\0" + bytes(31)
FLOODS = {"a command": b"\x06", "a message": b"\x02", "a message with more to come": b"\x03"}


@pytest.mark.parametrize("what", FLOODS)
@pytest.mark.parametrize("kind", ["plain", "curve"])
@pytest.mark.parametrize("where", ["inbox", "router"])
def test_a_large_frame_is_refused_before_it_is_received(kind: Any, what: str, where: str) -> None:
    """A stranger that announces one is hung up on; else this process would hold whatever it sends."""
    lock = Lock(kind, SECRET)
    with Bus(lock) as bus:
        mesh = Mesh(lock, "tcp://127.0.0.1:*")
        endpoint = mesh.endpoint if where == "inbox" else Router(bus, "tcp://127.0.0.1:*").endpoint
        limit = FRAME_BYTES if where == "inbox" else FRAME_LIMIT_BYTES
        try:
            with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), timeout=20) as stranger:
                stranger.sendall(GREETING % kind.upper().encode().ljust(20, b"\0"))
                stranger.sendall(FLOODS[what] + (limit + 1).to_bytes(8, "big"))
                with contextlib.suppress(ConnectionResetError):
                    while stranger.recv(1000):
                        pass  # its greeting; then it hangs up: without a bound it would wait for the frame
        finally:
            mesh.close(linger=False)
