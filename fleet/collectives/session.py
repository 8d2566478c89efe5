"""A rank's line to its agent, in a thread of its own: joins the world, answers "what are you doing?", and asks it.

The thread owns the socket. It answers while the main thread is stuck in a collective, a data loader or a C extension,
as long as that one lets go of the GIL. Knows messages, and what the flight recorders show; no tensor.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from types import FrameType

from fleet import messages as m
from fleet.bounds import TEXT_CHARS
from fleet.bus.context import Bus
from fleet.bus.control import Dealer
from fleet.bus.descriptors import check_room
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller, Wake
from fleet.bus.strangers import Strangers
from fleet.collectives.conductor import UNANSWERED, RankActivity
from fleet.collectives.operation import EndedRank
from fleet.collectives.recorder import Recorder, text
from fleet.config import RankSettings
from fleet.errors import FleetError, Late, ProtocolError, RankEnded, WorldChanged
from fleet.stillness import Deadline
from fleet.world import World

ANSWER_WITHIN_S = 1.0
LOOK_UP_S = 0.1  # how often a wait for the others looks whether one has gone
AGENT_WITHIN_S = 10.0  # the agent is on this machine
TALLY_EVERY_S = 1.0
ROWS_AT_MOST = 1000  # of one CollectiveCounts
MADE_AT_MOST = 1000  # communicators whose collectives a rank that ends tells the number of

log = logging.getLogger("fleet.session")

_NOT_THE_USERS = tuple(
    {
        str(Path(__file__).resolve().parent.parent),
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        "<frozen",
    }
)


class Session:
    """Starts with its construction, ends with `close`. `recorders` is called from the session's thread."""

    def __init__(
        self, settings: RankSettings, pid: int, recorders: Callable[[], Sequence[tuple[int, Recorder]]]
    ) -> None:
        check_room()  # here, since the thread has nobody to tell; before anything is opened
        self._settings = settings
        self._pid = pid
        self._recorders = recorders
        self._lost: WorldChanged | None = None
        self.ended: dict[int, EndedRank] = {}  # ranks that have ended with 0 before this one
        self._wake = Wake()
        self._closing = threading.Event()
        self._out: queue.SimpleQueue[m.Message] = queue.SimpleQueue()
        self._welcome: queue.SimpleQueue[m.RankWelcome] = queue.SimpleQueue()
        self._formed: queue.SimpleQueue[World] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self._question = 0
        self._answers: dict[int, queue.SimpleQueue[m.Answer]] = {}  # by question: several threads may ask at once
        self._told_inside = False
        # Of this rank's inbox. The agent logs them: what a rank prints is its script's, and a peer that is killed while it
        # connects looks like one.
        self.strangers = Strangers(says=False)
        self.unreached: Callable[[], Sequence[int]] = lambda: ()  # ranks that it sent to and has no connection to
        self._told_refused = 0
        self._world: World | None = None
        self._thread = threading.Thread(target=self._run, name="fleet-session", daemon=True)
        self._thread.start()

    def welcome(self) -> m.RankWelcome:
        """Where the inbox goes. Raises FleetError where no agent answers."""
        s = self._settings
        self._send(m.RankHello(s.job_id, s.attempt, s.member_id, self._pid))
        for wait_s in Deadline(AGENT_WITHIN_S).waits():
            with contextlib.suppress(queue.Empty):
                return self._welcome.get(timeout=wait_s)
        raise FleetError(f"the worker agent at {s.control} did not answer rank {s.member_id}: has it died?")

    def check(self) -> None:
        """Raises WorldChanged once a rank of this world has gone. Called wherever this rank waits for others."""
        if self._lost is not None:
            raise self._lost.with_traceback(None)

    def join(self, address: str, memory: str, timeout_s: float) -> World | None:
        """The world, once every rank has joined it; None after `timeout_s`. Raises WorldChanged, RankEnded."""
        s = self._settings
        self._send(m.Join(s.job_id, s.attempt, s.member_id, self._pid, address, memory))
        for wait_s in Deadline(timeout_s).waits(LOOK_UP_S):
            self.check()
            for rank, ended in list(self.ended.items()):
                raise RankEnded(rank, ended.worker_id, ended.host, ended.pid, "fleet.init()")
            with contextlib.suppress(queue.Empty):
                self._world = self._formed.get(timeout=wait_s)
                break
        return self._world

    def inquire(self, communicator_id: int = 0, sequence: int = 0) -> list[RankActivity]:
        """What every other rank is doing now, in one communicator, and what it called as its collective of this number
        (0: its last one). One that does not answer within a second is said not to. May be called by several threads."""
        s = self._settings
        answers: queue.SimpleQueue[m.Answer] = queue.SimpleQueue()
        with self._asking:
            self._question = question = self._question + 1
            self._answers[question] = answers
        self._send(m.Ask(s.job_id, s.attempt, s.member_id, question, communicator_id, sequence=sequence))
        missing = set(range(s.world_size)) - {s.member_id}
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
                found.append(_activity(answer))
        del self._answers[question]
        for rank in missing:
            member = self._world.members[rank] if self._world else None
            host, pid = (member.host, member.pid) if member else ("?", 0)
            found.append(RankActivity(Late(rank, host, pid, UNANSWERED), -1, False, ""))
        return sorted(found, key=lambda activity: activity.late.rank)

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join()
        self._wake.close()

    def _send(self, message: m.Message) -> None:
        self._out.put(message)
        self._wake.set()

    def _run(self) -> None:
        s = self._settings
        with Bus(Lock()) as bus:
            agent = Dealer(bus, s.control, f"{s.job_id}/{s.attempt}/{s.member_id}/{self._pid}".encode())
            poller = Poller([*agent.poll_sockets, self._wake])
            tally_at = 0.0
            while not self._closing.is_set():
                while not self._out.empty():
                    self._say(agent, self._out.get())
                for arrived in agent.receive():
                    self._take(arrived.data)
                agent.changes()  # nothing to decide: an agent that is gone takes this process with it
                if monotonic() >= tally_at:
                    tally_at = monotonic() + TALLY_EVERY_S
                    self._tell_tally(agent)
                poller.wait(agent.patience(max(0.0, tally_at - monotonic())))
                self._wake.clear()
            self._tell_tally(agent, last=True)

    def _say(self, agent: Dealer, message: m.Message) -> None:
        """One that cannot be sent ends neither this thread nor the answers to what follows."""
        try:
            agent.put(m.encode(message))
        except Exception:
            log.exception("%s could not be sent to this rank's agent", type(message).__name__)

    def _tell_tally(self, agent: Dealer, last: bool = False) -> None:
        """What its collectives came to since the last time; the last time of all, also how many it made."""
        communicators = self._recorders()
        recorders = [recorder for _, recorder in communicators]
        made = (
            tuple((communicator_id, recorder.made_count) for communicator_id, recorder in communicators[-MADE_AT_MOST:])
            if last
            else None
        )
        rows = [row for recorder in recorders for row in recorder.counts.take()]
        running = [recorder.last.started for recorder in recorders if recorder.last and not recorder.last.ended]
        inside_s = max(0.0, monotonic() - min(running, default=monotonic()))
        inside_s = inside_s if inside_s >= TALLY_EVERY_S else 0.0
        refused_count, self._told_refused = (
            self.strangers.refused_count - self._told_refused,
            self.strangers.refused_count,
        )
        if rows or inside_s or self._told_inside or refused_count or last:
            s = self._settings
            while len(rows) > ROWS_AT_MOST:
                self._say(agent, m.CollectiveCounts(s.job_id, s.attempt, s.member_id, tuple(rows[:ROWS_AT_MOST])))
                del rows[:ROWS_AT_MOST]
            self._say(
                agent, m.CollectiveCounts(s.job_id, s.attempt, s.member_id, tuple(rows), inside_s, refused_count, made)
            )
        self._told_inside = bool(inside_s)

    def _take(self, data: bytes) -> None:
        try:
            message = m.decode(data)
        except ProtocolError:
            return  # only the agent can reach this socket, and it speaks this version: see worker/agent.py
        if isinstance(message, m.RankWelcome):
            self._welcome.put(message)
        elif isinstance(message, m.Formed):
            self._formed.put(message.world)
        elif isinstance(message, m.Answer):
            if (answers := self._answers.get(message.question)) is not None:  # None: it comes too late
                answers.put(message)
        elif isinstance(message, m.Ask):
            self._answer(message)
        elif isinstance(message, m.MemberLost) and not message.status.failed:
            gone, made = message.status, None if message.made is None else dict(message.made)
            self.ended.setdefault(gone.member_id, EndedRank(gone.worker_id, gone.host, gone.pid, made, monotonic()))
        elif isinstance(message, m.MemberLost) and self._lost is None:
            gone, generation = message.status, self._world.generation if self._world else self._settings.attempt
            reason = message.reason
            self._lost = WorldChanged(generation, gone.member_id, gone.worker_id, gone.host, gone.pid, reason)

    def _answer(self, ask: m.Ask) -> None:
        s = self._settings
        recorders = self._recorders()
        recorder = next(
            (recorder for communicator_id, recorder in recorders if communicator_id == ask.communicator_id), None
        )
        record = recorder.last if recorder is not None else None
        call, line, sequence = "", main_thread_line()[:TEXT_CHARS], 0
        if recorder is not None and record is not None:
            sequence = record.sequence
            if not record.ended:
                doing = f"is in collective #{sequence} {record.signature} at {record.where}"
            else:
                doing = f"is at {line}, after collective #{sequence} {record.signature}"
            # For a mismatch: where the call was made, also by a rank that has left it.
            asked = recorder.find(ask.sequence) if ask.sequence else record
            call, line = (str(asked.signature), asked.where) if asked is not None else ("", line)
        else:
            doing = f"is at {line}, before its first collective"
        doing, records = doing[:TEXT_CHARS], ""
        if ask.records:
            records = text((f"communicator {number}", recorder) for number, (_, recorder) in enumerate(recorders))
        self._out.put(
            m.Answer(
                s.job_id, s.attempt, ask.member_id, ask.question, s.member_id, "", self._pid, sequence,
                record is not None and not record.ended, doing, call, line, records, tuple(self.unreached()),
            )
        )  # fmt: skip
        self._wake.set()


def _activity(answer: m.Answer) -> RankActivity:
    late = Late(answer.member_id, answer.host, answer.pid, answer.doing)
    return RankActivity(late, answer.sequence, answer.inside, answer.call, answer.line, answer.unreached)


def main_thread_line() -> str:
    """Where the main thread is in the user's own code: 'train.py:41 in load_batch'."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "an unknown line"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
