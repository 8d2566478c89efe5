"""Asks an orchestrator one thing and waits for the answer: what `fleet workers`, `fleet doctor` and `fleet why` share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Dealer, Link
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller
from fleet.client.attached_job import DENIALS_UNTIL_FINAL
from fleet.client.target import Target, hello
from fleet.errors import ConfigError, FleetError, ProtocolError
from fleet.stillness import Deadline


def answers(
    target: Target, question: m.Message | None, versions: m.Versions, deadline: Deadline
) -> Iterator[m.Message]:
    """What comes after the question, and before it the Welcome; ends at the deadline.

    Raises ConfigError where no orchestrator answers, or it refuses this client; FleetError where it fails at the question.
    """
    denied_count, welcomed = 0, False
    with Bus(target.lock) as bus:
        dealer = Dealer(bus, target.endpoint, f"client/{uuid.uuid4().hex}".encode())
        poller = Poller(dealer.poll_sockets)
        while deadline.left_s:
            poller.wait(deadline.clock.waits(deadline.left_s))
            for link in dealer.changes():
                if link is Link.UP:
                    dealer.put(m.encode(hello(versions)))
                elif link is Link.DENIED:
                    denied_count += 1
                    if denied_count >= DENIALS_UNTIL_FINAL:
                        raise ConfigError(
                            f"the orchestrator at {target.name} does not let this client in: the secret is wrong or missing "
                            "on one side (FLEET_SECRET, FLEET_SECRET_FILE), or no orchestrator of fleet listens there"
                        )
            for arrived in dealer.receive():
                try:
                    message = m.decode(arrived.data)
                except ProtocolError as error:
                    raise ConfigError(f"the orchestrator at {target.name}: {error}") from None
                if isinstance(message, m.Refused):
                    raise ConfigError(f"the orchestrator at {target.name} refused this client: {message.reason}")
                if isinstance(message, m.Unanswered):
                    raise FleetError(f"the orchestrator could not answer: {message.reason}")
                if isinstance(message, m.Unknown):
                    dealer.put(m.encode(hello(versions)))
                if isinstance(message, m.Welcome):
                    welcomed = True
                    if question is not None:
                        dealer.put(m.encode(question))
                yield message
    if not welcomed:
        raise ConfigError(f"no orchestrator answered at {target.name} within {target.timeout_s:g} s")


def workers(target: Target, versions: m.Versions) -> tuple[m.WorkerState, ...]:
    """Who is in the cluster, in the order in which they joined."""
    for message in answers(target, m.ListWorkers(1), versions, Deadline(target.timeout_s)):
        if isinstance(message, m.Workers) and message.question == 1:
            return message.workers
    raise ConfigError(
        f"the orchestrator at {target.name} did not say who its workers are within {target.timeout_s:g} s"
    )


def welcome(target: Target, versions: m.Versions) -> m.Versions:
    """The orchestrator's versions: it is there and turns."""
    for message in answers(target, None, versions, Deadline(target.timeout_s)):
        if isinstance(message, m.Welcome):
            return message.versions
    raise AssertionError("answers() yields a Welcome or raises")


def ping(endpoint: str, timeout_s: float) -> m.Pong | None:
    """What an agent on this machine says of itself; None: nothing, in that time."""
    deadline = Deadline(timeout_s)
    with Bus(Lock()) as bus:
        dealer = Dealer(bus, endpoint, f"ping/{uuid.uuid4().hex}".encode())
        poller = Poller(dealer.poll_sockets)
        dealer.put(m.encode(m.Ping()))
        while deadline.left_s:
            poller.wait(deadline.clock.waits(deadline.left_s))
            dealer.changes()
            for arrived in dealer.receive():
                message = m.decode(arrived.data)
                if isinstance(message, m.Pong):
                    return message
    return None
