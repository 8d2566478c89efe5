"""A client's attachment to its one job: what is sent, printed and said, and when the job counts as ended; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fleet import messages as m
from fleet.client.output_sequence import OutputSequence
from fleet.deadlines import Deadlines

LEAVE_AFTER_S = 1.8  # after a cancel that nobody answers
SAY_WAITING_AFTER_S = 2.0


@dataclass(frozen=True)
class Say:
    """A line to the person at the terminal."""

    text: str


@dataclass(frozen=True)
class Print:
    """Output of a rank, once and in its order."""

    output: m.Output


Effect = m.Message | Say | Print  # a message is sent


class Attachment:
    """State of one job as its client knows it."""

    def __init__(self, job_id: str, orchestrator: str, local: bool, timeout_s: float, now: float) -> None:
        """`orchestrator` is its name for the person. A `local` one is embedded here, and nothing is said of it."""
        self.ended: m.JobEnded | None = None
        self.cancelled = False
        self._job_id = job_id
        self._orchestrator = orchestrator
        self._local = local
        self._timeout_s = timeout_s
        self.ever_started = False  # any rank, as far as this client was told
        self._welcomed = False
        self._lost = False
        self._outputs = OutputSequence()
        self._deadlines: Deadlines[Literal["say", "leave"]] = Deadlines()
        if not local:
            self._deadlines.set("say", now + SAY_WAITING_AFTER_S)

    def cancel(self, signal: int, now: float) -> list[Effect]:
        """Ends the job for the person; a second time, at once."""
        again, self.cancelled = self.cancelled, True
        if again or not self._welcomed:
            self._end("cancelled")
        cancel = m.Cancel(self._job_id, again, signal)
        if again or not self._welcomed:
            return [cancel]
        self._deadlines.set("leave", now + LEAVE_AFTER_S)
        return [Say("stopping all ranks (once more: at once)"), cancel]

    def lost(self) -> list[Effect]:
        if self.cancelled:
            return []
        self._lost = True
        return [Say(f"lost the orchestrator at {self._orchestrator}; trying again until it is back (Ctrl-C: leave)")]

    def step(self, message: m.Message) -> list[Effect]:
        if isinstance(message, m.Welcome):
            self._welcomed = True
            self._deadlines.discard("say")
            was_lost, self._lost = self._lost, False
            if was_lost:
                return [Say(f"the orchestrator at {self._orchestrator} is back")]
        elif isinstance(message, m.Started) and message.job_id == self._job_id:
            self.ever_started = True
        elif isinstance(message, m.Rejected) and message.job_id == self._job_id:
            self._end(f"not taken: {message.reason}")
        elif isinstance(message, m.JobWaiting) and not self._local:
            return [Say(f"job {message.job_id} waits: {message.reason}")]
        elif isinstance(message, m.Output):
            printed = [Print(message)] if self._outputs.is_next(message) else []
            return [*printed, *self._outputs.replies(message)]
        elif isinstance(message, m.JobEnded) and message.job_id == self._job_id:
            self.ended = message
        return []

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def tick(self, now: float) -> list[Effect]:
        """Acts on deadlines that are over. All that arrived before has been taken."""
        due = list(self._deadlines.due(now))
        if "leave" in due and self.ended is None:
            self._end("cancelled; the orchestrator did not answer, it stops the ranks by itself")
        if "say" in due:
            return [Say(f"no orchestrator answers at {self._orchestrator} yet; trying for {self._timeout_s:g} s")]
        return []

    def _end(self, reason: str) -> None:
        self.ended = m.JobEnded(self._job_id, reason, -1)
