"""Members of jobs on this worker: their processes, from launch to the end of their output. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count, islice
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM
from typing import Literal, get_args

from fleet import messages as m
from fleet.deadlines import Deadlines
from fleet.worker import state as w
from fleet.worker.effects import Effects
from fleet.worker.output_window import UNDER_WAY, UNDER_WAY_OF_JOB, OutputWindow
from fleet.worker.state import Attempt, AttemptKey, Key, Process, Settings

WORLD_CHANGED_GRACE_S = 0.5  # for a rank to raise WorldChanged, before SIGTERM
STOP_GRACE_S = 1.2  # between SIGTERM and SIGKILL: Ctrl-C promises an end within 2 s
DRAIN_S = 0.5  # for the children of a process to end and to close its output, once the process has ended
UNREAD_S = 2.0  # for a client to read the output of a process that has ended, if the job is to end

What = Literal["term", "kill", "end"]


@dataclass
class Members:
    """Invariant: an attempt is held from its Assign to the orchestrator's Forget."""

    settings: Settings
    effects: Effects
    attempts: dict[AttemptKey, Attempt] = field(default_factory=dict)
    jobs_done: int = 0
    unread_s: float = UNREAD_S
    # term: a process is asked to end. kill: its group is killed. end: a process that has exited counts as ended, though its
    # output is held open or not read.
    deadlines: Deadlines[tuple[Key, What]] = field(default_factory=Deadlines)

    # Attempts

    def hold(self, assign: m.Assign) -> None:
        """Gives each member of a new attempt a slot, and GPUs of its own."""
        # A process that has ended leaves its slot, though the orchestrator may not have heard of its end yet.
        running = [process for process in self.processes() if process.status is None]
        taken = {process.slot for process in running}
        slots = (slot for slot in count() if slot not in taken)
        used = {gpu for process in running for gpu in process.gpus}
        gpus = iter([gpu for gpu in range(self.settings.gpus) if gpu not in used])
        under_way = max(1, min(UNDER_WAY, UNDER_WAY_OF_JOB // assign.world_size))
        attempt = Attempt(assign, {})
        self.attempts[attempt.key] = attempt
        for member_id, slot in zip(assign.member_ids, slots, strict=False):
            key = *attempt.key, member_id
            own_gpus = tuple(islice(gpus, assign.gpus))
            attempt.processes[member_id] = Process(key, slot, own_gpus, OutputWindow(key, under_way))

    def launch(self, attempt: Attempt, launch: m.Launch) -> None:
        if attempt.launched or attempt.prepared is None:
            return
        attempt.launched = True
        directory = attempt.prepared.directory
        for local_rank, process in enumerate(attempt.processes.values()):
            if not process.stopped:  # Stop may have come before Launch
                self.effects.add(w.Spawn(process.key, attempt.assign, launch, directory, local_rank, process.gpus))

    def forget(self, attempt: Attempt) -> None:
        for process in attempt.processes.values():
            if process.running or (process.key, "kill") in self.deadlines:
                self._signal(process, SIGKILL)
            self.deadlines.discard(*((process.key, what) for what in get_args(What)))
        self._gather(attempt)
        del self.attempts[attempt.key]
        self.effects.add(w.Remove(attempt.key))

    def say_again(self) -> None:
        """Sends again all that the orchestrator may have missed before its welcome."""
        for process in self.processes():
            self._send_output(process, again=True)
            if process.status is not None:
                self.tell_exit(process)

    # Processes

    def spawned(self, event: w.Spawned) -> None:
        process = self.find(*event.key)
        if process is None:
            self.effects.add(w.SignalGroup(event.key, event.pid, SIGKILL))
            return
        process.pid = event.pid
        process.open_streams = {"stdout", "stderr"}
        if process.stopped:
            self._signal(process, SIGKILL)

    def stop(self, process: Process, kill: bool, signal: int = 0) -> None:
        """Ends a process, or prevents its start: with SIGTERM (or `signal`) and a grace, with `kill` at once."""
        process.hurried = True
        if process.exit is not None:
            self._await_end(process)
            return
        if signal in (SIGHUP, SIGINT):
            process.stop_signal = signal
        first, process.stopped = not process.stopped, True
        if not process.pid:
            # A process that is being started is killed by `spawned`. One that is never started has ended here.
            if first and not self.attempts[process.key[:2]].launched:
                process.status = self._status(process, w.ProcessExited(process.key, 0, 0, False))
                self.tell_exit(process)
        elif kill:
            self.deadlines.discard((process.key, "term"), (process.key, "kill"))
            self._signal(process, SIGKILL)
        elif first and process.warned:
            self.deadlines.set((process.key, "term"), self.effects.now + WORLD_CHANGED_GRACE_S)
        elif first:
            self._terminate(process)

    def stop_all(self, kill: bool) -> None:
        for process in self.processes():
            self.stop(process, kill)

    def exited(self, event: w.ProcessExited) -> None:
        process = self.find(*event.key)
        if process is None:
            return
        process.exit = event
        self.deadlines.discard((process.key, "term"), (process.key, "kill"))
        if process.pid:
            # Its children end too. SIGTERM comes first: the resource tracker of multiprocessing ignores it, and removes shared
            # memory that the script has left, once all processes of the script have ended.
            self._signal(process, SIGTERM)
            self.deadlines.set((process.key, "kill"), self.effects.now + DRAIN_S)
        process.drained_at = self.effects.now + DRAIN_S
        self._end_if_drained(process)

    def tell_exit(self, process: Process) -> None:
        assert process.status is not None
        self.effects.send(m.RankExited(*process.key[:2], process.status, process.made))

    # Output

    def printed(self, event: w.Printed) -> None:
        process = self.find(*event.key)
        if process is None:
            return
        if not event.data:
            process.open_streams.discard(event.stream)
            self._end_if_drained(process)
            return
        process.output.add(event.stream, event.data)
        self._send_output(process)
        if process.output.turns():
            self.effects.add(w.ReadOutput(event.key, not process.output.paused))
        self._put_off_end(process)

    def acknowledged(self, ack: m.OutputAck) -> None:
        process = self.find(ack.job_id, ack.attempt, ack.member_id)
        if process is None:
            return
        process.output.acknowledge(ack.number)
        self._send_output(process)
        self._end_if_drained(process)
        if process.output.turns():
            self._put_off_end(process)
            self.effects.add(w.ReadOutput(process.key, not process.output.paused))

    def repeat(self, attempt: Attempt) -> None:
        """Sends again all output that the client has not acknowledged, and Repeated behind it."""
        for process in attempt.processes.values():
            self._send_output(process, again=True)
        self.effects.send(m.Repeated(*attempt.key))

    def _send_output(self, process: Process, again: bool = False) -> None:
        if not self.effects.welcomed:
            return
        for output in process.output.sent if again else ():
            self.effects.send(output)
        for output in process.output.send():
            self.effects.send(output)

    # Time

    def expire(self) -> None:
        for key, what in self.deadlines.due(self.effects.now):
            process = self.find(*key)
            assert process is not None, "an attempt is forgotten with its deadlines"
            if what == "term":
                self._terminate(process)
            elif what == "kill":
                self._signal(process, SIGKILL)
            else:
                self._end(process)

    def _terminate(self, process: Process) -> None:
        self.deadlines.set((process.key, "kill"), self.effects.now + STOP_GRACE_S)
        self._signal(process, process.stop_signal)

    def _put_off_end(self, process: Process) -> None:
        """For a child of a process that has exited, which prints on."""
        if process.exit is not None and process.status is None:
            process.drained_at = self.effects.now + DRAIN_S
            self._await_end(process)

    def _end_if_drained(self, process: Process) -> None:
        """A process has ended when it has exited and its client has all of its output on the way."""
        if process.exit is None or process.status is not None:
            return
        if process.open_streams or process.output.unsent:
            self._await_end(process)
        else:
            self._end(process)

    def _await_end(self, process: Process) -> None:
        if process.exit is None or process.status is not None:
            return
        if not process.output.unsent and not process.output.paused:  # else more may be in the pipes
            self.deadlines.set((process.key, "end"), process.drained_at)
        elif process.hurried:
            self.deadlines.set((process.key, "end"), process.drained_at + self.unread_s)
        else:
            self.deadlines.discard((process.key, "end"))

    def _end(self, process: Process) -> None:
        assert process.exit is not None
        if (process.key, "kill") in self.deadlines:
            self._signal(process, SIGKILL)
        self.deadlines.discard((process.key, "kill"), (process.key, "end"))
        process.output.drop_unsent()
        process.status = self._status(process, process.exit)
        attempt = self.attempts[process.key[:2]]
        if not attempt.active:
            self.jobs_done += 1
            self._gather(attempt)  # before RankExited: a client that hears of the end may ask for files at once
        self.tell_exit(process)

    def _status(self, process: Process, exit: w.ProcessExited) -> m.RankStatus:
        reason, kind = exit.reason, self.attempts[process.key[:2]].assign.spec.kind
        if kind == "tasks" and exit.task >= 0 and not (exit.code or exit.signal or process.stopped):
            reason = "exit code 0, which nobody had asked of it"  # its client waits for its results
        return m.RankStatus(
            member_id=process.member_id,
            worker_id=self.settings.worker_id,
            host=self.settings.advertise,
            pid=process.pid,
            code=exit.code,
            signal=exit.signal,
            out_of_memory=exit.out_of_memory and not process.stopped,
            stopped=process.stopped,
            stderr_tail=process.output.stderr_tail.decode(errors="replace"),
            reason=reason,
            task=exit.task,
        )

    def _gather(self, attempt: Attempt) -> None:
        """Once for each attempt that has a working folder of its own."""
        if attempt.launched and not attempt.gathered and attempt.assign.spec.digest:
            attempt.gathered = True
            self.effects.add(w.Gather(attempt.key))

    def _signal(self, process: Process, number: int) -> None:
        self.effects.add(w.SignalGroup(process.key, process.pid, number))

    # Looking up

    def processes(self) -> list[Process]:
        return [process for attempt in self.attempts.values() for process in attempt.processes.values()]

    def measure(self, ask: m.Measure) -> w.MeasureRanks:
        """What is to be measured of a job, and what is known of it: of its last attempt here."""
        attempts = [attempt for key, attempt in self.attempts.items() if key[0] == ask.job_id]
        if not attempts:
            return w.MeasureRanks(ask, ())
        last = max(attempts, key=lambda attempt: attempt.key[1])
        pids = ((process.member_id, process.pid) for process in last.processes.values() if process.running)
        sums = (
            m.CollectiveSum(row.operation, row.path, sum(row.buckets), row.byte_count, row.seconds)
            for row in last.collectives.values()
        )
        return w.MeasureRanks(ask, tuple(pids), tuple(sums))

    def active_count(self) -> int:
        """The number of attempts with a process that has not ended."""
        return sum(attempt.active for attempt in self.attempts.values())

    def find(self, job_id: str, attempt: int, member_id: int) -> Process | None:
        held = self.attempts.get((job_id, attempt))
        return held.processes.get(member_id) if held is not None else None
