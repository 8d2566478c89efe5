"""Starts of an agent's ranks: a few in a turn of its loop, so that its heartbeats are sent meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import pytest

from fleet.bus.poller import Poller
from fleet.worker import children
from fleet.worker.children import START_FOR_S, Children
from fleet.worker.rank_process import Plan
from fleet.worker.state import ProcessExited
from fleet.worker.zygote import Child

PLAN = Plan("command", "true", (), "/", {}, "/", anywhere=False)


class SlowZygote:
    """Fork server of a busy machine: each start takes a quarter of a turn's time, and then there is no room for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.read, self.write = os.pipe()

    def fileno(self) -> int:
        return self.read

    def monotonic(self) -> float:
        return self.now

    def spawn(self, plan: Plan, stdin: int | None) -> Child:
        self.now += START_FOR_S / 4
        raise OSError("no room")

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


@pytest.fixture
def zygote(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowZygote]:
    with closing(SlowZygote()) as zygote:
        monkeypatch.setattr(children, "monotonic", zygote.monotonic)
        yield zygote


def test_hundreds_of_ranks_are_started_over_several_turns(zygote: SlowZygote) -> None:
    poller = Poller()
    with closing(Children(zygote, poller, "ipc:///nowhere")) as started:  # type: ignore[arg-type]
        assert started.start(("job", 1, 0), PLAN, None) == []
        assert not started.has_more  # its imports are awaited, and no turn is made in vain
        assert len(list(started.take({zygote.fileno()}))) == 1
        at_once = [event for rank in range(1, 24) for event in started.start(("job", 1, rank), PLAN, None)]
        assert all(isinstance(event, ProcessExited) for event in at_once)
        turns = [len(at_once)]
        while started.has_more:
            turns.append(len(list(started.take(()))))
        assert (turns, sum(turns)) == ([3, 4, 4, 4, 4, 4], 23)
        for rank in range(6):
            started.start(("job", 2, rank), PLAN, None)
        started.remove(("job", 2))
        assert not started.has_more
