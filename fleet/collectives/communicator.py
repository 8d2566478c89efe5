"""The communicator: MPI-like collectives over the ranks of one world. Knows calls and buffers, not how a world forms.

Every call blocks until this rank's part is done, and ends by its deadline. Ranks must make the same calls in the same
order; what differs is an error that names both calls. Results are the same bits on every rank and from run to run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np

from fleet.bus.mesh import wait_until_sent
from fleet.collectives import engine, reduce, schedule
from fleet.collectives.buffer import Array, Buffer, as_buffer
from fleet.collectives.channel import POINT_TO_POINT, Channel, Place
from fleet.collectives.header import describe_call, pack_call
from fleet.errors import CollectiveMismatch, CollectiveTimeout, FleetError, Late, UsageError
from fleet.group import World

# Up to here a tree's few steps beat the ring's many; bench/startup.py --allreduce shows both sides of it.
TREE_BYTES_AT_MOST = 64 << 10
TAGS = 1 << 31

# Asks every other rank what it does: (rank, sequence, inside, call, doing) of all that answered or are known to be gone.
Inquiry = Callable[[], Sequence["Doing"]]


@dataclass(frozen=True, slots=True)
class Doing:
    """What one rank is known to be doing. `sequence` is -1 where it is in no collective and will be in none."""

    late: Late
    sequence: int
    inside: bool
    call: str


@dataclass(frozen=True, slots=True)
class Progress:
    """The running or last collective of this rank; read by another thread, hence replaced and never changed."""

    sequence: int = 0
    call: bytes = b""
    inside: bool = False


class Communicator:
    """This rank's end of a world. Made by `fleet.init()`.

    x and out are NumPy arrays or torch CPU tensors of a bool, integer, floating or complex dtype, of any shape; every
    rank passes the same shape and dtype. Methods may be called from any thread, one at a time. `timeout_s` overrides
    the communicator's own deadline for one call. All raise

    - UsageError: illegal here, nothing was sent;
    - CollectiveMismatch: another rank called something else in the same place;
    - CollectiveTimeout: not complete in time; names the ranks that are late and what they are doing.

    After the last two the communicator is broken, what was to be written is undefined, and further calls raise again.
    """

    def __init__(
        self,
        rank: int,
        world: World,
        channel: Channel | None,
        timeout_s: float = 30.0,
        local_rank: int = 0,
        inquire: Inquiry | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world.size
        self.local_rank = local_rank
        self.generation = world.generation
        self.timeout_s = timeout_s
        self.progress = Progress()
        self._world = world
        self._channel = channel  # None in a world of one
        self._inquire = inquire
        self._lock = threading.Lock()
        self._broken: FleetError | BaseException | None = None
        self._sent: dict[tuple[int, int], int] = {}  # messages so far, by (peer, tag)
        self._received: dict[tuple[int, int], int] = {}

    def all_reduce(self, x: Any, op: str = "sum", *, timeout_s: float | None = None) -> None:
        """Combines x over all ranks, in place. op: sum, mean, prod, min, max.

        Binomial tree up to TREE_BYTES_AT_MOST bytes, ring above. float16 and bfloat16 are rounded after each of the
        N-1 additions. mean divides the sum once, and is refused for integers and bools; min and max for complex.
        """
        buffer = as_buffer(x, "x", written=True)
        reduce.check(op, buffer.dtype)
        with self._collective(pack_call("all_reduce", op, buffer.dtype, buffer.shape), timeout_s) as work:
            if self.world_size > 1:
                work.combine = reduce.combination(op, buffer.dtype)
                work.finish = reduce.completion(op, buffer.dtype, self.world_size)
                if buffer.flat.nbytes <= TREE_BYTES_AT_MOST:
                    work.mine = work.out = [buffer.flat]
                    self._run(schedule.tree_all_reduce(self.rank, self.world_size), work)
                else:
                    work.mine = work.out = self._chunks(buffer.flat)
                    self._run(schedule.ring_all_reduce(self.rank, self.world_size), work)
            buffer.write_back()

    def broadcast(self, x: Any, root: int = 0, *, timeout_s: float | None = None) -> None:
        """Gives every rank root's x, in place. Binomial tree, in segments."""
        self._check_rank(root, "root")
        buffer = as_buffer(x, "x", written=self.rank != root)
        with self._collective(pack_call("broadcast", "", buffer.dtype, buffer.shape, root), timeout_s) as work:
            if self.world_size > 1:
                work.mine = work.out = [buffer.flat]
                self._run(schedule.tree_broadcast(self.rank, self.world_size, root), work)
            buffer.write_back()

    def all_gather(self, out: Any, x: Any, *, timeout_s: float | None = None) -> None:
        """Puts every rank's x into out, one after the other along dimension 0, in the order of the ranks. Ring.

        x: shape (k, ...); out: (world_size * k, ...), or (world_size, *x.shape) for the same bytes.
        """
        target, mine = as_buffer(out, "out", written=True), as_buffer(x, "x", written=False)
        self._check_parts("out", target, "x", mine)
        with self._collective(pack_call("all_gather", "", mine.dtype, mine.shape), timeout_s) as work:
            parts = self._parts(target.flat)
            parts[self.rank][:] = mine.flat
            if self.world_size > 1:
                work.mine = work.out = parts
                self._run(schedule.ring_all_gather(self.rank, self.world_size), work)
            target.write_back()

    def reduce_scatter(self, out: Any, x: Any, op: str = "sum", *, timeout_s: float | None = None) -> None:
        """Combines x over all ranks and leaves this rank's share, along dimension 0, in out; x stays as it is. Ring.

        out: shape (k, ...); x: (world_size * k, ...), or (world_size, *out.shape) for the same bytes. op as in all_reduce.
        """
        target, whole = as_buffer(out, "out", written=True), as_buffer(x, "x", written=False)
        reduce.check(op, whole.dtype)
        self._check_parts("x", whole, "out", target)
        with self._collective(pack_call("reduce_scatter", op, whole.dtype, whole.shape), timeout_s) as work:
            parts = self._parts(whole.flat)
            if self.world_size > 1:
                work.combine = reduce.combination(op, whole.dtype)
                work.finish = reduce.completion(op, whole.dtype, self.world_size)
                work.mine = parts
                work.out = [target.flat if rank == self.rank else None for rank in range(self.world_size)]
                self._run(schedule.ring_reduce_scatter(self.rank, self.world_size), work)
            else:
                target.flat[:] = parts[0]
            target.write_back()

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Returns once every rank has called it. Binomial tree of empty messages, up and down."""
        with self._collective(pack_call("barrier"), timeout_s) as work:
            if self.world_size > 1:
                work.mine, work.out = [np.empty(0, np.uint8)], [None]
                work.combine = reduce.combination("sum", "uint8")
                self._run(schedule.tree_all_reduce(self.rank, self.world_size), work)

    def send(self, x: Any, dst: int, tag: int = 0, *, timeout_s: float | None = None) -> None:
        """Sends x to rank dst; returns when x may be changed again, which may be before dst has received it.

        Messages of one tag arrive in the order they were sent. tag: from 0 to 2**31 - 1.
        """
        channel = self._check_peer(dst, "dst", tag)
        buffer = as_buffer(x, "x", written=False)
        call = pack_call("send", "", buffer.dtype, buffer.shape, tag)
        with self._lock:
            deadline = self._deadline(timeout_s)
            count = self._sent.get((dst, tag), 0)
            try:
                payload = buffer.flat.view(np.uint8)
                tracker = channel.send(dst, POINT_TO_POINT, count, tag, 0, call, payload, deadline, track=True)
                self._sent[dst, tag] = count + 1
                if tracker is not None:
                    wait_until_sent(tracker, deadline)
            except TimeoutError:
                raise self._point_to_point_timeout(call, dst, timeout_s) from None

    def recv(self, x: Any, src: int, tag: int = 0, *, timeout_s: float | None = None) -> None:
        """Receives into x what rank src sent with this tag; shape and dtype must be the sender's.

        A CollectiveTimeout here breaks nothing: the call may be made again.
        """
        channel = self._check_peer(src, "src", tag)
        buffer = as_buffer(x, "x", written=True)
        call = pack_call("send", "", buffer.dtype, buffer.shape, tag)
        with self._lock:
            count = self._received.get((src, tag), 0)
            try:
                place = Place(src, tag, 0)
                sent, payload = channel.expect(POINT_TO_POINT, count, place, self._deadline(timeout_s))
            except TimeoutError:
                raise self._point_to_point_timeout(call, src, timeout_s) from None
            self._received[src, tag] = count + 1
            if sent != call:
                mine = describe_call(call).replace("send", "recv", 1)
                raise CollectiveMismatch(count, self.rank, mine, src, describe_call(sent), point_to_point=True)
            buffer.flat[:] = np.frombuffer(payload.view, dtype=buffer.flat.dtype)
            buffer.write_back()

    def close(self) -> None:
        """Ends this rank's part: sockets close, what was sent is still delivered. Happens by itself at exit."""
        with self._lock:
            if self._channel is not None and not isinstance(self._broken, UsageError):
                self._channel.close(linger=self._broken is None)
            self._broken = UsageError("this communicator is closed")

    @contextmanager
    def _collective(self, call: bytes, timeout_s: float | None) -> Iterator[engine.Work]:
        """One collective: numbered, timed, and the end of the communicator if it fails half way."""
        with self._lock:
            self._check_usable()
            sequence = self.progress.sequence + 1
            started = monotonic()
            work = engine.Work(sequence, call, self._deadline(timeout_s), [], [])
            self.progress = Progress(sequence, call, inside=True)
            try:
                if self._channel is not None:
                    self._channel.begin(sequence, call)
                yield work
            except TimeoutError:
                self._broken = self._timeout(sequence, call, monotonic() - started)
                raise self._broken from None
            except BaseException as error:
                self._broken = error
                raise
            finally:
                self.progress = Progress(sequence, call, inside=False)

    def _run(self, plan: schedule.Plan, work: engine.Work) -> None:
        assert self._channel is not None
        engine.run(plan, self._channel, work)

    def _timeout(self, sequence: int, call: bytes, waited_s: float) -> FleetError:
        """The error of a collective that is late: a mismatch if somebody is elsewhere, else who has not come."""
        late = []
        for other in self._inquire() if self._inquire is not None else ():
            # Also of one that has left it: it left with an error.
            if other.sequence == sequence and other.call != describe_call(call):
                return CollectiveMismatch(sequence, self.rank, describe_call(call), other.late.rank, other.call)
            if other.sequence < sequence:
                late.append(other.late)
        return CollectiveTimeout(sequence, describe_call(call), self.rank, waited_s, late)

    def _point_to_point_timeout(self, call: bytes, peer: int, timeout_s: float | None) -> CollectiveTimeout:
        waited_s = self.timeout_s if timeout_s is None else timeout_s
        known = self._inquire() if self._inquire is not None else ()
        late = [other.late for other in known if other.late.rank == peer]
        return CollectiveTimeout(0, f"{describe_call(call)} with rank {peer}", self.rank, waited_s, late)

    def _deadline(self, timeout_s: float | None) -> float:
        return monotonic() + (self.timeout_s if timeout_s is None else timeout_s)

    def _chunks(self, flat: Array) -> list[Array]:
        """Nearly equal shares of a flat array, one per rank."""
        size, count = len(flat), self.world_size
        return [flat[size * i // count : size * (i + 1) // count] for i in range(count)]

    def _parts(self, flat: Array) -> list[Array]:
        return list(flat.reshape(self.world_size, -1)) if flat.size else [flat] * self.world_size

    def _check_parts(self, name: str, whole: Buffer, part_name: str, part: Buffer) -> None:
        if whole.dtype != part.dtype:
            raise UsageError(f"{name} has dtype {whole.dtype} and {part_name} has {part.dtype}: they must be the same")
        stacked = (self.world_size, *part.shape)
        joined = (self.world_size * part.shape[0], *part.shape[1:]) if part.shape else stacked
        if whole.shape not in (joined, stacked):
            raise UsageError(
                f"{name} has shape {list(whole.shape)}: for {self.world_size} ranks with {part_name} of shape "
                f"{list(part.shape)} it must be {list(joined)} or {list(stacked)}"
            )

    def _check_rank(self, rank: int, name: str) -> None:
        if not 0 <= rank < self.world_size:
            raise UsageError(f"{name} is {rank}: ranks of this world are 0 to {self.world_size - 1}")

    def _check_peer(self, peer: int, name: str, tag: int) -> Channel:
        self._check_rank(peer, name)
        self._check_usable()
        if not 0 <= tag < TAGS:
            raise UsageError(f"tag is {tag}: it must be from 0 to {TAGS - 1}")
        if peer == self.rank or self._channel is None:
            raise UsageError(f"{name} is this rank itself ({self.rank}): copy the array instead")
        return self._channel

    def _check_usable(self) -> None:
        if isinstance(self._broken, FleetError):
            raise self._broken
        if self._broken is not None:
            raise UsageError(f"an earlier collective was interrupted by {self._broken!r}: ranks are no longer in step")
