"""Single questions to an orchestrator or an agent, each over a connection of its own."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Dealer, Lost
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller
from fleet.client.connection import Connection
from fleet.client.target import Target
from fleet.errors import ConfigError
from fleet.stillness import Deadline

CHECK_EVERY_S = 0.25


def answers(
    target: Target,
    question: m.ListWorkers | m.Why | None,
    deadline: Deadline,
    check: Callable[[], None] | None = None,
) -> Iterator[m.Message]:
    """The Welcome and the messages after it, until the deadline, which may be moved meanwhile. The question's number is 1.

    `check` is called a few times a second: what it raises ends the wait.

    Raises ConfigError where no orchestrator answers, or it refuses this client; FleetError where it fails at the question.
    """
    with Bus(target.lock) as bus:
        connection = Connection(bus, target, deadline.clock)
        if question is not None:
            connection.ask(question, standing=True)
        while deadline.left_s or not connection.ever_welcomed:
            if check is not None:
                check()
            connection.wait(deadline.left_s if check is None else min(deadline.left_s, CHECK_EVERY_S))
            for event in connection.receive():
                if not isinstance(event, Lost | Arrived):
                    yield event


def workers(target: Target) -> tuple[m.WorkerState, ...]:
    """The workers of the cluster, in the order in which they joined."""
    for message in answers(target, m.ListWorkers(), Deadline(target.timeout_s)):
        if isinstance(message, m.Workers) and message.question == 1:
            return message.workers
    raise ConfigError(
        f"the orchestrator at {target.name} did not say who its workers are within {target.timeout_s:g} s"
    )


def welcome(target: Target) -> m.Welcome:
    """The orchestrator's welcome: it is there, and its loop turns."""
    for message in answers(target, None, Deadline(target.timeout_s)):
        if isinstance(message, m.Welcome):
            return message
    raise AssertionError("answers() yields a Welcome or raises")


def ping(endpoint: str, timeout_s: float) -> m.Pong | None:
    """The state of an agent on this machine, in its own words; None: nothing came in that time."""
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
