"""Preparation of attempts: bundle and working folder, until both exist or cannot be made. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from fleet import messages as m
from fleet.bounds import REASON_CHARS
from fleet.deadlines import Deadlines
from fleet.worker.effects import Effects
from fleet.worker.members import Members
from fleet.worker.state import Attempt, AttemptKey, Prepared, ToFiles

STUCK_AFTER_S = 600.0  # since the last part of its bundle


@dataclass
class Preparation:
    """Invariant: an attempt is in `deadlines` from its Assign until it is prepared, cannot be prepared, or is forgotten."""

    effects: Effects
    members: Members
    # When an attempt counts as stuck. No part of a bundle comes without an orchestrator: then the deadlines are put off.
    deadlines: Deadlines[AttemptKey] = field(default_factory=Deadlines)

    def assign(self, assign: m.Assign) -> None:
        """Begins the preparation of an attempt, or tells its result again."""
        key = assign.job_id, assign.attempt
        known = self.members.attempts.get(key)
        if known is None:
            self.members.hold(assign)
            self.deadlines.set(key, self.effects.now + STUCK_AFTER_S)
            self.effects.add(ToFiles(assign))
        elif known.failure is not None:
            self.effects.send(known.failure)
        elif known.prepared is not None:
            self.effects.send(m.Assigned(*key, known.prepared.port))

    def part(self, part: m.Part) -> None:
        self.effects.add(ToFiles(part))
        self.put_off(part.digest)

    def prepared(self, event: Prepared) -> None:
        if attempt := self.members.attempts.get(event.key):
            attempt.prepared = event
            self.deadlines.discard(event.key)
            self.effects.send(m.Assigned(*event.key, event.port))

    def failed(self, failure: m.AssignFailed) -> None:
        failure = replace(failure, reason=failure.reason[:REASON_CHARS])
        if attempt := self.members.attempts.get((failure.job_id, failure.attempt)):
            attempt.failure = failure
            self.deadlines.discard(attempt.key)
        self.effects.send(failure)

    def forget(self, attempt: Attempt) -> None:
        self.deadlines.discard(attempt.key)

    def expire(self) -> None:
        reason = f"nothing came of preparing it for {STUCK_AFTER_S:g} s: its disk, or a network behind that, may hang"
        for key in self.deadlines.due(self.effects.now):
            if self.effects.welcomed:
                self.failed(m.AssignFailed(*key, reason))
            else:
                self.deadlines.set(key, self.effects.now + STUCK_AFTER_S)

    def put_off(self, digest: str | None = None) -> None:
        """For attempts that wait for this bundle; without `digest` for all."""
        for key in list(self.deadlines):
            if digest is None or self.members.attempts[key].assign.spec.digest == digest:
                self.deadlines.set(key, self.effects.now + STUCK_AFTER_S)
