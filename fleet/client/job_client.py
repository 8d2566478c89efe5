"""Client of an orchestrator's jobs: submits, lists, waits, reads, cancels, drains. Prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from fleet import messages as m
from fleet.bounds import is_id, is_worker_id
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Lost
from fleet.client.connection import Connection
from fleet.client.handshake import AT_ONCE
from fleet.client.queries import CHECK_EVERY_S
from fleet.client.target import Target
from fleet.errors import FleetError, UsageError
from fleet.stillness import LifeClock
from fleet.transfer import read_part

MEGABYTE_WEIGHT = AT_ONCE // 16  # of questions whose answers may have a megabyte each
UNKNOWN = "the orchestrator does not know this job, or no longer"
WORKER_ANSWERS_WITHIN_S = 30.0  # with a page of a listing, or with a few parts of a file
ASKED_TIMES = 3
MEASURED_WITHIN_S = 2.0

A = TypeVar("A", bound=m.Jobs | m.LogPart | m.Drained | m.Files | m.FilePart)


class JobClient:
    """Client of one orchestrator. Methods raise ConfigError where it does not answer in time, or refuses this client.

    `check` is called a few times a second while an answer is waited for: what it raises ends the wait.
    """

    def __init__(self, target: Target, check: Callable[[], None] | None = None) -> None:
        self._check = check
        self._bus = Bus(target.lock)
        self._clock = LifeClock()
        advice = ": is it running, and is the address right?"
        self._connection = Connection(self._bus, target, self._clock, advice)
        self._watched: dict[int, str] = {}  # jobs by the numbers of the questions about their ends
        self._ended: dict[str, m.JobEnded] = {}  # ends of jobs that have come, and that no `ends` has taken yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bus.close()

    def submit(self, submits: Iterable[m.Submit], bundle: Path | None) -> None:
        """Returns once all jobs are on the orchestrator's disk with their files. Raises FleetError with the reasons of others."""
        refused: list[str] = []
        missing = {submit.job_id: submit for submit in submits}
        count = len(missing)

        def take(message: m.Message) -> None:
            if isinstance(message, m.Want) and bundle is not None:
                self._connection.put(read_part(bundle, message))
            elif isinstance(message, m.Accepted | m.Rejected) and message.job_id in missing:
                del missing[message.job_id]
                if isinstance(message, m.Rejected):
                    refused.append(message.reason)
                self._connection.drop(message.job_id)

        for submit in missing.values():
            self._connection.submit(submit)
        self._until(lambda: not missing, take)
        if refused:
            what = "the job was not taken" if count == 1 else f"{len(refused)} of {count} jobs were not taken"
            raise FleetError(f"{what}: {'; '.join(sorted(set(refused)))}")

    def find(self, job_id: str = "", sweep: str = "", limit: int = 1000) -> m.Jobs:
        """Jobs whose id begins so, of a sweep, or all: the newest first, as many pages as it takes."""
        found: list[m.JobInfo] = []
        before = 0
        while True:
            page = self._answer(m.ListJobs(job_id, sweep, limit - len(found), before), m.Jobs)
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
        """The end of each job, as it comes, until `within_s`. Other questions may be asked between two of them.

        A job that the orchestrator does not know, or no longer, has ended with UNKNOWN.
        """
        missing = dict.fromkeys(job_ids)
        until = None if within_s is None else self._clock.now() + within_s
        numbers = {job_id: self._connection.ask(m.WatchJob(job_id), standing=True) for job_id in missing}
        self._watched |= {number: job_id for job_id, number in numbers.items()}
        try:
            while missing and (until is None or self._clock.now() < until):
                self._until(lambda: any(job_id in missing for job_id in self._ended), until=until)
                for ended in list(self._ended.values()):
                    del self._ended[ended.job_id]
                    if ended.job_id in missing:
                        del missing[ended.job_id]
                        self._connection.drop(numbers[ended.job_id])
                        yield ended
        finally:
            for number in numbers.values():
                del self._watched[number]
                self._connection.drop(number)

    def cancel(self, job_ids: Iterable[str], kill: bool = False) -> None:
        """Asks the orchestrator to end the jobs; returns once it has read that."""
        left = iter(job_ids)
        while some := [m.Cancel(job_id, kill) for job_id in islice(left, AT_ONCE)]:
            # This is answered once the messages before it have been read.
            self._answers([m.ListJobs(limit=0)], m.Jobs, weight=AT_ONCE, before=some)

    def log(self, job_id: str, rank: int, offset: int) -> m.LogPart:
        """A part of a rank's output, from the end where the offset is negative. Raises UsageError."""
        (part,) = self.logs([job_id], rank, offset)
        if part.error:
            raise UsageError(part.error)
        return part

    def logs(self, job_ids: Iterable[str], rank: int, offset: int) -> list[m.LogPart]:
        """The same of many jobs, at once. A part that cannot be read has an error."""
        asked = [m.ReadLog(job_id, rank, offset) for job_id in job_ids]
        return list(self._answers(asked, m.LogPart, weight=MEGABYTE_WEIGHT).values())

    def drain(self, worker_id: str, within_s: float, undo: bool) -> tuple[str, ...]:
        """The jobs that run there. Raises UsageError where there is no such worker."""
        if not is_worker_id(worker_id):
            raise UsageError(f"there is no worker {worker_id!r} in this cluster; `fleet workers` lists them")
        drained = self._answer(m.Drain(worker_id, within_s, undo), m.Drained)
        if drained.error:
            raise UsageError(drained.error)
        return drained.jobs

    def ask_workers(
        self, asked: Sequence[m.ListFiles | m.ReadFile], within_s: float = WORKER_ANSWERS_WITHIN_S
    ) -> list[m.Files | m.FilePart]:
        """Answers of workers about a job's output, in the order of the questions. Raises FleetError.

        Asks again where no answer comes: a worker's connection that breaks takes questions with it.
        """
        answers: dict[int, m.Files | m.FilePart] = self._answers(asked, m.Files, m.FilePart, within_s=within_s)
        for place, question in enumerate(asked):
            if place not in answers:
                raise FleetError(f"worker {question.worker_id} did not answer within {within_s:.0f} s")
        return list(answers.values())

    def measure(self, job_id: str, worker_count: int, within_s: float = MEASURED_WITHIN_S) -> list[m.Used]:
        """What the workers of a job that runs use, and its ranks there; those that do not answer in time are missing.

        Raises UsageError where it does not run.
        """
        found: dict[str, m.Used] = {}
        number = self._connection.ask(m.Measure(job_id))

        def take(message: m.Message) -> None:
            if isinstance(message, m.Used) and message.question == number:
                if message.error:
                    raise UsageError(message.error)
                found[message.worker_id] = message

        try:
            self._until(lambda: len(found) >= worker_count, take, self._clock.now() + within_s)
        finally:
            self._connection.drop(number)
        return list(found.values())

    def pause(self, seconds: float) -> None:
        """Lets time pass, and takes messages meanwhile."""
        self._until(lambda: False, until=self._clock.now() + seconds)

    def _answer(self, question: m.Question, kind: type[A]) -> A:
        return self._answers([question], kind, weight=MEGABYTE_WEIGHT)[0]

    def _answers(
        self,
        asked: Sequence[m.Question],
        *kinds: type[A],
        weight: int = 1,
        before: Sequence[m.Message] = (),
        within_s: float | None = None,
    ) -> dict[int, A]:
        """Answers by their places among the questions, in order; with `within_s` some may be missing, and are asked for again."""
        numbers: dict[int, int] = {}  # of all times that the questions were asked: their places
        answers: dict[int, A] = {}

        def take(message: m.Message) -> None:
            if isinstance(message, kinds) and message.question in numbers:
                answers[numbers[message.question]] = message

        try:
            for _ in range(1 if within_s is None else ASKED_TIMES):
                for place, question in enumerate(asked):
                    if place not in answers:
                        numbers[self._connection.ask(question, weight, before)] = place
                until = None if within_s is None else self._clock.now() + within_s / ASKED_TIMES
                self._until(lambda: len(answers) == len(asked), take, until)
        finally:
            for number in numbers:
                self._connection.drop(number)
        return dict(sorted(answers.items()))

    def _until(
        self,
        done: Callable[[], bool],
        take: Callable[[m.Message], None] = lambda message: None,
        until: float | None = None,
    ) -> None:
        """Hands each message to `take`, until `done` or the time is over."""
        while not done() and (until is None or self._clock.now() < until):
            wait_s = None if until is None else max(0.0, until - self._clock.now())
            if self._check is not None:
                self._check()
                wait_s = CHECK_EVERY_S if wait_s is None else min(wait_s, CHECK_EVERY_S)
            self._connection.wait(wait_s)
            for event in self._connection.receive():
                if not isinstance(event, Lost | Arrived):
                    self._note_end(event)
                    take(event)

    def _note_end(self, message: m.Message) -> None:
        """Keeps the ends of watched jobs, whatever else is being asked."""
        if isinstance(message, m.JobEnded):
            self._ended[message.job_id] = message
        elif isinstance(message, m.Jobs) and (job_id := self._watched.get(message.question)) and not message.jobs:
            self._ended[job_id] = m.JobEnded(job_id, UNKNOWN, -1)
