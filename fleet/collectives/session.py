"""A member's connection to its agent, in a thread of its own: it joins generations, answers questions and asks them.

The thread owns the socket. It answers while the main thread is stuck in a collective, a data loader or a C extension, as
long as that lets go of the GIL. The connection outlives the generations of the world: see generations.py for what is known
of each, flight.py for the answers. Knows messages, no tensor.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from time import monotonic

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Dealer, Link
from fleet.bus.descriptors import check_room
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller, Wake
from fleet.bus.process import Watch
from fleet.bus.strangers import Strangers
from fleet.collectives.flight import Flights
from fleet.collectives.generations import UNANSWERED, Generation, News, RankActivity
from fleet.collectives.pace import Pace
from fleet.collectives.sampler import Sampler
from fleet.collectives.timeline import TIMELINE
from fleet.collectives.trace_log import TraceLog
from fleet.config import RankSettings, keeps_pace, trace_folder
from fleet.errors import CollectiveTimeout, FleetError, Late, ProtocolError, UsageError
from fleet.stillness import Deadline
from fleet.values import PaceRow
from fleet.world import World

ANSWER_WITHIN_S = 1.0
LOOK_UP_S = 0.1  # between two looks at whether a member has gone, in a wait for the others
AGENT_WITHIN_S = 10.0  # the agent is on this machine
AGENT_MEMBER = 0  # the member that relays for the others, where one does
COUNTS_EVERY_S = 1.0
PACES_A_SECOND = 64  # of all ranks of one job: the orchestrator reads them all
ROWS_AT_MOST = 1000  # of one CollectiveCounts

log = logging.getLogger("fleet.session")


class Session:
    """Connection of one member to its agent. The thread starts with the construction and ends with `close`.

    `lock` is that of the agent's socket. `watch` has the news of the agent's own loss where the agent is a member itself, by
    that member's id; it belongs to the thread.
    """

    def __init__(
        self, settings: RankSettings, pid: int, lock: Lock | None = None, watch: Watch[m.MemberLost] | None = None
    ) -> None:
        check_room()  # not in the thread, whose errors nobody would see
        self._lock = lock or Lock()
        self._watch = watch or Watch({})
        self._agent_is_member = watch is not None
        self._agent_is_down = False
        self._settings = settings
        self._pid = pid
        keeps, folder = keeps_pace(), trace_folder()
        self.news = News(settings.member_id, pace=Pace(keeps))
        self._pace_at = 0.0  # when it is told next
        self.flights = Flights(settings, pid, self.news)
        self._sampler = Sampler(self.news.pace, self.flights.recorders) if keeps else None
        self._trace = None if folder is None else TraceLog(folder, settings.attempt, settings.member_id, self.flights)
        self._wake = Wake()
        self._closing = threading.Event()
        self._out: queue.SimpleQueue[m.Message] = queue.SimpleQueue()
        self._welcome: queue.SimpleQueue[m.RankWelcome | m.Refused] = queue.SimpleQueue()
        self._formed: queue.SimpleQueue[World] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self._question = 0
        self._answers: dict[int, queue.SimpleQueue[m.Answer]] = {}  # by question: several threads may ask at once
        self._told_inside = False
        # At this member's inbox. The agent logs them, since a rank prints only what its script prints. A peer that is killed
        # while it connects looks like a stranger.
        self.strangers = Strangers(says=False)
        self._told_refused = 0
        self._thread = threading.Thread(target=self._run, name="fleet-session", daemon=True)
        self._thread.start()

    def welcome(self) -> m.RankWelcome:
        """The agent's answer, which says where to bind the inbox. Raises UsageError in a second process of the rank, and
        FleetError if the agent does not answer."""
        s = self._settings
        self.send(m.RankHello(s.job_id, s.attempt, s.member_id, self._pid))
        for wait_s in Deadline(AGENT_WITHIN_S).waits():
            with contextlib.suppress(queue.Empty):
                answer = self._welcome.get(timeout=wait_s)
                if isinstance(answer, m.Refused):
                    raise UsageError(answer.reason)
                return answer
        raise FleetError(f"the worker agent at {s.control} did not answer rank {s.member_id}: has it died?")

    def join(self, address: str, memory: str, timeout_s: float) -> Generation:
        """See Rendezvous.join."""
        s = self._settings
        self.send(m.Join(s.job_id, s.attempt, s.member_id, self._pid, address, memory))
        last = max((generation.world.generation for generation in self.news.generations), default=-1)
        for wait_s in Deadline(timeout_s).waits(LOOK_UP_S):
            self.news.check_forming(max(s.attempt, last + 1))
            with contextlib.suppress(queue.Empty):
                if (world := self._formed.get(timeout=wait_s)).generation > last:  # else the agent has told it again
                    return self.news.form(world)
        late = [found.late for found in self.inquire(None) if found.sequence < 0]
        raise CollectiveTimeout(0, "fleet.init()", s.member_id, timeout_s, late, s.world_size)

    def inquire(self, world: World | None, communicator_id: int = 0, sequence: int = 0) -> list[RankActivity]:
        """See Rendezvous.inquire. Asks all members of the job if there is no world yet."""
        s = self._settings
        answers: queue.SimpleQueue[m.Answer] = queue.SimpleQueue()
        with self._asking:
            self._question = question = self._question + 1
            self._answers[question] = answers
        number = world.generation if world is not None else -1
        self.send(m.Ask(s.job_id, s.attempt, s.member_id, question, communicator_id, False, sequence, number))
        members = [member.member_id for member in world.members] if world is not None else range(s.world_size)
        missing = set(members) - {s.member_id}
        rank_of = {member_id: rank for rank, member_id in enumerate(members)}
        found = []
        for wait_s in Deadline(ANSWER_WITHIN_S).waits():
            if not missing:
                break
            try:
                answer = answers.get(timeout=wait_s)
            except queue.Empty:
                continue
            if answer.member_id in missing:
                missing.remove(answer.member_id)
                found.append(_activity(answer, rank_of))
        del self._answers[question]
        for rank in map(rank_of.__getitem__, missing):
            host, pid = (world.members[rank].host, world.members[rank].pid) if world is not None else ("?", 0)
            found.append(RankActivity(Late(rank, host, pid, UNANSWERED), -1, False, ""))
        return sorted(found, key=lambda activity: activity.late.rank)

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join()
        if self._sampler is not None:
            self._sampler.close()
        self._wake.close()

    def send(self, message: m.Message) -> None:
        """Sends a message to the agent soon."""
        self._out.put(message)
        self._wake.set()

    def _run(self) -> None:
        bus = Bus(self._lock)
        try:
            self._serve(bus)
        finally:
            self._watch.close()
            # An agent that is a member may have ended long before this one does, and takes no last message then.
            bus.close(linger=not (self._agent_is_member and self._agent_is_down))

    def _serve(self, bus: Bus) -> None:
        s, watch = self._settings, self._watch
        agent = Dealer(bus, s.control, f"{s.job_id}/{s.attempt}/{s.member_id}/{self._pid}".encode())
        poller = Poller([*agent.poll_sockets, self._wake, *watch.descriptors])
        counts_at = 0.0
        while not self._closing.is_set():
            while not self._out.empty():
                self._say(agent, self._out.get())
            for arrived in agent.receive():
                self._take(arrived.data)
            self._look_after(agent.changes())
            if monotonic() >= counts_at:
                counts_at = monotonic() + COUNTS_EVERY_S
                self._tell(agent)
            wait_s = agent.patience(watch.patience(max(0.0, counts_at - monotonic())))
            for ended in watch.descriptors & poller.wait(wait_s):
                poller.remove(ended)
                watch.ended(ended)
            self._wake.clear()
        while not self._out.empty():
            self._say(agent, self._out.get())
        self._tell(agent, last=True)

    def _tell(self, agent: Dealer, last: bool = False) -> None:
        """Tells what this member has done since the last time: to the agent, and to the file with its trace."""
        self._tell_counts(agent, last)
        TIMELINE.sample()
        if self._trace is not None:
            self._trace.write()

    def _look_after(self, changes: list[Link]) -> None:
        """Hears of the agent's loss, if the agent is a member. The end of any other agent ends this process."""
        for change in changes:
            self._agent_is_down = change is not Link.UP
            if change is Link.UP:
                self._watch.connected(AGENT_MEMBER)
            elif change is Link.DOWN:
                self._watch.disconnected(AGENT_MEMBER)
        for news in self._watch.lost():
            self.news.hear(news, monotonic())

    def _say(self, agent: Dealer, message: m.Message) -> None:
        """Sends a message. One that cannot be sent does not end this thread, which has others to send."""
        try:
            agent.put(m.encode(message))
        except Exception:
            log.exception("%s could not be sent to this rank's agent", type(message).__name__)

    def _tell_counts(self, agent: Dealer, last: bool) -> None:
        """Tells the agent counts of this member's collectives since the last time; at the end also their numbers in all."""
        s = self._settings
        made = self.flights.made() if last else None
        rows = [row for recorder in self.flights.recorders() for row in recorder.take_counts()]
        inside_s = max(0.0, monotonic() - min(self.flights.running(), default=monotonic()))
        inside_s = inside_s if inside_s >= COUNTS_EVERY_S else 0.0
        refused_count = self.strangers.refused_count - self._told_refused
        self._told_refused += refused_count
        pace = self._pace(last)
        if rows or inside_s or self._told_inside or refused_count or last or pace is not None:
            while len(rows) > ROWS_AT_MOST:
                self._say(agent, m.CollectiveCounts(s.job_id, s.attempt, s.member_id, tuple(rows[:ROWS_AT_MOST])))
                del rows[:ROWS_AT_MOST]
            self._say(
                agent,
                m.CollectiveCounts(s.job_id, s.attempt, s.member_id, tuple(rows), inside_s, refused_count, made, pace),
            )
        self._told_inside = bool(inside_s)

    def _pace(self, last: bool) -> PaceRow | None:
        """The pace since it was told last; None: it is not time to tell it, or there is none."""
        now = monotonic()
        if self._sampler is None or (now < self._pace_at and not last):
            return None
        self._pace_at = now + max(COUNTS_EVERY_S / 2, self._settings.world_size / PACES_A_SECOND)
        row = self._sampler.take()
        return row if self.news.pace.has_begun else None

    def _take(self, data: bytes) -> None:
        try:
            message = m.decode(data)
        except ProtocolError:
            return  # only the agent can reach this socket, and it speaks this version: see worker/agent.py
        if isinstance(message, m.RankWelcome | m.Refused):
            self._welcome.put(message)
        elif isinstance(message, m.Formed):
            self._formed.put(message.world)
        elif isinstance(message, m.Answer):
            if (answers := self._answers.get(message.question)) is not None:  # None: it comes too late
                answers.put(message)
        elif isinstance(message, m.Ask):
            self.send(self.flights.answer(message))
        elif isinstance(message, m.MemberLost):
            self.news.hear(message, monotonic())


def _activity(answer: m.Answer, rank_of: dict[int, int]) -> RankActivity:
    """An answer as the ranks of one generation need it."""
    late = Late(rank_of[answer.member_id], answer.host, answer.pid, answer.doing)
    unreached = tuple(rank_of[member_id] for member_id in answer.unreached if member_id in rank_of)
    return RankActivity(late, answer.sequence, answer.inside, answer.call, answer.line, unreached)
