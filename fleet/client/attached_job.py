"""Runs one job: says hello, submits, sends the bundle, prints what comes, cancels when told, returns how it ended.

The shell of the client. What it prints of itself goes to stderr and begins with `fleet:`.
"""

from __future__ import annotations

import sys
import uuid
from collections import deque
from pathlib import Path

from msgspec.structs import replace

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Dealer, Link
from fleet.bus.poller import Poller, Wake
from fleet.client.output_sequence import OutputSequence
from fleet.client.printer import Printer
from fleet.client.target import Target, hello
from fleet.errors import ConfigError, ProtocolError
from fleet.stillness import LifeClock
from fleet.text import shown
from fleet.transfer import read_part

DENIALS_UNTIL_FINAL = 3
LEAVE_AFTER_S = 1.8  # after a cancel that nobody answers
SAY_WAITING_AFTER_S = 2.0


class AttachedJob:
    """One job from submission to its end. `cancel` may be called from a signal handler; twice means at once."""

    def __init__(
        self,
        target: Target,
        spec: m.Spec,
        world_size: int,
        options: m.JobOptions,
        bundle: Path | None,
        printer: Printer,
    ) -> None:
        self.job_id = uuid.uuid4().hex[:12]
        self._target = target
        self._submit = m.Submit(self.job_id, world_size, spec, options=options)
        self._bundle = bundle
        self._printer = printer
        self._cancels: deque[int] = deque()
        self._cancelled_at: float | None = None
        self._wake = Wake()
        self._clock = LifeClock()
        self._in_order = OutputSequence()
        self._submitted = self._accepted = False
        self._denied_count = 0
        self._ended: m.JobEnded | None = None

    def cancel(self, signal: int = 0) -> None:
        """`signal` is what ranks are asked to stop by, as this process was; 0: SIGTERM."""
        self._cancels.append(signal)
        self._wake.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled_at is not None or bool(self._cancels)

    def run(self, versions: m.Versions) -> m.JobEnded:
        """Returns when the job has ended, and all it printed has been printed. Raises ConfigError if it cannot start.

        Raises FleetError where a cluster in this process fails, and where nothing can be printed.
        """
        self._hello = hello(versions)
        self._started_at = self._clock.now()
        self._said_waiting = self._target.local
        try:
            with Bus(self._target.lock) as bus:
                name = f"client/{uuid.uuid4().hex}"
                self._orchestrator = Dealer(bus, self._target.endpoint, name.encode())
                poller = Poller([*self._orchestrator.poll_sockets, self._wake])
                self._target.failure.listen(self._wake.set)
                try:
                    while self._ended is None:
                        poller.wait(self._clock.waits(self._orchestrator.patience(self._until_deadline())))
                        self._clock.now()
                        self._wake.clear()
                        self._turn()
                        if self._ended is None:
                            self._target.failure.check()
                    return self._ended
                finally:
                    self._orchestrator.put(m.encode(m.Goodbye()))  # whatever is left of the job need not wait for us
        finally:
            self._printer.finish(self._clock.now())
            self._wake.close()

    def _turn(self) -> None:
        while self._cancels and self._ended is None:
            self._cancel(self._cancels.popleft())
        for link in self._orchestrator.changes():
            self._link(link)
        for arrived in self._orchestrator.receive():
            try:
                self._take(m.decode(arrived.data))
            except ProtocolError as error:
                raise ConfigError(f"the orchestrator at {self._target.name}: {error}") from None
        now = self._clock.now()
        self._printer.tick(now)
        if self._cancelled_at is not None and now > self._cancelled_at + LEAVE_AFTER_S and self._ended is None:
            self._ended = m.JobEnded(
                self.job_id, "cancelled; the orchestrator did not answer, it stops the ranks by itself", -1
            )
        if not self._submitted:
            self._wait_for_welcome(now)

    def _until_deadline(self) -> float | None:
        deadlines = [self._printer.next_deadline()]
        if not self._submitted:
            deadlines.append(self._started_at + self._target.timeout_s)
            deadlines.append(None if self._said_waiting else self._started_at + SAY_WAITING_AFTER_S)
        if self._cancelled_at is not None:
            deadlines.append(self._cancelled_at + LEAVE_AFTER_S)
        given = [deadline for deadline in deadlines if deadline is not None]
        return max(0.0, min(given) - self._clock.now()) if given else None

    def _wait_for_welcome(self, now: float) -> None:
        waited = now - self._started_at
        if waited >= self._target.timeout_s:
            raise ConfigError(
                f"no orchestrator answered at {self._target.name} within {self._target.timeout_s:g} s: is it running, "
                "and is ORCHESTRATOR_ADDR right? (--timeout waits longer; without ORCHESTRATOR_ADDR the job runs on this machine)"
            )
        if not self._said_waiting and waited >= SAY_WAITING_AFTER_S:
            self._said_waiting = True
            self._say(f"no orchestrator answers at {self._target.name} yet; trying for {self._target.timeout_s:g} s")

    def _link(self, link: Link) -> None:
        if link is Link.UP:
            self._denied_count = 0
            self._orchestrator.put(m.encode(self._hello))
        elif link is Link.DENIED:
            self._denied_count += 1
            if self._denied_count >= DENIALS_UNTIL_FINAL:
                raise ConfigError(
                    f"the orchestrator at {self._target.name} does not let this client in: the secret is wrong or missing "
                    "on one side (FLEET_SECRET, FLEET_SECRET_FILE), or no orchestrator of fleet listens there"
                )
        elif not self.cancelled:
            self._say(f"lost the orchestrator at {self._target.name}; trying again until it is back (Ctrl-C: leave)")

    def _take(self, message: m.Message) -> None:
        if isinstance(message, m.Welcome):
            # Before it was accepted it may have been lost with its message; after that it must not start a second time.
            self._submitted = True
            self._orchestrator.put(m.encode(replace(self._submit, again=self._accepted)))
        elif isinstance(message, m.Unknown):
            self._orchestrator.put(m.encode(self._hello))
        elif isinstance(message, m.Refused):
            raise ConfigError(f"the orchestrator at {self._target.name} refused this client: {message.reason}")
        elif isinstance(message, m.Accepted):
            self._accepted = True
        elif isinstance(message, m.Rejected) and message.job_id == self.job_id:
            self._ended = m.JobEnded(self.job_id, f"not taken: {message.reason}", -1)
        elif isinstance(message, m.Want) and self._bundle is not None:
            self._orchestrator.put(m.encode(read_part(self._bundle, message)))
        elif isinstance(message, m.JobWaiting) and not self._target.local:
            self._say(f"job {message.job_id} waits: {message.reason}")
        elif isinstance(message, m.Started):
            self._started(message)
        elif isinstance(message, m.Output):
            self._output(message)
        elif isinstance(message, m.JobEnded) and message.job_id == self.job_id:
            self._ended = message

    def _output(self, output: m.Output) -> None:
        if self._in_order.is_next(output):
            self._printer.write(output.member_id, output.stream, output.data, self._clock.now())
        self._orchestrator.put(m.encode(self._in_order.ack(output)))
        if (repeat := self._in_order.gap(output)) is not None:
            self._orchestrator.put(m.encode(repeat))

    def _started(self, started: m.Started) -> None:
        if not self._target.local:
            workers = started.workers
            self._printer.name_of = lambda rank: f"{shown(workers[rank])}:{rank}"

    def _cancel(self, signal: int) -> None:
        again = self._cancelled_at is not None
        if not again:
            self._cancelled_at = self._clock.now()
            self._say("stopping all ranks (once more: at once)")
        self._orchestrator.put(m.encode(m.Cancel(self.job_id, again, signal)))
        if again or not self._submitted:
            self._ended = m.JobEnded(self.job_id, "cancelled", -1)

    def _say(self, text: str) -> None:
        self._printer.clear()
        say(text)


def say(text: str) -> None:
    """One line to the person at the terminal."""
    print(f"fleet: {shown(text)}", file=sys.stderr, flush=True)
