"""Generations of the world as one member knows them, and the news of the other members; pure.

A member is a process of a job. Its rank is its place in one generation. News names members, and each generation translates
it to ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fleet import messages as m
from fleet.collectives.operation import EndedRank
from fleet.collectives.pace import Pace
from fleet.collectives.recorder import Recorder
from fleet.errors import Late, RankEnded, WorldChanged
from fleet.world import World

CLOSED_KEPT = 1000  # recorders of closed communicators: more than can be closed between two times that they are told
UNANSWERED = "is not answering: stopped, frozen or cut off"  # the activity of a rank that did not answer


@dataclass(frozen=True, slots=True)
class RankActivity:
    """Activity of one rank in one communicator, as it told another rank."""

    late: Late
    sequence: int  # of its last collective; -1: it is not in this generation, or has ended
    inside: bool  # whether that collective is under way
    call: str  # the collective that was asked for; empty: the rank has not made it
    line: str = ""
    unreached: tuple[int, ...] = ()  # ranks of the world that it sent to without having a connection


# Asks every other rank of the world for its activity in the communicator of this id, and for its collective of this number
# (0: the last one).
Inquiry = Callable[[int, int], Sequence[RankActivity]]


@dataclass
class Generation:
    """One generation, as one of its members knows it."""

    world: World
    rank: int  # of this member
    recorders: list[tuple[int, Recorder]] = field(default_factory=list)  # of its communicators, with their ids
    ended: dict[int, EndedRank] = field(default_factory=dict)  # by rank: members that have ended with 0
    lost: WorldChanged | None = None  # of the first member that was lost
    pace: Pace = field(default_factory=Pace)  # of this member, in all of its generations
    _closed: deque[Recorder] = field(default_factory=deque)  # of communicators that were closed last, oldest first

    def forget(self, closed: Recorder) -> None:
        """Keeps the recorder of a closed communicator for a while: it has yet to be told, and others may ask how far this
        member came in it."""
        self._closed.append(closed)
        if len(self._closed) > CLOSED_KEPT:
            oldest = self._closed.popleft()
            del self.recorders[next(at for at, (_, recorder) in enumerate(self.recorders) if recorder is oldest)]

    def check(self, awaited: int = -1) -> None:
        """Raises WorldChanged if a member was lost. Called during every wait for other ranks."""
        if self.lost is not None:
            raise self.lost.with_traceback(None)

    def tell(self, news: m.MemberLost, now: float) -> None:
        """Takes news of a member of the job, which may be in this generation or not. The same news may come twice."""
        status, number = news.status, self.world.generation
        rank = next((r for r, member in enumerate(self.world.members) if member.member_id == status.member_id), None)
        if rank is None:
            return
        if not status.failed:
            made = None if news.made is None else {cid: count for of, cid, count in news.made if of == number}
            self.ended.setdefault(rank, EndedRank(status.worker_id, status.host, status.pid, made, now))
        elif self.lost is None:
            self.lost = WorldChanged(number, rank, status.worker_id, status.host, status.pid, news.reason)


@dataclass
class News:
    """News of the other members of a job. One thread calls `hear`, any thread the other methods."""

    member_id: int
    generations: list[Generation] = field(default_factory=list)  # the last ones of this member, oldest first
    # By member, with the time of the news. Invariant: each generation has been told of all of these.
    gone: dict[int, tuple[m.MemberLost, float]] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)

    def hear(self, news: m.MemberLost, now: float) -> None:
        """Takes the news that a member was lost or has ended. The first news of each member counts."""
        if news.status.member_id not in self.gone:
            self.gone[news.status.member_id] = news, now  # first: see `form`
            for generation in self.generations:
                generation.tell(news, now)

    def form(self, world: World) -> Generation:
        """Enters a generation. All but the generation before it are forgotten."""
        generation = Generation(world, world.rank_of(self.member_id), pace=self.pace)
        # First, so that concurrent news is told twice rather than never.
        self.generations = [*self.generations[-1:], generation]
        for news, since in list(self.gone.values()):
            generation.tell(news, since)
        return generation

    def check_forming(self, number: int) -> None:
        """Raises WorldChanged or RankEnded if a member can no longer join the generation of this number."""
        for news, _ in sorted(self.gone.values(), key=lambda told: not told[0].status.failed):
            status, member_id = news.status, news.status.member_id
            if status.failed:
                raise WorldChanged(number, member_id, status.worker_id, status.host, status.pid, news.reason)
            raise RankEnded(member_id, status.worker_id, status.host, status.pid, "fleet.init()")
