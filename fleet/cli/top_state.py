"""State of `fleet top`: what a person looks at, what is known of it, and what to ask; pure.

Keys and answers go in; questions come out of `due`, and top_screen.py draws. Only what is on the screen is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from fleet import messages as m

EVERY_S = 1.0
WORKERS_A_SECOND, MEASURED_A_SECOND = 1000, 128  # in answers: a large cluster is asked less often
LOG_BYTES = 16384  # of one rank, from the end
SAID_FOR_S, SILENT_S = 5.0, 3.0
ANSWER_WITHIN_S = 2.0  # a rank, or it is stopped, frozen or cut off
WANTED_CHARS = 64
RECORDS_SHOWN = 3  # of each rank, with its stacks
FEW_RANKS = 16
JOB_ORDERS: tuple[m.JobOrder, ...] = ("state", "newest", "ranks", "time")
WORKER_ORDERS = ("trouble", "name", "load")
RANK_ORDERS = ("rank", "slowest first", "CPU", "memory")

View = Literal["cluster", "job", "stacks"]
Kind = Literal["workers", "jobs", "job", "used", "log", "end", "why", "cancel"]


class Due(NamedTuple):
    """A question. An earlier one of that kind is given up."""

    kind: Kind
    question: m.Question
    before: tuple[m.Message, ...] = ()
    standing: bool = False


@dataclass
class Asked:
    """The last question of a kind."""

    at: float
    is_answered: bool = False


@dataclass
class ListPlace:
    """Place in a list of rows that is longer than its part of the screen."""

    chosen: str = ""  # key of the row; empty: the first one
    offset: int = 0
    wanted: str = ""  # what is filtered for
    order: int = 0

    def move(self, keys: Sequence[str], by: int) -> None:
        if keys:
            at = keys.index(self.chosen) if self.chosen in keys else 0
            self.chosen = keys[max(0, min(len(keys) - 1, at + by))]

    def window(self, keys: Sequence[str], room: int) -> range:
        """The rows to show, with the chosen one among them."""
        at = keys.index(self.chosen) if self.chosen in keys else 0
        self.offset = max(0, min(self.offset, at, len(keys) - room))
        self.offset = max(self.offset, at - room + 1)
        return range(self.offset, min(len(keys), self.offset + room))


@dataclass
class Known:
    """What the orchestrator, workers and ranks have answered."""

    workers: m.Workers | None = None
    jobs: m.Jobs | None = None
    job: m.JobInfo | None = None
    ended: m.JobEnded | None = None
    log: m.LogPart | None = None
    used: dict[str, m.Used] = field(default_factory=dict)  # by worker
    cores_used: dict[int, float] = field(default_factory=dict)  # by rank
    # By rank: pid, the worker's clock, CPU seconds.
    use_before: dict[int, tuple[int, float, float]] = field(default_factory=dict)
    because: m.Because | None = None
    answers: dict[int, m.Answer] = field(default_factory=dict)

    def forget_job(self) -> None:
        self.job = self.ended = self.log = self.because = None
        self.answers.clear()
        self.forget_use()

    def forget_use(self) -> None:
        for found in (self.used, self.cores_used, self.use_before):
            found.clear()

    def take_use(self, used: m.Used) -> None:
        if used.error:
            return  # the job does not run any more, which its state says
        self.used[used.worker_id] = used
        for rank in used.ranks:
            pid, at_s, cpu_s = self.use_before.get(rank.member_id, (0, 0.0, 0.0))
            if pid == rank.pid and used.at_s > at_s:
                self.cores_used[rank.member_id] = max(0.0, (rank.cpu_s - cpu_s) / (used.at_s - at_s))
            self.use_before[rank.member_id] = rank.pid, used.at_s, rank.cpu_s


@dataclass
class Top:
    """What is on the screen, and what is known."""

    orchestrator: str  # as a person wrote it
    columns: int = 80
    lines: int = 24
    has_keys: bool = True  # False: it is printed once
    view: View = "cluster"
    focus: Literal["jobs", "workers"] = "jobs"
    jobs: ListPlace = field(default_factory=ListPlace)
    workers: ListPlace = field(default_factory=ListPlace)
    ranks: ListPlace = field(default_factory=lambda: ListPlace(order=-1))  # its order by default: see rank_order
    stacks_at: int = 0  # first line of the stacks that is shown
    job_id: str = ""
    known: Known = field(default_factory=Known)
    lost_since: float | None = None  # the connection
    is_typing: bool = False  # what to filter for
    confirming: str = ""  # id of a job that is cancelled if y is pressed
    has_help: bool = False
    is_over: bool = False
    said: str = ""
    said_until: float = 0.0
    next_due: float = 0.0
    _asked: dict[Kind, Asked] = field(default_factory=dict)
    _to_cancel: str = ""

    # Questions

    def due(self, now: float) -> list[Due]:
        """Questions whose time has come. The next ones come at `next_due`."""
        self.next_due = now + EVERY_S
        found: list[Due] = []
        if self._to_cancel:
            cancel = m.Cancel(self._to_cancel)
            self._ask(found, now, Due("cancel", m.ListJobs(self._to_cancel, limit=1), (cancel,)))
            self._to_cancel = ""
        if self.view == "cluster":
            count = len(self.known.workers.workers) if self.known.workers is not None else 0
            self._each(found, now, max(EVERY_S, count / WORKERS_A_SECOND), Due("workers", m.ListWorkers(health=True)))
            limit = self.jobs.offset + self.lines
            listed = m.ListJobs(limit=limit, order=JOB_ORDERS[self.jobs.order], wanted=self.jobs.wanted)
            self._each(found, now, EVERY_S, Due("jobs", listed))
            return found
        job = self.known.job
        if job is None or not job.outcome:
            self._each(found, now, EVERY_S, Due("job", m.ListJobs(self.job_id, limit=1)))
        if job is None:
            return found
        if job.outcome:
            self._once(found, now, Due("end", m.WatchJob(job.job_id)))
        elif job.state in ("running", "stopping"):
            every_s = max(EVERY_S, len(set(job.workers)) / MEASURED_A_SECOND)
            self._each(found, now, every_s, Due("used", m.Measure(job.job_id)), ANSWER_WITHIN_S)
        if self.view == "job" and job.detached and job.started_at and not (self.known.log and self.known.log.ended):
            self._each(found, now, EVERY_S, Due("log", m.ReadLog(job.job_id, self.rank, -LOG_BYTES)))
        if self.view == "stacks":
            self._once(found, now, Due("why", m.Why(job.job_id, stacks=True)))
        return found

    def _each(self, found: list[Due], now: float, every_s: float, ask: Due, within_s: float | None = None) -> None:
        """Asks again after so long, once it was answered, or `within_s` is over."""
        before = self._asked.get(ask.kind)
        if before is not None:
            unheard = not before.is_answered and (within_s is None or now - before.at < within_s)
            if unheard or now - before.at < every_s:
                self.next_due = min(self.next_due, max(now + 0.05, before.at + every_s))
                return
        self._ask(found, now, ask)

    def _once(self, found: list[Due], now: float, ask: Due) -> None:
        if ask.kind not in self._asked:
            self._ask(found, now, ask)

    def _ask(self, found: list[Due], now: float, ask: Due) -> None:
        self._asked[ask.kind] = Asked(now)
        found.append(ask)

    def _again(self, *kinds: Kind) -> None:
        """Asks at once: something else is wanted now."""
        for kind in kinds:
            self._asked.pop(kind, None)

    def asked_at(self, kind: Kind) -> float:
        return self._asked[kind].at if kind in self._asked else 0.0

    def silent_s(self, now: float) -> float:
        """How long the orchestrator owes an answer."""
        owed = [asked.at for kind, asked in self._asked.items() if kind in self._wanted and not asked.is_answered]
        return now - min(owed, default=now)

    @property
    def _wanted(self) -> tuple[Kind, ...]:
        return ("workers", "jobs") if self.view == "cluster" else ("job", "log")

    def is_complete(self, now: float) -> bool:
        """Whether all that the screen shows has come once, or will not come."""
        ask = self._asked.get("used")
        expected = len(set(self.known.job.workers)) if self.known.job is not None else 0
        measured = ask is None or len(self.known.used) >= expected or now - ask.at > ANSWER_WITHIN_S
        return measured and all(asked.is_answered for kind, asked in self._asked.items() if kind != "used")

    # Answers

    def take(self, kind: Kind, message: m.Message, now: float) -> None:
        """An answer to the last question of that kind."""
        known = self.known
        if kind not in ("why", "end") or isinstance(message, m.Answer | m.JobEnded):
            self._asked.setdefault(kind, Asked(now)).is_answered = True
        if isinstance(message, m.Workers):
            known.workers = message
        elif isinstance(message, m.Jobs) and kind == "jobs":
            known.jobs = message
        elif isinstance(message, m.Jobs) and kind == "job":
            self._take_job(message.jobs[0] if message.jobs else None, now)
        elif isinstance(message, m.Jobs) and kind == "cancel":
            outcome = message.jobs[0].outcome if message.jobs else ""
            told = "is told to end" if outcome in ("", "cancelled") else f"has ended already: {outcome}"
            self.say(f"the job {told}" if message.jobs else "the orchestrator does not know this job", now)
            self._again("jobs", "job")
        elif isinstance(message, m.JobEnded):
            known.ended = message
        elif isinstance(message, m.Used):
            known.take_use(message)
        elif isinstance(message, m.LogPart):
            known.log = message
        elif isinstance(message, m.Because):
            known.because = message
        elif isinstance(message, m.Answer):
            known.answers[message.member_id] = message

    def _take_job(self, job: m.JobInfo | None, now: float) -> None:
        if job is None:
            self.say(f"there is no job {self.job_id} in this cluster, or no longer", now)
            self._show("cluster")
            return
        before, self.known.job = self.known.job, job
        if before is not None and before.attempt != job.attempt:
            self.known.forget_use()
        if job.outcome and before is not None and not before.outcome:
            self._again("log")

    def say(self, text: str, now: float) -> None:
        self.said, self.said_until = text, now + SAID_FOR_S

    # What is shown

    @property
    def rank(self) -> int:
        """The chosen rank of the job: at first the one that failed, or holds the others up."""
        if self.ranks.chosen:
            return int(self.ranks.chosen)
        if self.known.ended is not None and self.known.ended.cause >= 0:
            return self.known.ended.cause
        job = self.known.job
        return job.straggler.ranks[0] if job is not None and job.straggler is not None else 0

    @property
    def rank_order(self) -> str:
        """By their numbers where they are few, else the slowest first, until a person says otherwise."""
        order = self.ranks.order
        if order < 0:
            order = 0 if self.known.job is None or self.known.job.world_size <= FEW_RANKS else 1
        return RANK_ORDERS[order]

    def ranks_in_order(self) -> list[int]:
        known = self.known
        ranks = range(known.job.world_size if known.job is not None else 0)
        if self.rank_order == "CPU":
            return sorted(ranks, key=lambda rank: -known.cores_used.get(rank, 0.0))
        if self.rank_order == "memory":
            memory = {rank.member_id: rank.memory_bytes for used in known.used.values() for rank in used.ranks}
            return sorted(ranks, key=lambda rank: -memory.get(rank, 0))
        if self.rank_order == "slowest first" and known.job is not None:
            slow = known.job.straggler.ranks if known.job.straggler is not None else ()
            waited = {times.rank: times.waited for times in known.job.times}
            return sorted(ranks, key=lambda rank: (rank not in slow, waited.get(rank, 2.0)))
        return list(ranks)

    @property
    def worker_order(self) -> str:
        return WORKER_ORDERS[self.workers.order]

    def job_ids(self) -> list[str]:
        return [] if self.known.jobs is None else [job.job_id for job in self.known.jobs.jobs]

    def _show(self, view: View, job_id: str = "") -> None:
        if view == "cluster":
            self.known.forget_job()
            self._again("jobs", "workers", "job", "used", "log", "end", "why")
        elif self.view == "cluster":
            self.ranks, self.job_id = ListPlace(order=-1), job_id
            self._again("job", "used", "log", "end", "why")
        self.view = view

    def open(self, job_id: str) -> None:
        self._show("job", job_id)

    # Keys

    def press(self, keys: Sequence[str], now: float) -> None:
        """Keys that were read at once. Behind one that asks for a confirmation the rest is dropped: it may be pasted text."""
        for key in keys:
            if self.confirming:
                self._confirm(key, now)
                continue
            if self.is_typing:
                self._type(key)
                continue
            if self.has_help:
                self.has_help = False
                if key != "q":
                    continue
            self._do(key, now)
            if self._is_asking():
                return

    def _is_asking(self) -> bool:
        return bool(self.confirming)

    def _confirm(self, key: str, now: float) -> None:
        job_id, self.confirming = self.confirming, ""
        if key in ("y", "Y"):
            self._to_cancel = job_id
        else:
            self.say("nothing is cancelled", now)

    def _type(self, key: str) -> None:
        place = self.jobs if self.focus == "jobs" else self.workers
        if key in ("enter", "tab", "up", "down"):
            self.is_typing = False
        elif key in ("escape", "clear"):
            self.is_typing, place.wanted = key == "clear", ""
        elif key == "backspace":
            place.wanted = place.wanted[:-1]
        elif len(key) == 1:
            place.wanted = (place.wanted + key)[:WANTED_CHARS]
        place.offset = 0
        self._again("jobs")

    def _do(self, key: str, now: float) -> None:
        moves = {
            "up": -1,
            "k": -1,
            "down": 1,
            "j": 1,
            "page up": -10,
            "page down": 10,
            "home": -1000000,
            "end": 1000000,
        }
        if key in moves:
            self._move(moves[key])
        elif key == "q":
            self.is_over = True
        elif key in ("?", "h"):
            self.has_help = True
        elif key == "escape" or (key in ("left", "backspace") and self.view != "cluster"):
            self._back()
        elif key in ("c", "s", "enter", "right"):
            self._act(key, now)
        elif key == "o":
            self._reorder()
        elif key == "/" and self.view == "cluster":
            self.is_typing = True
        elif key == "tab" and self.view == "cluster":
            self.focus = "workers" if self.focus == "jobs" else "jobs"

    def _move(self, by: int) -> None:
        if self.view == "stacks":
            self.stacks_at = max(0, self.stacks_at + by)
        elif self.view == "job":
            self.ranks.chosen = self.ranks.chosen or str(self.rank)
            self.ranks.move([str(rank) for rank in self.ranks_in_order()], by)
            self.known.log = None
            self._again("log")
        elif self.focus == "jobs":
            self.jobs.move(self.job_ids(), by)
        else:
            self.workers.offset = max(0, self.workers.offset + by)  # its end is found when it is drawn

    def _back(self) -> None:
        if self.view == "stacks":
            self.view = "job"
            self.known.because = None
            self.known.answers.clear()
            self._again("why")
        elif self.view == "job":
            self._show("cluster")
        else:
            place = self.jobs if self.focus == "jobs" else self.workers
            place.wanted, place.offset = "", 0
            self._again("jobs")

    def _act(self, key: str, now: float) -> None:
        """Something about the chosen job."""
        if self.view == "cluster":
            job_ids = self.job_ids()
            if self.focus != "jobs" or not job_ids:
                self.say("choose a job first: Tab changes to the list of jobs" if job_ids else "there is no job", now)
                return
            job_id = self.jobs.chosen if self.jobs.chosen in job_ids else job_ids[0]
            info = next(job for job in self.known.jobs.jobs if job.job_id == job_id) if self.known.jobs else None
        else:
            job_id, info = self.job_id, self.known.job
        if key == "c" and info is not None and info.outcome:
            self.say(f"job {job_id} has ended: {info.outcome}", now)
        elif key == "c":
            self.confirming = job_id
        elif key == "s" and info is not None and info.state not in ("running", "stopping"):
            self.say(f"job {job_id} has no ranks to ask: it is {info.status}", now)
        elif key == "s":
            self._show("job", job_id)
            self.known.because, self.stacks_at = None, 0
            self.known.answers.clear()
            self._again("why")
            self.view = "stacks"
        elif self.view == "cluster":
            self.jobs.chosen = job_id
            self._show("job", job_id)

    def _reorder(self) -> None:
        if self.view == "job":
            self.ranks.order = (self.ranks.order + 1) % len(RANK_ORDERS)
        elif self.focus == "jobs":
            self.jobs.order, self.jobs.offset, self.jobs.chosen = (self.jobs.order + 1) % len(JOB_ORDERS), 0, ""
            self._again("jobs")
        else:
            self.workers.order = (self.workers.order + 1) % len(WORKER_ORDERS)
