"""Connection of a client to its orchestrator, with the handshake and numbered questions.

A lost connection is made again, and so is each request without an answer: a restarted orchestrator is only a pause.
handshake.py decides.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence
from itertools import count

from msgspec.structs import replace

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Dealer, Link, Lost
from fleet.bus.poller import Poller, Wake
from fleet.bus.process import numbering
from fleet.client.handshake import Handshake, Key
from fleet.client.target import Target
from fleet.dropped import Dropped
from fleet.errors import ConfigError, OtherProtocol, ProtocolError
from fleet.stillness import LifeClock
from fleet.versions import versions


class Connection:
    """A client's end of the connection. Belongs to one thread at a time.

    A blocking owner calls `wait`, then `receive`. An owner with a loop of its own waits for `descriptors`, at most as long as
    `patience` says and only while not `has_event`, then calls `receive`.
    """

    def __init__(self, bus: Bus, target: Target, clock: LifeClock, advice: str = "") -> None:
        """The owner reads `clock`, or `wait` does. `advice` ends the error where no orchestrator answers in time."""
        self._target = target
        self._clock = clock
        self._dealer = Dealer(bus, target.endpoint, f"client/{uuid.uuid4().hex}".encode())
        self.descriptors, self.has_event = self._dealer.descriptors, self._dealer.has_event
        self.send = self._dealer.send  # of messages to task runners, see messages.relay_head
        # By the process's number, an orchestrator on the same machine sees its end.
        hello = m.ClientHello(versions(), numbering(), os.getpid())
        self._handshake = Handshake(target.name, hello, target.timeout_s, clock.now() + target.timeout_s, advice)
        self._dropped = Dropped(logging.getLogger("fleet.client"), clock.look)
        self._numbers = count(1)
        self._poller: Poller | None = None

    @property
    def ever_welcomed(self) -> bool:
        """Whether the orchestrator has let this client in, over this connection or an earlier one."""
        return self._handshake.deadline is None

    def put(self, message: m.Message) -> None:
        """Sends a message, in its order. It may be lost with the connection."""
        self._dealer.put(m.encode(message))

    # Requests: sent once this client is let in, and again after a lost connection, until they are answered

    def ask(
        self, question: m.Question, weight: int = 1, before: Sequence[m.Message] = (), standing: bool = False
    ) -> int:
        """Asks, and returns the number that the answer repeats.

        Messages in `before` are sent just before the question. A standing one is asked over each further connection, also
        after it was answered, until it is dropped.
        """
        number = next(self._numbers)
        numbered = replace(question, question=number)
        self._handshake.requests.add(number, (*before, numbered), weight, numbered if standing else None)
        self._put(self._handshake.due())
        return number

    def submit(self, submit: m.Submit) -> None:
        """Submits a job until it has ended or is dropped. Once it is accepted, it does not start a second time.

        Before that, the message may have been lost together with its orchestrator.
        """
        self._handshake.requests.add(submit.job_id, (submit,), again=replace(submit, again=True))
        self._put(self._handshake.due())

    def drop(self, key: Key) -> None:
        """Gives up the question of this number, or the job of this id. Sends nothing."""
        self._handshake.requests.drop(key)

    # Waiting and receiving

    def wait(self, timeout_s: float | None, wake: Wake | int | None = None) -> None:
        """Waits until something may have come, at most so long. Each call has the same `wake`, which may be any descriptor."""
        if self._poller is None:
            self._poller = Poller(self._dealer.poll_sockets if wake is None else (*self._dealer.poll_sockets, wake))
        self._poller.wait(self._clock.waits(self.patience(timeout_s)))
        self._clock.now()

    def patience(self, wait_s: float | None) -> float | None:
        """The longest wait for messages, where nothing else is due within `wait_s`."""
        if (deadline := self._handshake.deadline) is not None:
            left_s = max(0.0, deadline - self._clock.look())
            wait_s = left_s if wait_s is None else min(wait_s, left_s)
        return self._dealer.patience(wait_s)

    def receive(self) -> list[m.Message | Arrived | Lost]:
        """All that has come, at most a batch: messages, Arrived for those of task runners, Lost for a lost connection.

        Raises ConfigError where this client is not let in, or not in time; FleetError where a question cannot be answered.
        """
        found: list[m.Message | Arrived | Lost] = []
        for link in self._dealer.changes():
            if link is Link.UP:
                self._put(self._handshake.connected())
            elif link is Link.DENIED:
                self._handshake.denied()
            else:
                self._handshake.lost()
                found.append(Lost(b""))
        for arrived in self._dealer.receive():
            if arrived.rest:
                found.append(arrived)
            elif (message := self._decoded(arrived.data)) is not None:
                self._put(self._handshake.take(message))
                found.append(message)
        self._put(self._handshake.due())
        self._handshake.check(self._clock.look())
        return found

    def _put(self, messages: Sequence[m.Message]) -> None:
        for message in messages:
            self.put(message)

    def _decoded(self, data: bytes) -> m.Message | None:
        """None: the message is dropped. Raises ConfigError where no orchestrator of this version speaks."""
        try:
            return m.decode(data)
        except ProtocolError as error:
            if isinstance(error, OtherProtocol) or not self.ever_welcomed:
                raise ConfigError(f"the orchestrator at {self._target.name}: {error}") from None
            self._dropped.malformed(f"the orchestrator at {self._target.name}", error)
            return None
