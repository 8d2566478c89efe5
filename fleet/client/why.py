"""Asks what the ranks of a running job do, and have done: `fleet why`. A shell of few lines around one question."""

from __future__ import annotations

import uuid
from time import monotonic

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Dealer, Link
from fleet.bus.poller import Poller
from fleet.client.run import Target
from fleet.errors import ConfigError, UsageError

ANSWER_WITHIN_S = 2.0


def ask(target: Target, job_id: str, versions: m.Versions) -> tuple[list[m.Answer], int]:
    """The answers, by rank, and how many ranks did not answer. An empty id means the only job that runs.

    Raises ConfigError where no orchestrator answers, UsageError where there is no such job.
    """
    answers: dict[int, m.Answer] = {}
    expected: int | None = None
    deadline = monotonic() + target.timeout_s
    with Bus(target.lock) as bus:
        dealer = Dealer(bus, target.endpoint, f"client/{uuid.uuid4().hex}".encode())
        poller = Poller(dealer.poll_sockets)
        while (expected is None or len(answers) < expected) and monotonic() < deadline:
            poller.wait(max(0.0, deadline - monotonic()))
            if Link.UP in dealer.changes():
                dealer.send(m.encode(m.ClientHello(versions)))
            for message in map(m.decode, dealer.receive()):
                if isinstance(message, m.Welcome):
                    dealer.send(m.encode(m.Why(job_id)))
                elif isinstance(message, m.Refused):
                    raise ConfigError(f"the orchestrator at {target.name} refused this client: {message.reason}")
                elif isinstance(message, m.Because):
                    if message.error:
                        raise UsageError(message.error)
                    expected, deadline = message.rank_count, monotonic() + ANSWER_WITHIN_S
                elif isinstance(message, m.Answer):
                    answers[message.rank] = message
    if expected is None:
        raise ConfigError(f"no orchestrator answered at {target.name} within {target.timeout_s:g} s")
    return [answers[rank] for rank in sorted(answers)], expected - len(answers)


def described(answers: list[m.Answer], silent_count: int, count: int) -> str:
    """What the ranks answered, in words, with the last `count` collectives of each."""
    lines = []
    for answer in answers:
        lines.append(f"rank {answer.rank} ({answer.host}, pid {answer.pid}) {answer.doing}")
        groups = answer.records.split("\n") if answer.records else []
        lines += [f"    {line}" for line in groups[-count:]]
    if silent_count:
        lines.append(f"{silent_count} ranks did not answer within {ANSWER_WITHIN_S:g} s: stopped, frozen or cut off")
    return "\n".join(lines)
