"""The ranks that an agent holds: how each is started, heard, stopped and ended. Half of its decisions, and pure as core.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM
from typing import Literal

from fleet import messages as m
from fleet.worker.state import (
    Attempt,
    Effect,
    Gather,
    Key,
    Log,
    Printed,
    ProcessExited,
    Rank,
    ReadOutput,
    Remove,
    Settings,
    SignalGroup,
    Spawned,
    ToOrchestrator,
    ToRank,
)

WORLD_CHANGED_GRACE_S = 0.5  # for a rank that was told whom it has lost to say so, before SIGTERM
STOP_GRACE_S = 1.2  # between SIGTERM and SIGKILL: Ctrl-C promises an end within 2 s
DRAIN_S = 0.5  # for output that a grandchild holds open after its rank has died
UNREAD_S = 2.0  # for a client to read what a rank printed that has ended since, when the job is to end
WINDOW_BYTES = 1 << 20  # of output of a rank that is not acknowledged: then it feels that nobody reads
UNDER_WAY, UNDER_WAY_OF_JOB = 64, 8192  # messages with output, of a rank and of all ranks of a job: queues hold 10 000
MESSAGE_BYTES = 64 << 10  # what is printed meanwhile goes together, up to this
RETRY_S = 0.5  # what a rank did not read
STDERR_TAIL_BYTES = 8 << 10


@dataclass
class Ranks:
    """Invariant: an attempt is held from its Assign to the orchestrator's Forget."""

    settings: Settings
    started_at: float
    attempts: dict[tuple[str, int], Attempt] = field(default_factory=dict)
    jobs_done: int = 0
    welcomed: bool = False  # by this orchestrator, on this connection
    _effects: list[Effect] = field(default_factory=list)
    _now: float = 0.0

    def _ask(self, attempt: Attempt, rank: Rank, ask: m.Ask) -> None:
        """A rank that can answers for itself; for one that is gone, or has not come yet, the agent does."""
        if rank.member_id == ask.member_id:
            return
        if rank.peer and rank.died is None:
            self._effects.append(ToRank(rank.peer, ask))
            return
        if rank.died is not None:
            doing = "has ended " + (
                f"by signal {rank.died.signal}" if rank.died.signal else f"with code {rank.died.code}"
            )
        else:
            doing = "has not called fleet.init() yet" if rank.pid else "is still starting"
        job_id, number = attempt.assign.job_id, attempt.assign.attempt
        host = self.settings.advertise
        self._send(
            m.Answer(job_id, number, ask.member_id, ask.question, rank.member_id, host, rank.pid, -1, False, doing)
        )

    def _given_up_at(self, rank: Rank) -> float | None:
        """When a rank that has died counts as ended, whatever it printed."""
        if rank.drained_at is None or not rank.unsent:
            return rank.drained_at
        return rank.drained_at + UNREAD_S if rank.hurried else None

    def _stop(self, attempt: Attempt, rank: Rank, kill: bool, signal: int = 0) -> None:
        rank.hurried = True
        if rank.died is not None:
            return
        if signal in (SIGHUP, SIGINT):
            rank.stop_signal = signal
        first, rank.stopped = not rank.stopped, True
        if not rank.pid:
            # Spawned will see `stopped`; what is never spawned has ended here.
            if first and not attempt.launched:
                s = self.settings
                rank.status = m.RankStatus(rank.member_id, s.worker_id, s.advertise, 0, 0, stopped=True)
                self._tell_exit(attempt, rank)
            return
        key = self._key(attempt, rank)
        if kill:
            rank.kill_at = rank.term_at = None
            self._effects.append(SignalGroup(key, rank.pid, SIGKILL))
        elif first and rank.warned:
            rank.term_at = self._now + WORLD_CHANGED_GRACE_S
        elif first:
            self._terminate(attempt, rank)

    def _terminate(self, attempt: Attempt, rank: Rank) -> None:
        rank.term_at = None
        rank.kill_at = self._now + STOP_GRACE_S
        self._effects.append(SignalGroup(self._key(attempt, rank), rank.pid, rank.stop_signal))

    def _forget(self, attempt: Attempt) -> None:
        for rank in attempt.ranks.values():
            if rank.running or rank.kill_at is not None:
                self._effects.append(SignalGroup(self._key(attempt, rank), rank.pid, SIGKILL))
        self._gather(attempt)
        del self.attempts[attempt.assign.job_id, attempt.assign.attempt]
        self._effects.append(Remove(attempt.assign.job_id, attempt.assign.attempt))

    def _spawned(self, event: Spawned) -> None:
        found = self._find(event.key)
        if found is None:
            self._effects.append(SignalGroup(event.key, event.pid, SIGKILL))
            return
        _, rank = found
        rank.pid = event.pid
        rank.open_streams = {"stdout", "stderr"}
        if rank.stopped:
            self._effects.append(SignalGroup(event.key, event.pid, SIGKILL))

    def _printed(self, event: Printed) -> None:
        found = self._find(event.key)
        if found is None:
            return
        attempt, rank = found
        if not event.data:
            rank.open_streams.discard(event.stream)
            self._end_if_drained(attempt, rank)
            return
        if event.stream == "stderr":
            rank.stderr_tail = (rank.stderr_tail + event.data)[-STDERR_TAIL_BYTES:]
        if rank.unsent and rank.unsent[-1][0] == event.stream and len(rank.unsent[-1][1]) < MESSAGE_BYTES:
            rank.unsent[-1][1].extend(event.data)
        else:
            rank.unsent.append((event.stream, bytearray(event.data)))
        rank.unread_bytes += len(event.data)
        self._tell_output(attempt, rank)
        if rank.drained_at is not None:
            rank.drained_at = self._now + DRAIN_S
        if rank.unread_bytes >= WINDOW_BYTES and not rank.paused:
            rank.paused = True
            self._effects.append(ReadOutput(event.key, False))

    def _tell_output(self, attempt: Attempt, rank: Rank, again: bool = False) -> None:
        """Sends what may be under way. `again`: all of it, since it may be lost."""
        if not self.welcomed:
            return
        if again:
            for output in rank.sent:
                self._send(output)
        at_most = max(1, min(UNDER_WAY, UNDER_WAY_OF_JOB // attempt.assign.world_size))
        while rank.unsent and len(rank.sent) < at_most:
            stream, data = rank.unsent.popleft()
            rank.sent_count += 1
            job_id, number = attempt.assign.job_id, attempt.assign.attempt
            where: Literal["stdout", "stderr"] = "stderr" if stream == "stderr" else "stdout"
            output = m.Output(job_id, number, rank.member_id, where, bytes(data), rank.sent_count)
            rank.sent.append(output)
            self._send(output)

    def _acknowledged(self, attempt: Attempt, rank: Rank, number: int) -> None:
        """The client has it, up to this number."""
        while rank.sent and rank.sent[0].number <= number:
            rank.unread_bytes -= len(rank.sent.popleft().data)
        self._tell_output(attempt, rank)
        if rank.died is not None and not rank.unsent:
            self._end_if_drained(attempt, rank)
        if rank.paused and rank.unread_bytes <= WINDOW_BYTES // 2:
            rank.paused = False
            if rank.drained_at is not None:
                rank.drained_at = self._now + DRAIN_S
            self._effects.append(ReadOutput(self._key(attempt, rank), True))

    def _died(self, event: ProcessExited) -> None:
        found = self._find(event.key)
        if found is None:
            return
        attempt, rank = found
        rank.died, rank.kill_at, rank.term_at = event, None, None
        rank.drained_at = self._now + DRAIN_S
        if rank.pid:
            # Whatever it started goes with it. Politely first: multiprocessing's resource tracker does not heed SIGTERM, and
            # removes the shared memory that the script has left once the script's processes have gone.
            self._effects.append(SignalGroup(event.key, rank.pid, SIGTERM))
            rank.kill_at = self._now + DRAIN_S
        self._end_if_drained(attempt, rank)

    def _end_if_drained(self, attempt: Attempt, rank: Rank, give_up: bool = False) -> None:
        """A rank has ended when it is dead and all it printed has been read."""
        if rank.died is None or rank.status is not None or ((rank.open_streams or rank.unsent) and not give_up):
            return
        if rank.kill_at is not None:
            rank.kill_at = None
            self._effects.append(SignalGroup(self._key(attempt, rank), rank.pid, SIGKILL))
        rank.unsent.clear()
        rank.drained_at = None
        rank.status = m.RankStatus(
            member_id=rank.member_id,
            worker_id=self.settings.worker_id,
            host=self.settings.advertise,
            pid=rank.pid,
            code=rank.died.code,
            signal=rank.died.signal,
            out_of_memory=rank.died.out_of_memory and not rank.stopped,
            stopped=rank.stopped,
            stderr_tail=rank.stderr_tail.decode(errors="replace"),
            reason=rank.died.reason,
            task=rank.died.task,
        )
        if not attempt.active:
            self.jobs_done += 1
            self._gather(attempt)  # first: a client that hears of the end may ask at once
        self._tell_exit(attempt, rank)

    def _gather(self, attempt: Attempt) -> None:
        """Once for each attempt that has a working folder of its own."""
        if attempt.launched and not attempt.gathered and attempt.assign.spec.digest and attempt.directory is not None:
            attempt.gathered = True
            self._effects.append(Gather(attempt.assign, attempt.directory))

    def _tell_exit(self, attempt: Attempt, rank: Rank) -> None:
        assert rank.status is not None
        self._send(m.RankExited(attempt.assign.job_id, attempt.assign.attempt, rank.status, rank.made))

    # Looking up, and effects

    @property
    def decided(self) -> list[Effect]:
        """What the last step has decided; also of one that failed on its way."""
        return self._effects

    def _ranks(self) -> list[Rank]:
        return [rank for attempt in self.attempts.values() for rank in attempt.ranks.values()]

    def _find(self, key: Key) -> tuple[Attempt, Rank] | None:
        attempt = self.attempts.get(key[:2])
        return (attempt, attempt.ranks[key[2]]) if attempt is not None and key[2] in attempt.ranks else None

    def _key(self, attempt: Attempt, rank: Rank) -> Key:
        return attempt.assign.job_id, attempt.assign.attempt, rank.member_id

    def _send(self, message: m.Message) -> None:
        """Nothing before its welcome, after which all that matters is said again: what is said before may overtake that."""
        if self.welcomed:
            self._effects.append(ToOrchestrator(message))

    def _log(self, level: str, text: str) -> None:
        self._effects.append(Log(level, text))
