"""A conversation with an orchestrator about jobs: submit, look, wait, read, cancel, drain. Prints nothing.

Whatever is asked is asked again after a lost connection, so that a restarted orchestrator is only a pause.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from msgspec.structs import replace

from fleet import messages as m
from fleet.bounds import is_id, is_worker_id
from fleet.bus.context import Bus
from fleet.bus.control import Dealer, Link
from fleet.bus.poller import Poller
from fleet.client.attached_job import DENIALS_UNTIL_FINAL
from fleet.client.target import Target, hello
from fleet.errors import ConfigError, FleetError, ProtocolError, UsageError
from fleet.stillness import LifeClock
from fleet.transfer import read_part

SUBMITS_UNDER_WAY = WATCHES_UNDER_WAY = 256
QUESTIONS_UNDER_WAY = 16  # whose answers may have a megabyte each
UNKNOWN = "the orchestrator does not know this job, or no longer"
WORKER_ANSWERS_WITHIN_S = 30.0  # with a page of a listing, or with a few parts of a file
WORKER_ASKED_TIMES = 3

Numbered = m.ListJobs | m.ReadLog | m.Drain
A = TypeVar("A", m.Jobs, m.LogPart, m.Drained)


class JobClient:
    """One connection. Methods raise ConfigError where no orchestrator answers in time, or it refuses this client."""

    def __init__(self, target: Target, versions: m.Versions) -> None:
        self._target = target
        self._versions = versions
        self._bus = Bus(target.lock)
        self._dealer = Dealer(self._bus, target.endpoint, f"client/{uuid.uuid4().hex}".encode())
        self._poller = Poller(self._dealer.poll_sockets)
        self._clock = LifeClock()
        self._deadline: float | None = self._clock.now() + target.timeout_s  # to be let in; None: it is
        self._welcome = False  # on this connection
        self._denied_count = 0
        self._connection = 0  # how often it was let in
        self._numbers = count(1)  # of questions
        self._watching: dict[int, str] = {}  # jobs by the questions about their ends that are not answered
        self._ended: dict[str, m.JobEnded] = {}  # jobs whose end nobody has asked for since

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bus.close()

    def submit(self, submits: Iterable[m.Submit], bundle: Path | None) -> dict[str, str]:
        """Returns once each job is on the orchestrator's disk with its files, or refused: why, by job; empty: taken."""
        waiting = {submit.job_id: submit for submit in submits}
        under_way: dict[str, m.Submit] = {}
        answered: dict[str, str] = {}

        def following() -> list[m.Submit]:
            found = []
            while waiting and len(under_way) < SUBMITS_UNDER_WAY:
                job_id = next(iter(waiting))
                under_way[job_id] = waiting.pop(job_id)
                found.append(under_way[job_id])
            return found

        def take(message: m.Message) -> bool:
            if isinstance(message, m.Want) and bundle is not None:
                self._send(read_part(bundle, message))
            elif isinstance(message, m.Accepted | m.Rejected) and under_way.pop(message.job_id, None) is not None:
                answered[message.job_id] = message.reason if isinstance(message, m.Rejected) else ""
                for submit in following():
                    self._send(submit)
            return not under_way

        following()
        if under_way:
            self._until(lambda: list(under_way.values()), take)
        return answered

    def find(self, job_id: str = "", sweep: str = "", limit: int = 1000) -> m.Jobs:
        """Jobs whose id begins so, of a sweep, or all: the newest first, as many pages as it takes."""
        found: list[m.JobInfo] = []
        before = 0
        while True:
            page = self._asked([m.ListJobs(job_id, sweep, limit - len(found), before)], m.Jobs)[0]
            found += page.jobs
            before = page.next
            if not page.jobs or not before or len(found) >= limit:
                return m.Jobs(tuple(found), page.left_out)

    def job(self, prefix: str) -> m.JobInfo:
        """The one job whose id begins so. Raises UsageError where there is none, or several."""
        found = self.find(prefix, limit=3) if is_id(prefix) else m.Jobs(())
        exact = [job for job in found.jobs if job.job_id == prefix]
        if not found.jobs:
            raise UsageError(f"there is no job {prefix!r} in this cluster; `fleet jobs` lists them")
        if len(found.jobs) > 1 and not exact:
            raise UsageError(f"several jobs begin with {prefix!r}: {', '.join(job.job_id for job in found.jobs)}, ...")
        return (exact or list(found.jobs))[0]

    def ends(self, job_ids: Iterable[str], within_s: float | None = None) -> Iterator[m.JobEnded]:
        """How each job ended, as it does; until `within_s`, if given. Other questions may be asked between two of them.

        One that the orchestrator does not know, or no longer, has ended with UNKNOWN.
        """
        missing = dict.fromkeys(job_ids)
        until = None if within_s is None else self._clock.now() + within_s
        unwatched: list[str] = []
        connection = 0  # that they are watched on

        def questions() -> list[m.WatchJob]:
            nonlocal connection
            if connection != self._connection:  # what was asked before is lost
                connection = self._connection
                unwatched[:] = reversed(missing)
                self._watching.clear()
            found = []
            while unwatched and len(self._watching) < WATCHES_UNDER_WAY:
                job_id, number = unwatched.pop(), next(self._numbers)
                self._watching[number] = job_id
                found.append(m.WatchJob(job_id, number))
            return found

        def take(message: m.Message) -> bool:
            if isinstance(message, m.Jobs):
                for watch in questions():
                    self._send(watch)
            return any(job_id in missing for job_id in self._ended)

        while missing and (until is None or self._clock.now() < until):
            if not any(job_id in missing for job_id in self._ended):
                self._until(questions, take, until)
            for ended in list(self._ended.values()):
                del self._ended[ended.job_id]
                if ended.job_id in missing:
                    del missing[ended.job_id]
                    yield ended

    def wait(self, job_ids: Iterable[str], within_s: float | None = None) -> dict[str, m.JobEnded]:
        """How each job ended; those that have not by `within_s` are missing."""
        return {ended.job_id: ended for ended in self.ends(job_ids, within_s)}

    def cancel(self, job_ids: Iterable[str], kill: bool = False) -> None:
        """Asks the orchestrator to end them; returns once it has read that."""
        left = list(job_ids)
        while left:
            now, left = left[:SUBMITS_UNDER_WAY], left[SUBMITS_UNDER_WAY:]
            fence = m.ListJobs(limit=0, question=next(self._numbers))
            questions = [*(m.Cancel(job_id, kill) for job_id in now), fence]
            self._until(
                lambda: questions,  # noqa: B023 - called before the next turn
                lambda message: isinstance(message, m.Jobs) and message.question == fence.question,  # noqa: B023
            )

    def log(self, job_id: str, rank: int, offset: int) -> m.LogPart:
        """A part of what a rank printed; from the end where the offset is negative. Raises UsageError."""
        part = self._asked([m.ReadLog(job_id, rank, offset)], m.LogPart)[0]
        if part.error:
            raise UsageError(part.error)
        return part

    def logs(self, job_ids: Iterable[str], rank: int, offset: int) -> list[m.LogPart]:
        """The same of many jobs, at once. A part that cannot be had has an error."""
        return self._asked([m.ReadLog(job_id, rank, offset) for job_id in job_ids], m.LogPart)

    def drain(self, worker_id: str, within_s: float, undo: bool) -> tuple[str, ...]:
        """The jobs that run there. Raises UsageError where there is no such worker."""
        if not is_worker_id(worker_id):
            raise UsageError(f"there is no worker {worker_id!r} in this cluster; `fleet workers` lists them")
        drained = self._asked([m.Drain(worker_id, within_s, undo)], m.Drained)[0]
        if drained.error:
            raise UsageError(drained.error)
        return drained.jobs

    def ask_workers(
        self, asked: Sequence[m.ListFiles | m.ReadFile], within_s: float = WORKER_ANSWERS_WITHIN_S
    ) -> list[m.Files | m.FilePart]:
        """What workers say of a job's output, in the order of the questions, whose numbers differ. Raises FleetError.

        Asks again what is not answered: a worker's connection that breaks takes questions with it.
        """
        answers: dict[int, m.Files | m.FilePart] = {}
        missing = {question.question: question for question in asked}

        def take(message: m.Message) -> bool:
            if isinstance(message, m.Unanswered) and message.question in missing:
                raise FleetError(f"the orchestrator could not answer: {message.reason}")
            if isinstance(message, m.Files | m.FilePart) and missing.pop(message.question, None) is not None:
                answers[message.question] = message
            return not missing

        for _ in range(WORKER_ASKED_TIMES):
            if missing:
                self._until(lambda: list(missing.values()), take, self._clock.now() + within_s / WORKER_ASKED_TIMES)
        if missing:
            worker_id = next(iter(missing.values())).worker_id
            raise FleetError(f"worker {worker_id} did not answer within {within_s:.0f} s")
        return [answers[question.question] for question in asked]

    def pause(self, seconds: float) -> None:
        """Lets time pass, and takes what comes."""
        self._until(list, lambda message: False, self._clock.now() + seconds)

    def _asked(self, asked: Sequence[Numbered], answer: type[A]) -> list[A]:
        """The answers, in the order of the questions, of which a bounded number is under way."""
        waiting = {(number := next(self._numbers)): replace(question, question=number) for question in asked}
        order = list(waiting)
        under_way: dict[int, m.Message] = {}
        answers: dict[int, A] = {}

        def following() -> list[m.Message]:
            found: list[m.Message] = []
            while waiting and len(under_way) < QUESTIONS_UNDER_WAY:
                number = next(iter(waiting))
                under_way[number] = waiting.pop(number)
                found.append(under_way[number])
            return found

        def take(message: m.Message) -> bool:
            if isinstance(message, m.Unanswered) and message.question in under_way:
                raise FleetError(f"the orchestrator could not answer: {message.reason}")
            if isinstance(message, answer) and under_way.pop(message.question, None) is not None:
                answers[message.question] = message
                for question in following():
                    self._send(question)
            return not under_way

        following()
        if under_way:
            self._until(lambda: list(under_way.values()), take)
        return [answers[number] for number in order]

    def _send(self, message: m.Message) -> None:
        self._dealer.put(m.encode(message))

    def _until(
        self,
        questions: Callable[[], Sequence[m.Message]],
        take: Callable[[m.Message], bool],
        until: float | None = None,
    ) -> None:
        """Asks, now and after each lost connection, and takes what comes, until `take` says that it was all."""
        if self._welcome:
            for question in questions():
                self._send(question)
        while True:
            limits = [limit for limit in (until, self._deadline) if limit is not None]
            left_s = min(limits) - self._clock.now() if limits else None
            if left_s is not None and left_s <= 0:
                if self._deadline is None:
                    return
                name, timeout_s = self._target.name, self._target.timeout_s
                raise ConfigError(
                    f"no orchestrator answered at {name} within {timeout_s:g} s: is it running, and is the address right?"
                )
            self._poller.wait(self._clock.waits(self._dealer.patience(left_s)))
            self._clock.now()
            for link in self._dealer.changes():
                self._link(link)
            done = False
            for arrived in self._dealer.receive():
                try:
                    message = m.decode(arrived.data)
                except ProtocolError as error:
                    raise ConfigError(f"the orchestrator at {self._target.name}: {error}") from None
                if isinstance(message, m.Welcome):
                    self._welcome, self._deadline = True, None
                    self._connection += 1
                    for question in questions():
                        self._send(question)
                elif isinstance(message, m.Unknown):
                    self._send(hello(self._versions))
                elif isinstance(message, m.Refused):
                    raise ConfigError(f"the orchestrator at {self._target.name} refused this client: {message.reason}")
                else:
                    self._note_end(message)
                    done = take(message) or done
            if done:
                return

    def _note_end(self, message: m.Message) -> None:
        """What comes of watched jobs, whatever else is being asked."""
        if isinstance(message, m.JobEnded):
            self._ended[message.job_id] = message
        elif isinstance(message, m.Jobs) and (job_id := self._watching.pop(message.question, "")) and not message.jobs:
            self._ended[job_id] = m.JobEnded(job_id, UNKNOWN, -1)

    def _link(self, link: Link) -> None:
        if link is Link.UP:
            self._denied_count = 0
            self._send(hello(self._versions))
        elif link is Link.DOWN:
            self._welcome = False
        else:
            self._denied_count += 1
            if self._denied_count >= DENIALS_UNTIL_FINAL:
                raise ConfigError(
                    f"the orchestrator at {self._target.name} does not let this client in: the secret is wrong or missing "
                    "on one side (FLEET_SECRET, FLEET_SECRET_FILE), or no orchestrator of fleet listens there"
                )


def refused(answers: Mapping[str, str]) -> None:
    """Raises FleetError with the reasons of jobs that were not taken."""
    reasons = sorted({reason for reason in answers.values() if reason})
    if reasons:
        count = sum(bool(reason) for reason in answers.values())
        what = "the job was not taken" if len(answers) == 1 else f"{count} of {len(answers)} jobs were not taken"
        raise FleetError(f"{what}: {'; '.join(reasons)}")
