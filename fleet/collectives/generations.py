"""Generations of the world that a member is in, and what it has heard of the other members; pure.

A member is a process of a job, a rank is its place in one generation. News is about members, and each generation that has
them learns it by their ranks there. Knows no socket and no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fleet import messages as m
from fleet.collectives.operation import EndedRank
from fleet.collectives.recorder import Recorder
from fleet.errors import Late, RankEnded, WorldChanged
from fleet.world import World

UNANSWERED = "is not answering: stopped, frozen or cut off"  # what a rank does that nobody hears of


@dataclass(frozen=True, slots=True)
class RankActivity:
    """What one rank is known to be doing, in one communicator."""

    late: Late
    sequence: int  # of its last collective; -1: it will never come to one
    inside: bool
    call: str  # that was asked for; empty: it made none of that number
    line: str = ""
    unreached: tuple[int, ...] = ()  # ranks of the world that it sent to and has no connection to


# Asks every other rank of the world what it does in the communicator of this id, and what it called as the collective
# of this number (0: its last one).
Inquiry = Callable[[int, int], Sequence[RankActivity]]


@dataclass
class Generation:
    """One generation as one of its members knows it."""

    world: World
    rank: int  # of this member
    recorders: list[tuple[int, Recorder]] = field(default_factory=list)  # with the ids of their communicators
    ended: dict[int, EndedRank] = field(default_factory=dict)  # by rank: members that have ended with 0
    lost: WorldChanged | None = None  # of the first member that was lost

    def check(self, awaited: int = -1) -> None:
        """Raises WorldChanged once a member has gone. Called wherever a member waits for others."""
        if self.lost is not None:
            raise self.lost.with_traceback(None)

    def tell(self, news: m.MemberLost, now: float) -> None:
        """A member of the job was lost or has ended, perhaps one of this generation. May be told again."""
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
    """What one member has heard of the others of its job. Told by one thread, read by any."""

    member_id: int
    generations: list[Generation] = field(default_factory=list)  # that this member has been in, oldest first
    # By member, with the time of the news. Invariant: each generation has been told of all of these.
    gone: dict[int, tuple[m.MemberLost, float]] = field(default_factory=dict)

    def hear(self, news: m.MemberLost, now: float) -> None:
        """A member was lost or has ended. The first news of a member counts."""
        if news.status.member_id not in self.gone:
            self.gone[news.status.member_id] = news, now  # before the others: see `form`
            for generation in self.generations:
                generation.tell(news, now)

    def form(self, world: World) -> Generation:
        """This member enters a generation, and forgets all but the one before it."""
        generation = Generation(world, world.rank_of(self.member_id))
        self.generations = [
            *self.generations[-1:],
            generation,
        ]  # first: what is heard meanwhile is told twice, not never
        for news, since in list(self.gone.values()):
            generation.tell(news, since)
        return generation

    def check_forming(self, number: int) -> None:
        """Raises WorldChanged or RankEnded where a member cannot come to the generation of this number any more."""
        for news, _ in sorted(self.gone.values(), key=lambda told: not told[0].status.failed):
            status, member_id = news.status, news.status.member_id
            if status.failed:
                raise WorldChanged(number, member_id, status.worker_id, status.host, status.pid, news.reason)
            raise RankEnded(member_id, status.worker_id, status.host, status.pid, "fleet.init()")
