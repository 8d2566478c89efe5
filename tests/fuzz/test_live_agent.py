"""A live agent, to which an orchestrator and ranks send mutated messages: it runs a job afterwards."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Router
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller
from fleet.messages import PROTOCOL
from fleet.worker.agent import Agent, Surroundings
from fleet.worker.rank_sockets import RankSockets
from fleet.worker.state import Settings
from fleet.worker.storage import Storage
from fleet.worker.zygote import Zygote
from tests.fuzz.live import VERSIONS, WITHIN_S, Member
from tests.fuzz.mutate import Mutator
from tests.pure.test_messages import EXAMPLES

FUZZ_S = float(os.environ.get("FLEET_TEST_FUZZ_S", "2"))
SEED = int(os.environ.get("FLEET_TEST_FUZZ_SEED", "1"))
# An agent that is refused ends, by its right. Nothing is launched: what would run is the example's own command.
ENDS = (m.Refused, m.Launch)


@contextmanager
def agent(folder: Path, endpoint: str) -> Iterator[Agent]:
    """Running when entered. When left it has ended, and not by itself."""
    zygote = Zygote()
    settings = Settings("w0", 4, "a test", "127.0.0.1", VERSIONS, "1")
    surroundings = Surroundings(folder, 1, Storage(folder / "storage"), RankSockets("127.0.0.1", "open", ""))
    found = Agent(settings, surroundings, zygote, endpoint, Lock())
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            found.run()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found
        assert thread.is_alive(), f"the agent has ended: {ended}"
    finally:
        while thread.is_alive():
            found.stop()
            thread.join(0.2)
        zygote.close()


class Orchestrator:
    """The other end of the agent's connection, that says what a test makes up."""

    def __init__(self, bus: Bus, endpoint: str) -> None:
        self.router = Router(bus, endpoint)
        self._poller = Poller(self.router.poll_sockets)

    def receive(self, wait_s: float) -> list[m.Message]:
        self._poller.wait(wait_s)
        return [m.decode(thing.data) for thing in self.router.receive() if isinstance(thing, Arrived)]

    def say(self, *messages: m.Message | bytes) -> None:
        for message in messages:
            self.router.send(b"w0/1", message if isinstance(message, bytes) else m.encode(message))

    def wait_for(self, kind: type[m.Message], job_id: str = "") -> m.Message:
        deadline = monotonic() + WITHIN_S
        while monotonic() < deadline:
            for message in self.receive(deadline - monotonic()):
                if isinstance(message, kind) and getattr(message, "job_id", "") == job_id:
                    return message
        raise AssertionError(f"no {kind.__name__} came")


def test_an_agent_outlives_whatever_its_orchestrator_and_its_ranks_send() -> None:
    folder = Path(tempfile.mkdtemp(prefix="a"))  # short, for the paths of sockets
    mutator = Mutator(SEED, [example for example in EXAMPLES[:-1] if not isinstance(example, ENDS)])
    try:
        with Bus(Lock()) as bus:
            orchestrator = Orchestrator(bus, f"ipc://{folder}/o")
            with agent(folder, f"ipc://{folder}/o") as found:
                orchestrator.wait_for(m.WorkerHello)
                orchestrator.say(m.Welcome(VERSIONS, 1.0))
                rank = Member(bus, f"ipc://{folder}/agent", "j/1/0/7")
                until, count = monotonic() + FUZZ_S, 0
                while monotonic() < until:
                    for _ in range(20):
                        data = mutator.message()
                        if data[:1] == bytes([PROTOCOL]) and b"Refused" not in data and b"Launch" not in data:
                            orchestrator.say(data)
                        rank.dealer.send(mutator.message())
                        count += 1
                    orchestrator.receive(0.0)
                    rank.dealer.receive()
                    sleep(0.001)  # the agent shares this interpreter, and its queues are to stay short
                orchestrator.say(m.Welcome(VERSIONS, 1.0))
                spec = m.Spec("command", "true", directory="/")
                orchestrator.say(m.Assign("after", 1, 1, (0,), 0, 1, spec))
                orchestrator.wait_for(m.Assigned, "after")
                orchestrator.say(m.Launch("after", 1, "127.0.0.1", 1))
                exited = orchestrator.wait_for(m.RankExited, "after")
                assert isinstance(exited, m.RankExited)
                assert exited.status.code == 0, exited
                assert found._dropped.counts["failed"] == 0, f"seed {SEED}"
                assert count > 100
    finally:
        shutil.rmtree(folder, ignore_errors=True)
