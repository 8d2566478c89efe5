"""A rendezvous without agent and orchestrator: members that are threads of one process, for one generation after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fleet import messages as m
from fleet.bus.lock import Lock
from fleet.bus.mesh import Mesh
from fleet.bus.shared_memory import host_key
from fleet.collectives.communicator import Communicator
from fleet.collectives.generations import Generation, Inquiry, News, RankActivity
from fleet.collectives.inbox import Receiver
from fleet.collectives.rendezvous import assemble
from fleet.world import Member, World, world_id

SHM = Path("/dev/shm")
OPEN = Lock()
SECRET = "the secret of a job"


class Hall:
    """Where members meet. `expect` says which ones form the next generation, in the order of their ranks."""

    def __init__(self, job_id: str = "test") -> None:
        self.job_id = job_id
        self._changed = threading.Condition()
        self._expected: list[Sequence[int]] = []
        self._here: dict[int, Member] = {}

    def expect(self, member_ids: Sequence[int]) -> None:
        with self._changed:
            self._expected.append(member_ids)
            self._changed.notify_all()

    def come(self, member: Member) -> None:
        with self._changed:
            self._here[member.member_id] = member
            self._changed.notify_all()

    def world(self, member_id: int, after: int, timeout_s: float) -> World:
        """The first generation later than `after` that has this member, once all its members have come."""

        def formed() -> World | None:
            for number, ids in enumerate(self._expected, start=1):
                if number > after and member_id in ids and set(ids) <= set(self._here):
                    members = tuple(self._here[one] for one in ids)
                    return World(number, world_id(self.job_id, 1, number), members)
            return None

        with self._changed:
            found = self._changed.wait_for(formed, timeout_s)
        if found is None:
            raise TimeoutError(f"member {member_id} waits for others after generation {after}")
        return found


class LocalMember:
    """A member's sockets and news, and its end of the rendezvous. `inquire` answers in place of the other members."""

    def __init__(
        self, hall: Hall, member_id: int, bind: str, memory: str, lock: Lock = OPEN, inquire: Inquiry | None = None
    ) -> None:
        self.news = News(member_id)
        self.mesh = Mesh(lock, bind)
        self.receiver = Receiver(self.mesh)
        self._hall = hall
        self._memory = memory
        self._inquire = inquire
        hall.come(Member(member_id, "w", "h", 0, self.mesh.endpoint, memory))

    def join(self, address: str, memory: str, timeout_s: float) -> Generation:
        """See Rendezvous.join."""
        before = self.news.generations[-1].world.generation if self.news.generations else 0
        return self.news.form(self._hall.world(self.news.member_id, before, timeout_s))

    def inquire(self, world: World, communicator_id: int, sequence: int) -> list[RankActivity]:
        """See Rendezvous.inquire."""
        assert self._inquire is not None
        return list(self._inquire(communicator_id, sequence))

    def form(self, timeout_s: float = 20.0) -> Communicator:
        """The communicator of its next generation."""
        generation = self.join(self.mesh.endpoint, self._memory, timeout_s)
        asks = self if self._inquire is not None else None
        return assemble(generation, self.receiver, asks, directory=SHM, secret=SECRET, timeout_s=timeout_s)

    def close(self, linger: bool = True) -> None:
        self.receiver.close(linger)


def memory_key(transport: str | int, rank: int, n: int) -> str:
    """What members share memory with whom: all, so many hosts' members, or none."""
    if transport == "shared":
        return host_key(SHM)
    return f"host {rank * transport // n}" if isinstance(transport, int) else ""


def ended(member_id: int, made: dict[int, int] | None, generation: int = 1) -> m.MemberLost:
    """News of a member that has ended with 0, after so many collectives in each communicator."""
    status = m.RankStatus(member_id, f"worker-{member_id}", f"h{member_id}", 812, 0)
    rows = None if made is None else tuple((generation, number, count) for number, count in made.items())
    return m.MemberLost("test", 1, status, "has ended", rows)


def killed(member_id: int) -> m.MemberLost:
    """News of a member that was lost."""
    status = m.RankStatus(member_id, f"worker-{member_id}", f"h{member_id}", 812, 0, signal=9)
    return m.MemberLost("test", 1, status, "killed by signal 9 (SIGKILL)")


def in_threads(acts: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each returns or raises, each in a thread of its own."""
    results: list[Any] = [None] * len(acts)

    def run(number: int) -> None:
        try:
            results[number] = acts[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
