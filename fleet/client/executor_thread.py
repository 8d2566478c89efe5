"""Thread of an Executor: its connection to the orchestrator, and to the runners. Acts on what task_scheduler.py decides.

Everything that belongs to a task, its call, large arguments and future, is a PendingTask here; the core knows its number only.
"""

from __future__ import annotations

import logging
import math
import threading
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from contextlib import ExitStack
from typing import Any, TypeVar

from fleet import config, tasks
from fleet import messages as m
from fleet.bus import forks
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Dealer, Sent
from fleet.bus.poller import DescriptorPoller, Wake
from fleet.bus.shared import host_key
from fleet.client import task_scheduler as scheduler
from fleet.client.direct_socket import DirectSocket
from fleet.client.incoming_results import IncomingResults
from fleet.client.local_cluster import Place
from fleet.client.pending_tasks import CallPacker, PendingTask, TaskFuture, settle
from fleet.client.runners import ExecutorSettings, RunnerJob, Runners, RunnersLost
from fleet.errors import ConfigError, FleetError, ProtocolError, TaskLost
from fleet.stillness import Deadline, LifeClock

T = TypeVar("T")
log = logging.getLogger("fleet.executor")

LEAVE_WITHIN_S = 3.0  # for runners to end, once they were told to
KILLED_WITHIN_S = 3.0  # for those that had not
ASK_AGAIN_S = 0.2  # a runner that did not read
ACKNOWLEDGE_AFTER_S = 0.05  # results that no further call carries the acknowledgement of


class ExecutorThread(Runners):
    """`submit` and `finish` may be called from any thread."""

    def __init__(
        self,
        place: Place,
        options: m.JobOptions,
        settings: ExecutorSettings,
        needed: ExitStack,  # closed by the thread when it ends
    ) -> None:
        super().__init__(place, options, settings)
        self._needed = needed
        self._forks = forks.count
        self._wake = Wake()
        self._asleep = False
        self._full = False  # no runner has room, until the thread's next turn at least
        self._lock = threading.RLock()  # around the sockets and all that follows here
        self._acknowledge_at = 0.0
        self._clock = LifeClock()  # read by the thread, looked at by whoever acts for it
        self._inbox: deque[tuple[scheduler.Task, PendingTask]] = deque()
        self._cancels: deque[int] = deque()
        self._gate = threading.RLock()  # around what follows; its own `with` costs less than a condition's
        self._room = threading.Condition(self._gate)
        self._pending, self._pending_bytes, self._next_id = 0, 0, 0
        self._finishing = False
        self._cancel_all = self._abandoned = False
        self._broken: BaseException | None = None
        self._ready = threading.Event()  # let in, or broken
        self._thread = threading.Thread(target=self._run, name="fleet-executor", daemon=True)
        directory = config.shared_memory()
        self._memory = host_key(directory) if directory is not None else ""
        self._packer = CallPacker(directory if self._memory else None)
        self._tasks: dict[int, PendingTask] = {}
        if settings.initializer is not None:
            self._first = self._packer.pack(settings.initializer, settings.initargs, {})
        self._dropped_count = 0  # messages that were none

    def start(self) -> None:
        """Returns once the orchestrator has let this client in. Raises ConfigError where it does not in time."""
        self._thread.start()
        self._ready.wait()
        if self._broken is not None:
            self.join()
            raise self._broken

    def join(self) -> None:
        self._thread.join()

    # Any thread

    def submit(
        self, fn: Callable[..., T], args: Any, kwargs: Any, retries: int, timeout_s: float | None, priority: int
    ) -> TaskFuture[T]:
        """Raises UsageError where the call cannot be pickled, RuntimeError when no more are taken."""
        if self._forks != forks.count:
            raise RuntimeError("this Executor is that of the process of which this one is a fork: make one here")
        packed = self._packer.pack(fn, args, kwargs)
        size_bytes = packed.size_bytes
        with self._gate:
            # A callback that waited here would wait for itself.
            if not self._may_submit(size_bytes) and threading.current_thread() is not self._thread:
                self._room.wait_for(lambda: self._may_submit(size_bytes))
            if self._broken is not None:
                packed.release()
                raise BrokenExecutor(f"this Executor has ended: {self._broken}") from self._broken
            if self._finishing:
                packed.release()
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._next_id += 1
            task_id = self._next_id
            self._pending, self._pending_bytes = self._pending + 1, self._pending_bytes + size_bytes
            future: TaskFuture[T] = TaskFuture(task_id, self._cancelled)
            work = PendingTask(future, packed.call(task_id), packed)
            self._inbox.append((scheduler.Task(task_id, priority, retries, timeout_s), work))
        if self._asleep and not self._full and not self._act_here():
            self._wake.set()
        return future

    def _cancelled(self, task_id: int) -> None:
        self._cancels.append(task_id)
        self._wake.set()

    def finish(self, cancel: bool, abandon: bool = False) -> None:
        """Ends once all tasks are done, without those that have not begun, or without any."""
        with self._room:
            self._finishing = True
            self._cancel_all = self._cancel_all or cancel
            self._abandoned = self._abandoned or abandon
            self._room.notify_all()
        self._wake.set()

    def drop(self) -> None:
        """Nobody can submit any more: ends once all tasks are done. Takes no lock that its caller, a collector, may hold."""
        self._finishing = True
        self._wake.set()

    def _act_here(self) -> bool:
        """Gives a runner that has nothing to do its task in the caller's thread: a change of threads costs 0.1 ms.

        False: this line's own thread has to look. It need not where no runner has room: a result will wake it.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._direct is None or not self._scheduler.has_idle:
                self._full = not self._scheduler.has_room
                return self._full
            self._take_inbox()
            # What came in meanwhile, and deadlines that are new, are that thread's.
            return not self._has_event() and self._scheduler.next_deadline() is None and not self._unsent
        finally:
            self._lock.release()

    def _may_submit(self, size_bytes: int) -> bool:
        settings = self._settings
        if self._pending < settings.max_pending and self._pending_bytes + size_bytes <= settings.max_bytes:
            return True
        return self._finishing or self._broken is not None or not self._pending

    # This line's own thread

    def _run(self) -> None:
        try:
            with Bus(self._target.lock) as bus:
                self._dealer = Dealer(bus, self._target.endpoint, f"client/{uuid.uuid4().hex}".encode())
                self._direct = DirectSocket(bus, self._place.door) if self._place.door else None
                direct = self._direct.descriptors() if self._direct else []
                self._watch = DescriptorPoller([*self._dealer.descriptors(), self._wake.fileno(), *direct])
                self._incoming = IncomingResults(self._say, self._memory)
                self._started_at = self._clock.now()
                try:
                    while self._goes_on():
                        with self._lock:
                            wait_s = self._turn()
                        if wait_s is not None:
                            self._sleep(wait_s)
                    self._leave()
                finally:
                    self._dealer.put(m.encode(m.Goodbye()))  # what is left of its runners need not wait for it
        except BaseException as error:
            self._broken = error
        finally:
            with self._room:
                self._finishing = True
                self._room.notify_all()
            self._ready.set()
            with self._lock:
                self._end_tasks()
            if self._first is not None:
                self._first.release()
            self._packer.close()
            if self._direct is not None:
                self._direct.close()
            self._needed.close()
            self._wake.close()

    def _end_tasks(self) -> None:
        """Settles those that are left."""
        begun = {
            task_id: (task, r.where) for r in self._scheduler.runners.values() for task_id, task in r.tasks.items()
        }
        for task_id, work in [*self._tasks.items(), *((task.task_id, work) for task, work in self._inbox)]:
            why = self._broken or FleetError("the Executor was ended before this task was")
            if isinstance(why, RunnersLost):
                task, where = begun.get(task_id, (scheduler.Task(task_id), ""))
                lost = (f"attempt {task.attempts + 1} on {where}: {why}",) if task_id in begun else ()
                why = TaskLost(work.packed.name, task.retries, (*task.history, *lost), str(why))
            if work.claim():
                work.future.set_exception(why)
            self._drop(work)

    def _goes_on(self) -> bool:
        left = self._inbox or self._scheduler.task_count or self._tasks
        return not self._abandoned and (not self._finishing or bool(left))

    def _turn(self) -> float | None:
        """Takes in all that happened; returns how long to wait for more. None: not at all."""
        self._full = False
        while self._unsent:
            self._dealer.put(m.encode(self._unsent.popleft()))
        for link in self._dealer.changes():
            self._link(link)
        # Taken in one order and acted on in the other: a runner's last result counts before its end, and what was submitted
        # before a result came competes for the runner that it frees.
        told = self._dealer.receive()
        things = [*(self._direct.receive() if self._direct else ()), *told]
        self._take_inbox()
        for thing in things:
            if isinstance(thing, Arrived):
                self._take(thing)
        self._take_inbox()  # of those who waited for a result and have gone on
        now = self._clock.now()
        deadline = self._scheduler.next_deadline()
        if deadline is not None and now >= deadline:
            self._step(scheduler.Tick())
            return 0.0
        waits = [math.inf if deadline is None else deadline - now]
        if any(seat.arrived for seat in self._jobs.values()):
            if now >= self._acknowledge_at:
                self._acknowledge()
            waits.append(max(0.0, self._acknowledge_at - now))
        for job_id, seat in self._jobs.items():
            if seat.behind_at is not None:
                if now >= seat.behind_at:
                    seat.behind_at = None
                    self._say(job_id, tasks.Sync())
                waits.append(ASK_AGAIN_S)
        if not self._welcomed:
            waits.append(self._started_at + self._target.timeout_s - now)
            if waits[-1] <= 0:
                raise ConfigError(
                    f"no orchestrator answered at {self._target.name} within {self._target.timeout_s:g} s"
                )
        return None if self._unsent or self._has_event() else max(0.0, min(waits))

    def _has_event(self) -> bool:
        return self._dealer.has_event() or (self._direct is not None and self._direct.has_event())

    def _sleep(self, wait_s: float) -> None:
        """Outside of the lock: who finds this line asleep may act for it, or wakes it."""
        self._asleep = True
        nothing = not self._inbox and not self._cancels and (not self._finishing or self._tasks)
        if nothing:
            wait_s_or_none = self._dealer.patience(None if wait_s == math.inf else wait_s)
            ready = self._watch.wait(self._clock.waits(wait_s_or_none))
            if self._wake.fileno() in ready:
                self._wake.clear()
        self._asleep = False

    def _take_inbox(self) -> bool:
        """Whether there was anything."""
        submitted = []
        while self._inbox:
            task, work = self._inbox.popleft()
            self._tasks[task.task_id] = work
            submitted.append(task)
        if submitted:
            self._step(scheduler.Submitted(submitted))
        cancelled = [self._cancels.popleft() for _ in range(len(self._cancels))]
        if self._cancel_all:
            self._cancel_all = False
            for task_id, work in list(self._tasks.items()):
                if not work.claimed and Future.cancel(work.future):
                    cancelled.append(task_id)
        if cancelled:
            self._step(scheduler.Cancelled(cancelled))
            for task_id in cancelled:
                found = self._tasks.get(task_id)
                if found is not None and not found.claimed:
                    found.future.set_running_or_notify_cancel()
                    self._drop(self._tasks.pop(task_id))
        return bool(submitted or cancelled)

    def _step(self, event: scheduler.Event) -> None:
        if self._abandoned:
            return  # what is lost now is not tried again
        for effect in self._scheduler.step(event, self._clock.look()):
            self._perform(effect)

    def _perform(self, effect: scheduler.Effect) -> None:
        if isinstance(effect, scheduler.Give):
            self._give(effect)
        elif isinstance(effect, scheduler.AskRunner):
            if self._tasks or self._inbox or not self._finishing:
                self._ask_runner()
        elif isinstance(effect, scheduler.Recall):
            self._say(effect.job_id, tasks.ReturnCalls(effect.task_ids))
        elif isinstance(effect, scheduler.EndRunner):
            self._end_runner(effect.job_id, effect.kill)
        else:
            self._fail(effect)

    def _begun(self) -> None:
        for effect in self._scheduler.start():
            self._perform(effect)
        self._ready.set()

    # Tasks

    def _give(self, give: scheduler.Give) -> None:
        seat = self._jobs[give.job_id]
        calls: list[tasks.Call] = []
        functions: dict[bytes, bytes] = {}
        cancelled: list[int] = []
        size_bytes = 0
        for task in give.tasks:
            work = self._tasks[task.task_id]
            if not work.claim():
                cancelled.append(task.task_id)
                self._drop(self._tasks.pop(task.task_id))
                continue
            calls.append(work.call)
            size_bytes += len(work.call.data)
            function = work.packed.function
            if function is not None and seat.functions.get(function.digest) is None:
                seat.functions.add(function)
                functions[function.digest] = function.pickled
                size_bytes += function.size_bytes
            if size_bytes >= tasks.MESSAGE_BYTES:
                self._run_calls(give.job_id, seat, calls, functions)
                calls, functions, size_bytes = [], {}, 0
        if calls:
            self._run_calls(give.job_id, seat, calls, functions)
        if cancelled:  # between the decision and now: nothing will come of them
            self._step(scheduler.NotGiven(give.job_id, tuple(cancelled)))

    def _run_calls(self, job_id: str, seat: RunnerJob, calls: list[tasks.Call], functions: dict[bytes, bytes]) -> None:
        arrived, seat.arrived = tuple(seat.arrived), []
        self._say(job_id, tasks.MakeCalls(tuple(calls), functions, arrived))

    def _acknowledge(self) -> None:
        self._acknowledge_at = self._clock.look() + ACKNOWLEDGE_AFTER_S
        for job_id, seat in self._jobs.items():
            if seat.arrived:
                self._run_calls(job_id, seat, [], {})

    def _say(self, job_id: str, said: tasks.TaskMessage, piece: bytes | None = None) -> None:
        body = [tasks.encode(said)] if piece is None else [tasks.encode(said), piece]
        seat = self._jobs[job_id]
        sent = Sent.GONE  # a runner that is not there yet is told everything when it comes
        if self._direct is None:
            sent = self._dealer.send(m.relay_head(job_id), body)
        elif seat.peer:
            sent = self._direct.send(seat.peer, m.relay_head(job_id), body)
        if sent is Sent.FULL:
            seat.behind_at = self._clock.look() + ASK_AGAIN_S

    def _settle(self, job_id: str, results: list[tuple[tasks.Result, list[Any]]]) -> None:
        """Results that are here with all their buffers."""
        seat = self._jobs.get(job_id)
        if self._first is not None and seat is not None and not seat.initialized:
            for result, _ in results:
                if result.task_id == tasks.INITIALIZER:
                    self._initialized(job_id, seat, result)
        seconds = {}
        for result, _ in results:
            seconds[result.task_id] = result.seconds
            if seat is not None:
                seat.arrived.append(result.task_id)
        held = self._scheduler.runners.get(job_id)
        mine = [(r, buffers) for r, buffers in results if held is not None and r.task_id in held.tasks]
        self._step(scheduler.Finished(job_id, seconds))
        works = [self._tasks.pop(result.task_id, None) for result, _ in mine]
        self._drop(*filter(None, works))
        for work, (result, buffers) in zip(works, mine, strict=True):
            if work is not None:
                settle(work, result, buffers)

    def _fail(self, fail: scheduler.Fail) -> None:
        work = self._tasks.pop(fail.task.task_id, None)
        if work is None:
            return
        self._drop(work)
        if not work.claim():
            return
        if fail.why == "timeout":
            work.future.set_exception(TimeoutError(f"task {work.packed.name}: {fail.text}"))
        else:
            work.future.set_exception(TaskLost(work.packed.name, fail.task.retries, fail.task.history, fail.text))

    def _drop(self, *works: PendingTask) -> None:
        for work in works:
            work.packed.release()
        with self._gate:
            self._pending -= len(works)
            self._pending_bytes -= sum([work.packed.size_bytes for work in works])
            self._room.notify_all()  # there may be room for several, and who comes first may need more

    # Runners

    def _take(self, arrived: Arrived) -> None:
        job_id = m.relayed_job(arrived.data)
        if job_id is None:
            self._from_orchestrator(arrived.data)
        elif job_id in self._jobs and arrived.rest:
            try:
                said = tasks.decode(arrived.rest[0].buffer)
            except ProtocolError as error:
                self._dropped_count += 1
                if self._dropped_count & (self._dropped_count - 1) == 0:  # the 1st, 2nd, 4th, ...
                    log.warning(
                        "%d messages of runners were dropped, the last one since it is %s", self._dropped_count, error
                    )
                return
            self._from_runner(job_id, said, arrived)

    def _from_runner(self, job_id: str, said: tasks.TaskMessage, arrived: Arrived) -> None:
        seat = self._jobs[job_id]
        if isinstance(said, tasks.Results):
            self._results(job_id, said)
        elif isinstance(said, tasks.BufferPiece):
            piece = arrived.rest[1].buffer if len(arrived.rest) > 1 else memoryview(b"")
            whole = self._incoming.piece(job_id, said, piece)
            if whole:
                self._settle(job_id, whole)
        elif isinstance(said, tasks.ReadBuffer):
            work = self._tasks.get(said.task_id)
            packed = self._first if said.task_id == tasks.INITIALIZER else work.packed if work is not None else None
            blob = packed.blobs[said.index] if packed is not None and said.index < len(packed.blobs) else None
            data = blob.piece(said.offset, tasks.PIECE_BYTES) if blob is not None else b""
            piece_said = tasks.BufferPiece(said.task_id, said.index, said.offset)
            self._say(job_id, piece_said, data)
        elif isinstance(said, tasks.CallsReturned):
            self._step(scheduler.GivenBack(job_id, said.task_ids))
        elif isinstance(said, tasks.Ready):
            seat.peer = arrived.peer
            seat.where = f"{seat.worker} (pid {said.pid})"
            self._ready_runner(job_id, seat, said)

    def _results(self, job_id: str, said: tasks.Results) -> None:
        whole = self._incoming.results(job_id, said)
        if whole:
            self._settle(job_id, whole)
        if len(whole) < len(said.results):
            here = {result.task_id for result, _ in whole}
            arriving = {r.task_id: r.seconds for r in said.results if r.buffers and r.task_id not in here}
            self._step(scheduler.Arriving(job_id, arriving))

    def _leave(self) -> None:
        """Ends the runners, as scripts end: what they printed is shown, and their slots are free when this returns.

        Waits for that in a bounded time. After Ctrl-C they are killed.
        """
        self._acknowledge()
        for job_id in list(self._jobs):
            self._end_runner(job_id, kill=self._abandoned or not self._jobs[job_id].where)
        self._wait_for_ends(LEAVE_WITHIN_S)
        for job_id in self._jobs:
            self._unsent.append(m.Cancel(job_id, kill=True))
        self._wait_for_ends(0.0 if self._target.local else KILLED_WITHIN_S)

    def _wait_for_ends(self, timeout_s: float) -> None:
        deadline = Deadline(timeout_s)
        while True:
            while self._unsent:
                self._dealer.put(m.encode(self._unsent.popleft()))
            if not self._jobs or not deadline.left_s:
                return
            if not self._has_event():
                self._watch.wait(deadline.clock.waits(deadline.left_s))
            self._wake.clear()
            self._dealer.changes()
            told = self._dealer.receive()
            for thing in [*(self._direct.receive() if self._direct else ()), *told]:
                if isinstance(thing, Arrived):
                    self._take(thing)
