"""Handshake of a client with its orchestrator, and its requests, which outlive a connection; pure.

Knows no request's meaning, and not its asker. Returns the messages to send, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fleet import messages as m
from fleet.errors import ConfigError, FleetError

DENIALS_UNTIL_FINAL = 3
AT_ONCE = 256  # requests under way, each counted by its weight

Key = int | str  # the number of a question, or the id of a job that is submitted


_ANSWERS = m.Jobs | m.LogPart | m.Drained | m.Workers | m.Because | m.Files | m.FilePart


@dataclass(frozen=True)
class _Request:
    messages: tuple[m.Message, ...]
    weight: int
    again: m.Message | None  # sent over each further connection once the answer has come; None: nothing is


class Requests:
    """Requests to an orchestrator, in the order in which they were made; pure.

    A bounded weight of them is under way, so that no queue between the two overflows.
    """

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = at_once
        # Invariant: each request is in exactly one of these.
        self._waiting: dict[Key, _Request] = {}  # not sent over the present connection
        self._under_way: dict[Key, _Request] = {}  # sent over it, without an answer
        self._standing: dict[Key, _Request] = {}  # answered over it, and made again over the next one

    def __contains__(self, key: Key) -> bool:
        """Whether the request still lacks its answer."""
        return key in self._waiting or key in self._under_way

    def add(self, key: Key, messages: tuple[m.Message, ...], weight: int = 1, again: m.Message | None = None) -> None:
        """Adds a request. `again` is sent over each further connection once the answer has come, until the request is dropped."""
        self._waiting[key] = _Request(messages, weight, again)

    def due(self) -> list[m.Message]:
        """Messages of the requests that have room now. They count as sent."""
        found: list[m.Message] = []
        if not self._waiting:
            return found
        room = self._at_once - sum(request.weight for request in self._under_way.values())
        while self._waiting:
            key, request = next(iter(self._waiting.items()))
            if request.weight > room and self._under_way:
                break
            room -= request.weight
            self._under_way[key] = self._waiting.pop(key)
            found += request.messages
        return found

    def answered(self, key: Key) -> None:
        """Notes that the answer has come, over this connection or, late, over an earlier one."""
        for requests in (self._under_way, self._waiting):
            if (request := requests.pop(key, None)) is not None and request.again is not None:
                # A standing request is made over each connection, also where its answer came late over an earlier one.
                kept = self._standing if requests is self._under_way else self._waiting
                kept[key] = _Request((request.again,), request.weight, request.again)
                return

    def drop(self, key: Key) -> None:
        for requests in (self._waiting, self._under_way, self._standing):
            requests.pop(key, None)

    def restart(self) -> None:
        """Takes back all that was sent: it is lost with its connection."""
        self._waiting = self._standing | self._under_way | self._waiting
        self._standing, self._under_way = {}, {}


@dataclass
class Handshake:
    """Handshake of one client with its orchestrator, over all its connections; pure."""

    name: str  # of the orchestrator, as a person wrote it
    hello: m.ClientHello
    timeout_s: float
    deadline: float | None  # to be let in for the first time; None: this client was
    advice: str = ""  # said behind the error of that deadline
    requests: Requests = field(default_factory=Requests)
    _welcomed: bool = False  # over the present connection
    _denied_count: int = 0  # since a connection was made

    def connected(self) -> list[m.Message]:
        self._denied_count = 0
        return [self.hello]

    def lost(self) -> None:
        self._welcomed = False
        self.requests.restart()

    def denied(self) -> None:
        """Counts a failed handshake of the sockets. Raises ConfigError for one too many."""
        self._denied_count += 1
        if self._denied_count >= DENIALS_UNTIL_FINAL:
            raise ConfigError(
                f"the orchestrator at {self.name} does not let this client in: the secret is wrong or missing "
                "on one side (FLEET_SECRET, FLEET_SECRET_FILE), or no orchestrator of fleet listens there"
            )

    def take(self, message: m.Message) -> list[m.Message]:
        """Messages to send because of one that came. Raises ConfigError for a refusal, FleetError for a failed question."""
        if isinstance(message, m.Welcome):
            self._welcomed, self.deadline = True, None
        elif isinstance(message, m.Unknown):
            self.lost()
            return [self.hello]
        elif isinstance(message, m.Refused):
            raise ConfigError(f"the orchestrator at {self.name} refused this client: {message.reason}")
        elif isinstance(message, m.Unanswered) and message.question in self.requests:
            self.requests.drop(message.question)
            raise FleetError(f"the orchestrator could not answer: {message.reason}")
        elif isinstance(message, _ANSWERS):
            self.requests.answered(message.question)
        elif isinstance(message, m.Accepted):
            self.requests.answered(message.job_id)
        elif isinstance(message, m.Rejected | m.JobEnded):
            self.requests.drop(message.job_id)
        return []

    def due(self) -> list[m.Message]:
        """Messages of requests that may be sent now, behind all others."""
        return self.requests.due() if self._welcomed else []

    def check(self, now: float) -> None:
        """Raises ConfigError once the deadline is over. All that arrived before has been taken."""
        if self.deadline is not None and now >= self.deadline:
            raise ConfigError(f"no orchestrator answered at {self.name} within {self.timeout_s:g} s{self.advice}")
