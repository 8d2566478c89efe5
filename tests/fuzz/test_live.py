"""A live orchestrator among members that have the secret and send mutated messages: it places a job afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.orchestrator.service import Service
from tests.fuzz.live import Member, orchestrator
from tests.fuzz.mutate import Mutator
from tests.pure.test_messages import EXAMPLES

FUZZ_S = float(os.environ.get("FLEET_TEST_FUZZ_S", "2"))
SEED = int(os.environ.get("FLEET_TEST_FUZZ_SEED", "1"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Service, Bus]]:
    with orchestrator(tmp_path / "o") as found:
        yield found


def test_an_orchestrator_outlives_whatever_members_send(place: tuple[Service, Bus]) -> None:
    service, bus = place
    mutator = Mutator(SEED, EXAMPLES[:-1])
    workers = [Member(bus, service.endpoint, f"worker-{number}/1f") for number in range(2)]
    clients = [Member(bus, service.endpoint) for _ in range(2)]
    until, count = monotonic() + FUZZ_S, 0
    while monotonic() < until:
        for worker in workers:
            worker.work(slots=4)
        for client in clients:
            client.enter()
        for _ in range(50):
            member = mutator.source.choice([*workers, *clients])
            member.dealer.send(mutator.message())
            count += 1
            member.receive()
    assert service._dropped.counts["failed"] == 0, f"seed {SEED}"
    # A job from its beginning to its end, on a worker and for a client that nobody has heard of.
    fresh, asking = Member(bus, service.endpoint, "fresh/1"), Member(bus, service.endpoint)
    fresh.work(slots=1000)
    asking.enter()
    asking.send(m.Submit("after", 1000, m.Spec("script", "t.py", directory="/")))
    while fresh.wait_for(m.Assign).job_id != "after":
        pass
    assert count > 100


def test_any_message_twice_changes_nothing_for_others(place: tuple[Service, Bus]) -> None:
    """Every example as it is, from a client and from a worker: none is answered by silence or by an end."""
    service, bus = place
    worker, client = Member(bus, service.endpoint, "w0/1"), Member(bus, service.endpoint)
    worker.work()
    client.enter()
    for message in EXAMPLES[:-1]:
        for member in (worker, client):
            member.dealer.send(m.encode(message))
            member.dealer.send(m.encode(message))
    asking = Member(bus, service.endpoint)
    asking.enter()
    asking.send(m.ListWorkers(question=7))
    assert asking.wait_for(m.Workers).question == 7
    assert service._dropped.counts["failed"] == 0
