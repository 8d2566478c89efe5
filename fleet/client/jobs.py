"""A conversation with an orchestrator about jobs: submit, look, wait, read, cancel, drain. Prints nothing.

Whatever is asked is asked again after a lost connection, so that a restarted orchestrator is only a pause.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from fleet import messages as m
from fleet.bounds import is_id, is_worker_id
from fleet.bus.context import Bus
from fleet.bus.control import Dealer, Link
from fleet.bus.poller import Poller
from fleet.bus.transfer import read_part
from fleet.client.run import DENIALS_UNTIL_FINAL
from fleet.client.target import Target, hello
from fleet.errors import ConfigError, FleetError, ProtocolError, UsageError
from fleet.stillness import LifeClock

SUBMITS_UNDER_WAY = 256
WORKER_ANSWERS_WITHIN_S = 30.0  # with a page of a listing, or with a few parts of a file


class Conversation:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bus.close()

    def submit(self, submits: Iterable[m.Submit], bundle: Path | None) -> dict[str, str]:
        """Returns once each job is on the orchestrator's disk with its files, or refused: why, by job; empty: taken."""
        waiting = {submit.job_id: submit for submit in submits}
        answered: dict[str, str] = {}

        def questions() -> list[m.Submit]:
            return [submit for job_id, submit in waiting.items() if job_id not in answered][:SUBMITS_UNDER_WAY]

        asked: set[str] = set()

        def take(message: m.Message) -> bool:
            if isinstance(message, m.Want) and bundle is not None:
                self._send(read_part(bundle, message))
            elif isinstance(message, m.Accepted | m.Rejected) and message.job_id in waiting:
                answered[message.job_id] = message.reason if isinstance(message, m.Rejected) else ""
                for submit in questions():
                    if isinstance(submit, m.Submit) and submit.job_id not in asked:
                        asked.add(submit.job_id)
                        self._send(submit)
            return len(answered) == len(waiting)

        def again() -> list[m.Submit]:
            first = questions()
            asked.update(submit.job_id for submit in first)
            return first

        self._until(again, take)
        return answered

    def find(self, job_id: str = "", group: str = "", limit: int = 1000) -> m.Jobs:
        """Jobs whose id begins so, of a sweep, or all: the newest first."""
        found: list[m.Jobs] = []

        def take(message: m.Message) -> bool:
            found.extend([message] if isinstance(message, m.Jobs) else [])
            return bool(found)

        self._until(lambda: [m.ListJobs(job_id, group, limit)], take)
        return found[0]

    def job(self, prefix: str) -> m.JobInfo:
        """The one job whose id begins so. Raises UsageError where there is none, or several."""
        found = self.find(prefix, limit=3) if is_id(prefix) else m.Jobs(())
        exact = [job for job in found.jobs if job.job_id == prefix]
        if not found.jobs:
            raise UsageError(f"there is no job {prefix!r} in this cluster; `fleet jobs` lists them")
        if len(found.jobs) > 1 and not exact:
            raise UsageError(f"several jobs begin with {prefix!r}: {', '.join(job.job_id for job in found.jobs)}, ...")
        return (exact or list(found.jobs))[0]

    def wait(
        self,
        job_ids: Iterable[str],
        told: Callable[[m.Ended], None] = lambda ended: None,
        within_s: float | None = None,
    ) -> dict[str, m.Ended]:
        """How each job ended; those that have not by `within_s` are missing. `told` is called for each as it ends."""
        missing = list(dict.fromkeys(job_ids))
        ended: dict[str, m.Ended] = {}
        until = None if within_s is None else self._clock.now() + within_s

        def take(message: m.Message) -> bool:
            if isinstance(message, m.Ended) and message.job_id in missing and message.job_id not in ended:
                ended[message.job_id] = message
                told(message)
            return len(ended) == len(missing)

        if missing:
            self._until(lambda: [m.Watch(job_id) for job_id in missing if job_id not in ended], take, until)
        return ended

    def cancel(self, job_id: str, kill: bool = False) -> None:
        self._until(lambda: [m.Cancel(job_id, kill), m.ListJobs(job_id)], lambda message: isinstance(message, m.Jobs))

    def log(self, job_id: str, rank: int, offset: int) -> m.LogPart:
        """A part of what a rank printed; from the end where the offset is negative. Raises UsageError."""
        found: list[m.LogPart] = []

        def take(message: m.Message) -> bool:
            found.extend([message] if isinstance(message, m.LogPart) and message.rank == rank else [])
            return bool(found)

        self._until(lambda: [m.ReadLog(job_id, rank, offset)], take)
        if found[0].error:
            raise UsageError(found[0].error)
        return found[0]

    def drain(self, worker_id: str, within_s: float, undo: bool) -> tuple[str, ...]:
        """The jobs that run there. Raises UsageError where there is no such worker."""
        if not is_worker_id(worker_id):
            raise UsageError(f"there is no worker {worker_id!r} in this cluster; `fleet workers` lists them")
        found: list[m.Drained] = []

        def take(message: m.Message) -> bool:
            found.extend([message] if isinstance(message, m.Drained) else [])
            return bool(found)

        self._until(lambda: [m.Drain(worker_id, within_s, undo)], take)
        if found[0].error:
            raise UsageError(found[0].error)
        return found[0].jobs

    def ask_workers(self, asked: Sequence[m.ListFiles | m.ReadFile]) -> list[m.Files | m.FilePart]:
        """What workers say of a job's output, in the order of the questions, whose numbers differ. Raises FleetError."""
        answers: dict[int, m.Files | m.FilePart] = {}
        missing = {question.question: question for question in asked}

        def take(message: m.Message) -> bool:
            if isinstance(message, m.Files | m.FilePart) and missing.pop(message.question, None) is not None:
                answers[message.question] = message
            return not missing

        self._until(lambda: list(missing.values()), take, self._clock.now() + WORKER_ANSWERS_WITHIN_S)
        if missing:
            worker_id = next(iter(missing.values())).worker_id
            raise FleetError(f"worker {worker_id} did not answer within {WORKER_ANSWERS_WITHIN_S:g} s")
        return [answers[question.question] for question in asked]

    def pause(self, seconds: float) -> None:
        """Lets time pass, and takes what comes."""
        self._until(list, lambda message: False, self._clock.now() + seconds)

    def _send(self, message: m.Message) -> None:
        self._dealer.send(m.encode(message))

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
            self._poller.wait(self._clock.waits(left_s))
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
                    for question in questions():
                        self._send(question)
                elif isinstance(message, m.Unknown):
                    self._send(hello(self._versions))
                elif isinstance(message, m.Refused):
                    raise ConfigError(f"the orchestrator at {self._target.name} refused this client: {message.reason}")
                else:
                    done = take(message) or done
            if done:
                return

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
