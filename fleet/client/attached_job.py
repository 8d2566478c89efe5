"""Client of one job, from submission to end: sends the job and its bundle, prints its output, returns its end.

Decisions are those of attachment.py and connection.py. Lines of fleet's own go to stderr and begin with `fleet:`.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Lost
from fleet.bus.poller import Wake
from fleet.client.attachment import Attachment, Effect, Print, Say
from fleet.client.connection import Connection
from fleet.client.printer import Printer
from fleet.client.target import Target
from fleet.stillness import LifeClock
from fleet.text import shown
from fleet.transfer import read_part

ADVICE = (
    ": is it running, and is ORCHESTRATOR_ADDR right? (--timeout waits longer; without ORCHESTRATOR_ADDR the job runs on this "
    "machine)"
)


class AttachedJob:
    """A job that this client waits for. `cancel` may be called from a signal handler; a second call means at once."""

    def __init__(self, target: Target, submit: m.Submit, bundle: Path | None, printer: Printer) -> None:
        self.job_id = submit.job_id
        self._target = target
        self._submit = submit
        self._bundle = bundle
        self._printer = printer
        self._cancels: deque[int] = deque()
        self._wake = Wake()
        self._clock = LifeClock()
        self._attachment = Attachment(self.job_id, target.name, target.local, target.timeout_s, self._clock.now())

    def cancel(self, signal: int = 0) -> None:
        """Ranks are asked to stop by `signal`, as this process was; 0: SIGTERM."""
        self._cancels.append(signal)
        self._wake.set()

    @property
    def cancelled(self) -> bool:
        return self._attachment.cancelled or bool(self._cancels)

    @property
    def ever_started(self) -> bool:
        return self._attachment.ever_started

    def run(self) -> m.JobEnded:
        """Returns once the job has ended and all of its output is printed. Raises ConfigError if it cannot start.

        Raises FleetError where the cluster in this process fails, or nothing can be printed.
        """
        try:
            with Bus(self._target.lock) as bus:
                self._connection = Connection(bus, self._target, self._clock, ADVICE)
                self._connection.submit(self._submit)
                self._target.failure.listen(self._wake.set)
                try:
                    while self._attachment.ended is None:
                        self._connection.wait(self._until_deadline(), self._wake)
                        self._wake.clear()
                        self._round()
                        if self._attachment.ended is None:
                            self._target.failure.check()
                    return self._attachment.ended
                finally:
                    self._connection.put(m.Goodbye())  # the job's last ranks need not wait for this client
        finally:
            self._printer.finish(self._clock.now())
            self._wake.close()

    def _round(self) -> None:
        """Acts on all that has happened since the last round."""
        while self._cancels and self._attachment.ended is None:
            self._perform(self._attachment.cancel(self._cancels.popleft(), self._clock.now()))
        for event in self._connection.receive():
            if isinstance(event, Lost):
                self._perform(self._attachment.lost())
            elif not isinstance(event, Arrived):
                self._take(event)
        now = self._clock.now()
        self._printer.tick(now)
        self._perform(self._attachment.tick(now))

    def _until_deadline(self) -> float | None:
        deadlines = (self._printer.next_deadline(), self._attachment.next_deadline())
        deadline = min((at for at in deadlines if at is not None), default=None)
        return None if deadline is None else max(0.0, deadline - self._clock.now())

    def _take(self, message: m.Message) -> None:
        if isinstance(message, m.Want) and self._bundle is not None:
            self._connection.put(read_part(self._bundle, message))
            return
        if isinstance(message, m.Started) and not self._target.local:
            self._printer.name_of = lambda rank: f"{shown(message.workers[rank])}:{rank}"
        self._perform(self._attachment.step(message))

    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Print):
                output = effect.output
                self._printer.write(output.member_id, output.stream, output.data, self._clock.now())
            elif isinstance(effect, Say):
                self._printer.clear()
                say(effect.text)
            else:
                self._connection.put(effect)


def say(text: str) -> None:
    """Prints a line for the person at the terminal."""
    print(f"fleet: {shown(text)}", file=sys.stderr, flush=True)
