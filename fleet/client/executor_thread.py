"""Thread of an Executor: carries tasks from callers to runners, and results to futures. docs/ARCHITECTURE.md has the way."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, TypeVar

from fleet import config, tasks
from fleet import messages as m
from fleet.bus import forks
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Lost
from fleet.bus.poller import DescriptorPoller, Wake
from fleet.bus.shared_memory import host_key
from fleet.client import task_scheduler as scheduler
from fleet.client.call_packer import CallPacker
from fleet.client.connection import Connection
from fleet.client.direct_socket import DirectSocket
from fleet.client.local_cluster import Place
from fleet.client.pending_tasks import PendingTasks, TaskOptions
from fleet.client.runners import ResultsArrived, Runners, RunnersLost
from fleet.errors import FleetError, TaskLost
from fleet.stillness import Deadline, LifeClock

T = TypeVar("T")

PENDING_BYTES = 256 << 20  # of arguments
LEAVE_WITHIN_S = 3.0  # for runners to end after Leave
KILLED_WITHIN_S = 3.0  # for runners to end after a kill


class ExecutorThread:
    """Any thread may call `submit`, `finish` and `drop`."""

    def __init__(
        self,
        place: Place,
        options: m.JobOptions,
        count: int,  # of runners; 0: as many as the cluster has room for
        max_pending: int,
        tasks_at_most: int | None,  # of one runner
        initializer: Callable[..., object] | None,  # each runner calls it before all tasks
        initargs: tuple[Any, ...],
        needed: ExitStack,  # closed at the end
    ) -> None:
        self._place = place
        self._options = options
        self._count = count
        self._needed = needed
        self._forks = forks.count
        self._wake = Wake()
        self._pending = PendingTasks(max_pending, PENDING_BYTES, self._wake.set)
        directory = config.shared_memory()
        self._memory = host_key(directory) if directory is not None else ""
        self._packer = CallPacker(directory if self._memory else None)
        self._initializer = None if initializer is None else self._packer.pack(initializer, initargs, {})
        self._cancel_all = self._abandoned = False
        self._broken: BaseException | None = None
        self._ready = threading.Event()  # the orchestrator has let this client in, or the thread has ended
        self._thread = threading.Thread(target=self._run, name="fleet-executor", daemon=True)
        self._pending.never_waits = self._thread
        # Callers may act for the thread while it sleeps, see `_hand_over`.
        self._asleep = False
        self._full = False  # no runner has room, until the thread's next turn at least
        self._wakes_at = math.inf  # the end of its sleep, if nothing comes
        self._lock = threading.RLock()  # around the fields below
        self._clock = LifeClock()  # the thread reads it, callers look at it
        self._scheduler = scheduler.TaskScheduler(tasks_at_most)
        self._runners: Runners  # exists once the thread has begun

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

    def submit(self, fn: Callable[..., T], args: Any, kwargs: Any, options: TaskOptions) -> Future[T]:
        """Raises UsageError where the call cannot be pickled, RuntimeError when no more tasks are taken."""
        if self._forks != forks.count:
            raise RuntimeError("this Executor is that of the process of which this one is a fork: make one here")
        future = self._pending.add(self._packer.pack(fn, args, kwargs), options)
        self._hand_over()
        return future

    def finish(self, cancel: bool, abandon: bool = False) -> None:
        """Ends the thread once all tasks are done; with `cancel` those that have begun, with `abandon` none."""
        self._cancel_all = self._cancel_all or cancel
        self._abandoned = self._abandoned or abandon
        self._pending.close()
        self._wake.set()

    def drop(self) -> None:
        """Ends the thread once all tasks are done. Takes no lock, since the garbage collector calls it at any point."""
        self._pending.closed = True
        self._wake.set()

    def _hand_over(self) -> None:
        """Has an added task taken in, here if a runner waits for one: a change of threads would cost 0.1 ms.

        The thread takes in all tasks before it sleeps, so it needs a call only in its sleep. It needs none while no runner has
        room, since a result will wake it. It is woken where anything but the task is left to do, or another caller is at it.
        """
        if not self._asleep or self._full:
            return
        if self._lock.acquire(blocking=False):
            try:
                if self._scheduler.has_idle:
                    self._take_tasks()
                    if self._runners.is_quiet() and self._next_deadline() >= self._wakes_at:
                        return
                elif not self._scheduler.has_room:
                    self._full = True
                    return
            finally:
                self._lock.release()
        self._wake.set()

    # The thread

    def _run(self) -> None:
        direct = None
        try:
            with Bus(self._place.target.lock) as bus:
                connection = Connection(bus, self._place.target, self._clock)
                direct = DirectSocket(bus, self._place.door) if self._place.door else None
                self._runners = Runners(
                    self._place, self._options, self._initializer, connection, direct,
                    self._pending.packed, self._memory, self._clock,
                )  # fmt: skip
                self._poller = DescriptorPoller([self._wake.fileno(), *self._runners.descriptors()])
                if not self._count or not self._place.target.local:
                    connection.ask(m.ListWorkers())
                try:
                    while self._goes_on():
                        with self._lock:
                            wait_s = self._turn()
                        if wait_s is not None:
                            self._sleep(wait_s)
                    self._leave()
                finally:
                    connection.put(m.Goodbye())  # the orchestrator ends what is left of the runners at once
        except BaseException as error:
            self._broken = error
        finally:
            self._pending.close(self._broken)
            self._ready.set()
            with self._lock:
                self._end_tasks()
            if self._initializer is not None:
                self._initializer.release()
            self._packer.close()
            if direct is not None:
                direct.close()
            self._needed.close()
            self._wake.close()

    def _goes_on(self) -> bool:
        return not self._abandoned and (not self._pending.closed or bool(self._pending.count))

    def _turn(self) -> float | None:
        """Acts on all that has happened. Returns how long to sleep; None: more has come already."""
        self._full = False
        # A task that was submitted before a result is acted on competes for the runner that the result frees.
        things = self._runners.receive()
        self._take_tasks()
        for thing in things:
            self._take(thing)
        self._take_tasks()  # of callers that waited for a result and have gone on
        now = self._clock.now()
        self._wakes_at = self._next_deadline()
        if now >= self._wakes_at:
            self._runners.tick()
            self._step(scheduler.Tick())
            self._wakes_at = self._next_deadline()
        return None if self._runners.has_event() else max(0.0, self._wakes_at - now)

    def _next_deadline(self) -> float:
        deadlines = (self._scheduler.next_deadline(), self._runners.next_deadline())
        return min((at for at in deadlines if at is not None), default=math.inf)

    def _sleep(self, wait_s: float) -> None:
        """Waits outside of the lock, which callers take meanwhile."""
        self._asleep = True
        pending = self._pending
        if not pending.added and not pending.cancelled and (pending.count or not pending.closed):
            patience_s = self._runners.patience(None if wait_s == math.inf else wait_s)
            if self._wake.fileno() in self._poller.wait(self._clock.waits(patience_s)):
                self._wake.clear()
        self._asleep = False

    def _take_tasks(self) -> None:
        if self._pending.added:
            self._step(scheduler.Submitted(self._pending.take()))
        if self._pending.cancelled or self._cancel_all:
            cancelled = self._pending.take_cancelled(self._cancel_all)
            self._cancel_all = False
            self._step(scheduler.Cancelled(cancelled))

    def _take(self, thing: m.Message | Arrived | Lost) -> None:
        if isinstance(thing, m.Welcome | m.Workers):
            self._begin(self._runners.room(thing) if isinstance(thing, m.Workers) else 0)
            return
        for event in self._runners.take(thing):
            if isinstance(event, ResultsArrived):
                self._settle(event)
            else:
                self._step(event)

    def _begin(self, room: int) -> None:
        """Asks for runners, once this client was let in. `room`: for how many the cluster has room; 0: not known."""
        count = self._count or room
        if count and not self._ready.is_set():
            for _ in range(count):
                self._scheduler.joined(self._runners.ask())
            self._ready.set()

    def _step(self, event: scheduler.Event) -> None:
        if self._abandoned:
            return  # a task that is lost now is not tried again
        for effect in self._scheduler.step(event, self._clock.look()):
            self._perform(effect)

    def _perform(self, effect: scheduler.Effect) -> None:
        if isinstance(effect, scheduler.Give):
            self._give(effect)
        elif isinstance(effect, scheduler.AskRunner):
            if self._pending.count or not self._pending.closed:
                self._scheduler.joined(self._runners.ask())
        elif isinstance(effect, scheduler.Recall):
            self._runners.say(effect.job_id, tasks.ReturnCalls(effect.task_ids))
        elif isinstance(effect, scheduler.EndRunner):
            self._runners.end(effect.job_id, effect.kill)
        else:
            self._fail(effect)

    def _give(self, give: scheduler.Give) -> None:
        calls, cancelled = self._pending.claim(give.tasks)
        self._runners.give(give.job_id, calls)
        if cancelled:
            self._step(scheduler.NotBegun(give.job_id, tuple(cancelled), cancelled=True))

    def _settle(self, arrived: ResultsArrived) -> None:
        """Settles futures. A task that its runner does not have any more, as after its time-out, has a future settled before."""
        held = self._scheduler.runners.get(arrived.job_id)
        mine = [whole for whole in arrived.results if held is not None and whole[0].task_id in held.tasks]
        self._step(
            scheduler.Finished(arrived.job_id, {result.task_id: result.seconds for result, _ in arrived.results})
        )
        self._pending.settle(mine)

    def _fail(self, fail: scheduler.Fail) -> None:
        task = fail.task
        packed = self._pending.packed(task.task_id)
        if packed is None:
            return
        error: Exception = TaskLost(packed.name, task.retries, task.history, fail.text)
        if fail.why == "timeout":
            error = TimeoutError(f"task {packed.name}: {fail.text}")
        self._pending.fail(task.task_id, error)

    # The end

    def _leave(self) -> None:
        """Ends the runners as scripts end: their output is shown, and their slots are free when this returns.

        Waits for that in a bounded time. After Ctrl-C the runners are killed.
        """
        self._runners.acknowledge()
        self._runners.end_all(kill=self._abandoned)
        self._wait_for_ends(LEAVE_WITHIN_S)
        self._runners.end_all(kill=True)
        self._wait_for_ends(0.0 if self._place.target.local else KILLED_WITHIN_S)

    def _wait_for_ends(self, timeout_s: float) -> None:
        deadline = Deadline(timeout_s)
        while len(self._runners) and deadline.left_s:
            if not self._runners.has_event():
                self._poller.wait(deadline.clock.waits(self._runners.patience(deadline.left_s)))
            self._wake.clear()
            for thing in self._runners.receive():
                if not isinstance(thing, Lost):
                    self._take(thing)

    def _end_tasks(self) -> None:
        begun = {
            task_id: (task, r.where) for r in self._scheduler.runners.values() for task_id, task in r.tasks.items()
        }
        for task_id in self._pending.left():
            why = self._broken or FleetError("the Executor was ended before this task was")
            packed = self._pending.packed(task_id)
            if isinstance(why, RunnersLost) and packed is not None:
                task, where = begun.get(task_id, (scheduler.Task(task_id), ""))
                lost = (f"attempt {task.attempts + 1} on {where}: {why}",) if task_id in begun else ()
                why = TaskLost(packed.name, task.retries, (*task.history, *lost), str(why))
            self._pending.fail(task_id, why)
