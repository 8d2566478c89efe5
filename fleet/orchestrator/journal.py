"""Journal of one orchestrator: what was decided is written down before it is said. Pure; knows no disk and no socket.

What a turn of the loop has decided is split in two: records, which go to the disk in one commit, and effects, which wait for
it. Where the disk refuses, the new jobs of the turn are dropped and refused in words; everything else is done all the same, and
stays here until a commit takes it. Only an orchestrator that dies while its disk refuses has done what nobody knows any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fleet.orchestrator.state import Effect, Erase, Event, Save, Saved, SaveDrained, SaveFailed, SavesAgain

Records = dict[str, tuple[int, bytes] | None]  # by job: its number and its bytes; None: to be erased


@dataclass(eq=False)
class Journal:
    """Invariant: `ready` is called between `written` or `refused` and the next `decided`, if there is anything `unsaved`."""

    durable: bool = True  # False: nothing is written down, and nothing waits
    records: Records = field(default_factory=dict)  # that no commit has taken
    drained: tuple[str, ...] | None = None  # the workers that somebody drained; None: no commit is due for them
    _new: list[str] = field(default_factory=list)  # jobs that wait to be written down for the first time
    _failing: bool = False  # the disk refused the last commit
    _waiting: list[Effect] = field(default_factory=list)

    @property
    def unsaved(self) -> bool:
        return bool(self.records) or self.drained is not None

    def decided(self, effects: Iterable[Effect]) -> None:
        """Effects of a step, in their order."""
        for effect in effects:
            if not self.durable or not isinstance(effect, Save | Erase | SaveDrained):
                self._waiting.append(effect)
            elif isinstance(effect, Save):
                self.records[effect.job_id] = effect.number, effect.record
                if effect.is_new:
                    self._new.append(effect.job_id)
            elif isinstance(effect, SaveDrained):
                self.drained = effect.worker_ids
            else:
                self.records[effect.job_id] = None
                self._waiting.append(effect)  # what it printed goes too

    def written(self) -> list[Event]:
        """A commit took all that was unsaved. What the core is told."""
        self.records, self.drained = {}, None
        new, self._new = self._new, []
        recovered: list[Event] = [SavesAgain()] if self._failing else []
        self._failing = False
        return [*recovered, *map(Saved, new)]

    def refused(self, reason: str) -> list[Event]:
        """A commit took nothing. What the core is told: once, and of every new job."""
        new, self._new = self._new, []
        for job_id in new:
            self.records.pop(job_id, None)
        first, self._failing = not self._failing, True
        return [SaveFailed(tuple(new), reason)] if new or first else []

    def ready(self) -> list[Effect]:
        """What may be done now, in its order."""
        ready, self._waiting = self._waiting, []
        return ready

    @property
    def waits(self) -> bool:
        return bool(self._waiting)
