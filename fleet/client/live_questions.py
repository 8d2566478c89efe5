"""Questions of a client that asks again and again, and shows what it has heard while a connection is lost. Knows no screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Lost
from fleet.client.connection import Connection
from fleet.client.target import Target
from fleet.stillness import LifeClock

K = TypeVar("K", bound=str)  # kinds of questions


class LiveQuestions(Generic[K]):
    """Questions over one connection. Of each kind the last one counts: answers to earlier ones are dropped.

    Methods raise ConfigError where no orchestrator answers for the first time, or it refuses this client.
    """

    def __init__(self, bus: Bus, target: Target) -> None:
        self._clock = LifeClock()
        advice = ": is it running, and is the address right?"
        self._connection = Connection(bus, target, self._clock, advice)
        self._numbers: dict[K, int] = {}  # of the last question of each kind
        self._jobs: dict[str, K] = {}  # whose ends were asked for
        self._heard_at = self._clock.look()
        self.lost_since: float | None = None  # by `now`: the connection, which was last heard then

    @property
    def now(self) -> float:
        return self._clock.look()

    def ask(self, kind: K, question: m.Question, before: Sequence[m.Message] = ()) -> None:
        """Asks in place of the last question of that kind. Messages in `before` are sent just before it."""
        if (old := self._numbers.pop(kind, None)) is not None:
            self._connection.drop(old)
        is_watch = isinstance(question, m.WatchJob)
        if isinstance(question, m.WatchJob):
            self._jobs = {question.job_id: kind}
        self._numbers[kind] = self._connection.ask(question, before=before, standing=is_watch)

    def wait(self, timeout_s: float, descriptor: int | None = None) -> None:
        """Waits for answers, at most so long, or until the descriptor can be read: in each call the same one."""
        self._connection.wait(timeout_s, descriptor)

    def receive(self) -> Iterator[tuple[K, m.Message]]:
        """Answers that have come, each with the kind of its question."""
        for event in self._connection.receive():
            if isinstance(event, Lost):
                self.lost_since = self._heard_at if self.lost_since is None else self.lost_since
                continue
            self._heard_at = self.now
            if isinstance(event, m.Welcome):
                self.lost_since = None
            elif isinstance(event, m.JobEnded) and event.job_id in self._jobs:
                yield self._jobs[event.job_id], event
            elif not isinstance(event, Arrived):
                number = getattr(event, "question", 0)
                yield from [(kind, event) for kind, asked in self._numbers.items() if asked == number]
