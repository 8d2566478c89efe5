"""Output of jobs on its way to clients and logs: acknowledged, missing, or kept by workers until then. Pure.

A worker keeps the output of its ranks until the client has acknowledged it, also after the job's end. The result of a job
follows its output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fleet import messages as m
from fleet.orchestrator.clients import Clients
from fleet.orchestrator.effects import Effects
from fleet.orchestrator.job import ON_WORKERS, Job, JobState
from fleet.orchestrator.membership import Membership
from fleet.orchestrator.state import KeepOutput, Worker


@dataclass(eq=False)
class Owed:
    """A job that has ended, and whose client has not acknowledged all of its output."""

    job: Job
    keepers: set[str]  # workers that keep it until then
    awaited: set[str] | None = None  # workers that say it all again before the result follows; None: not asked for


@dataclass(eq=False)
class JobOutput:
    """Invariant: a job in `owed` has ended, and its client was there then."""

    effects: Effects
    membership: Membership
    clients: Clients
    owed: dict[str, Owed] = field(default_factory=dict)

    def printed(self, job: Job, worker: Worker, output: m.Output) -> None:
        """Output goes on to the client, or into the log. A client that is away gets it later, since the worker keeps it."""
        member_id = output.member_id
        if job.client:
            job.printed[member_id] = max(output.number, job.printed.get(member_id, 0))
        if self.clients.reaches(job.client):
            self.clients.send(job.client, output)
        elif job.detached:
            last = job.kept.get(member_id, output.number - 1 if job.kept_unknown else 0)
            if output.number > last + 1:  # one before it was lost
                if job.asked.get(member_id) != last:  # once, since all of them come again
                    job.asked[member_id] = last
                    self.effects.send(worker.peer, m.Repeat(job.job_id, job.attempt))
                return
            if output.number == last + 1:
                job.kept[member_id] = output.number
                self.effects.add(KeepOutput(job.job_id, member_id, output.data))
            self.effects.send(worker.peer, m.OutputAck(job.job_id, job.attempt, member_id, output.number))

    def acknowledged(self, job: Job, ack: m.OutputAck) -> None:
        job.acked[ack.member_id] = max(ack.number, job.acked.get(ack.member_id, 0))
        if job.state in ON_WORKERS:
            self.membership.send(job.seats[ack.member_id], ack)
        elif not job.owes_output:
            self.settle(job)

    def repeat(self, job: Job, repeat: m.Repeat) -> None:
        """The client may lack output: workers say again what was not acknowledged."""
        if job.state in ON_WORKERS or job.job_id in self.owed:
            self.membership.tell(job.workers, repeat)

    def tell_again(self, job: Job) -> None:
        """The client of a job that has ended is back. The result follows the output that may have been lost."""
        if (owed := self.owed.get(job.job_id)) is not None and owed.keepers:
            self.membership.tell(job.workers, m.Repeat(job.job_id, job.attempt))
            owed.awaited = set(owed.keepers)
        else:
            self.clients.send(job.client, job.result())

    def ended(self, job: Job) -> None:
        """Its workers keep the output that the client lacks, unless the client is gone."""
        if job.owes_output and job.client in self.clients.known:
            self.owed[job.job_id] = Owed(job, {w for w in job.workers if w in self.membership.workers})
        else:
            self.membership.tell(job.workers, m.Forget(job.job_id, job.attempt))

    def worker_is_back(self, worker: Worker, job: Job) -> None:
        """A worker that still holds a job is asked again for its output, or drops a job that has ended."""
        owed = self.owed.get(job.job_id)
        if owed is not None and worker.worker_id in (owed.awaited or ()):
            self.effects.send(worker.peer, m.Repeat(job.job_id, job.attempt))
        elif job.state is JobState.ENDED and (owed is None or worker.worker_id not in owed.keepers):
            self.effects.send(worker.peer, m.Forget(job.job_id, job.attempt))

    def is_kept_by(self, job: Job, worker: Worker) -> bool:
        owed = self.owed.get(job.job_id)
        return owed is not None and worker.worker_id in owed.keepers

    def from_keeper(self, job: Job, worker: Worker, message: m.Message) -> None:
        """A message of a worker about a job that has ended, and that it keeps output of."""
        if isinstance(message, m.Output):
            self.clients.send(job.client, message)
        elif isinstance(message, m.Repeated):
            self._repeated(self.owed[job.job_id], worker.worker_id)

    def worker_gone(self, worker_id: str) -> None:
        for owed in [owed for owed in self.owed.values() if worker_id in owed.keepers]:
            owed.keepers.discard(worker_id)
            self._repeated(owed, worker_id)

    def _repeated(self, owed: Owed, worker_id: str) -> None:
        """A worker has said all again, or is gone. The result follows the last of them."""
        if owed.awaited is not None:
            owed.awaited.discard(worker_id)
            if not owed.awaited:
                owed.awaited = None
                self.clients.send(owed.job.client, owed.job.result())

    def settle(self, job: Job) -> None:
        """The client has all of the output, or is gone: workers need not keep it."""
        if (owed := self.owed.pop(job.job_id, None)) is not None:
            self.membership.tell(job.workers, m.Forget(job.job_id, job.attempt))
            if owed.awaited is not None:
                self.clients.send(job.client, job.result())
