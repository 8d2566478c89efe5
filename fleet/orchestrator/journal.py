"""Journal of an orchestrator: decisions are written down before they are said. Pure; knows no disk and no socket.

The decisions of a turn of the loop are split in two: records, which go to the disk in one commit, and effects, which wait for
that. If the disk refuses, the new jobs of the turn are refused in words. All other effects are carried out, and their records
stay here for the next commit: only an orchestrator that dies before that forgets something that it has said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fleet.orchestrator.state import Effect, Erase, Event, Save, Saved, SaveDrained

Records = dict[str, tuple[int, bytes] | None]  # by job: its number and its bytes; None: to be erased


@dataclass(eq=False)
class Journal:
    """Invariant: if there is anything `unsaved`, `ready` is called between `committed` and the next `decided`."""

    durable: bool = True  # False: nothing is written down, and nothing waits
    records: Records = field(default_factory=dict)  # that no commit has taken
    drained: tuple[str, ...] | None = None  # workers drained by a client's word; None: unchanged since the last commit
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
                self._waiting.append(effect)  # its log is removed too

    def committed(self, error: str = "") -> list[Event]:
        """A commit took all that was unsaved, or nothing for this reason. The core hears of new jobs, and of a change.

        Each new job has an event of its own: a step that fails at one costs no other its answer.
        """
        new, self._new = self._new, []
        if error:
            for job_id in new:
                self.records.pop(job_id, None)
        else:
            self.records, self.drained = {}, None
        changed, self._failing = self._failing != bool(error), bool(error)
        return [Saved(job_id, error) for job_id in new or ([""] if changed else [])]

    def ready(self) -> list[Effect]:
        """Effects that may be carried out now, in their order."""
        ready, self._waiting = self._waiting, []
        return ready

    @property
    def waits(self) -> bool:
        return bool(self._waiting)
