"""Task scheduler of an Executor: which runner gets a task, and when a task is tried again or given up; pure.

`step(event, now) -> effects`, as in the other cores. A task is a number here; its call belongs to pending_tasks.py. A runner is
given as many short tasks as take PREFETCH_S, so that it never waits for the next one, but nothing behind a task that must not
run twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Literal

from msgspec import Struct

PREFETCH_S = 0.01
IN_FLIGHT_AT_MOST = 64
RECALL_AFTER_S = 0.02  # of a task that keeps others waiting while another runner has nothing to do
BACKOFF_S, BACKOFF_AT_MOST_S = 0.1, 10.0  # after the second attempt that lost its runner, doubled with each further one
STILLBORN_AT_MOST = 3  # runners in a row that end before they are ready

Timer = Literal["retry", "timeout", "recall"]
Why = Literal["lost", "timeout", "no runner"]


class Task(Struct):
    """Invariant: a task is queued, delayed, or in flight on one runner, until it is settled."""

    task_id: int
    priority: int = 0
    retries: int = 2  # after a loss of its runner
    timeout_s: float | None = None  # from its begin
    attempts: int = 0  # that lost their runner
    history: tuple[str, ...] = ()


class Runner(Struct):
    """A job that makes calls, one after the other."""

    job_id: str
    ready: bool = False
    retiring: bool = False  # it gets no more tasks, and ends after those that it has begun
    tasks: dict[int, Task] = {}  # in flight, in the order of their calls
    ended: set[int] = set()  # of them: their results are on the way
    given: int = 0  # tasks in its life
    spent: bool = False  # it was given all that it may have, and retires
    head_since: float = 0.0  # earliest begin of its head
    recalling: bool = False
    where: str = ""  # worker and pid, for a person
    verdict: tuple[Why, str] | None = None  # why it is being ended, for its first task

    @property
    def is_open(self) -> bool:
        """Whether further tasks may go to it."""
        return self.ready and not self.retiring and self.verdict is None

    @property
    def head(self) -> Task | None:
        """The task that it is in, as far as is known."""
        if not self.ended:
            return next(iter(self.tasks.values()), None)
        return next((task for task_id, task in self.tasks.items() if task_id not in self.ended), None)


# Events


class Submitted(Struct, frozen=True):
    tasks: list[Task]


class Cancelled(Struct, frozen=True):
    """Tasks that were cancelled. Those in flight go on."""

    task_ids: list[int]


class RunnerReady(Struct, frozen=True):
    """A runner is there, for the first time or again. `holds`: the tasks that it has and has not ended."""

    job_id: str
    where: str
    holds: tuple[int, ...]


class Finished(Struct, frozen=True):
    """Results of one runner, with the seconds that each task took. `arriving`: their large buffers are on their way."""

    job_id: str
    seconds: dict[int, float]
    arriving: bool = False


class NotBegun(Struct, frozen=True):
    """Tasks that a runner gives back, or that were `cancelled` between the decision to give them and the giving."""

    job_id: str
    task_ids: tuple[int, ...]
    cancelled: bool = False


class RunnerRetires(Struct, frozen=True):
    """The worker of a runner drains."""

    job_id: str


class RunnerEnded(Struct, frozen=True):
    job_id: str
    reason: str
    task_id: int = 0  # that it was in; 0: not known


class Tick(Struct, frozen=True):
    """Nothing but time has passed."""


RunnerEvent = RunnerReady | Finished | NotBegun | RunnerRetires | RunnerEnded
Event = Submitted | Cancelled | RunnerEvent | Tick


# Effects


class AskRunner(Struct, frozen=True):
    """Submit the job of a further runner."""


class Give(Struct, frozen=True):
    job_id: str
    tasks: list[Task]


class Recall(Struct, frozen=True):
    job_id: str
    task_ids: tuple[int, ...]


class EndRunner(Struct, frozen=True):
    job_id: str
    kill: bool


class Fail(Struct, frozen=True):
    """The task is settled without a result."""

    task: Task
    why: Why
    text: str


Effect = AskRunner | Give | Recall | EndRunner | Fail


class TaskScheduler:
    """Tasks and runners of one Executor."""

    def __init__(self, tasks_at_most: int | None = None) -> None:
        self.tasks_at_most = tasks_at_most  # of one runner, which then ends
        self.runners: dict[str, Runner] = {}
        self.mean_s: float | None = None  # of the time that tasks take, the last ones counting most
        self._queues: dict[int, deque[Task]] = {}  # by priority
        self._delayed: list[tuple[float, int, Task]] = []  # a heap
        # Invariant: of what is in a queue or delayed, only the tasks in here count. A cancelled one is found there later.
        self._queued: dict[int, Task] = {}
        self._stillborn = 0  # runners in a row that ended before they were ready
        self._missing = 0  # runners that were not asked for again
        self._effects: list[Effect] = []
        self._now = 0.0

    def step(self, event: Event, now: float) -> list[Effect]:
        """Decides what to do about one event."""
        self._effects, self._now = [], now
        if isinstance(event, Submitted):
            for task in event.tasks:
                self._queue(task)
            if self._missing:
                self._effects += [AskRunner()] * self._missing
                self._missing = self._stillborn = 0
        elif isinstance(event, Cancelled):
            for task_id in event.task_ids:
                self._queued.pop(task_id, None)
        elif not isinstance(event, Tick) and (runner := self.runners.get(event.job_id)) is not None:
            self._about(runner, event)
        self._dispatch()
        self._expire()
        return self._effects

    def next_deadline(self) -> float | None:
        """When to send a Tick if nothing else happens."""
        return min((at for at, _, _ in self._timers()), default=None)

    def joined(self, job_id: str) -> None:
        """The runner that was asked for has this id."""
        self.runners[job_id] = Runner(job_id)

    @property
    def has_idle(self) -> bool:
        """Whether a runner has nothing to do, and no task waits."""
        return not self._queued and any(not r.tasks and r.is_open for r in self.runners.values())

    @property
    def has_room(self) -> bool:
        """Whether a further task would be given to a runner now, or have one asked for."""
        return bool(self._missing) or any(r.is_open and len(r.tasks) < self._credit(r) for r in self.runners.values())

    # Runners

    def _about(self, runner: Runner, event: RunnerEvent) -> None:
        head = runner.head
        if isinstance(event, Finished):
            self._finished(runner, event)
        elif isinstance(event, RunnerReady):
            self._ready(runner, event)
        elif isinstance(event, RunnerRetires):
            self._retires(runner)
        elif isinstance(event, RunnerEnded):
            self._ended(runner, event)
            return
        else:
            self._not_begun(runner, event)
        if runner.head is not head:
            runner.head_since = self._now
        if runner.retiring and not runner.tasks:
            self._effects.append(EndRunner(runner.job_id, kill=False))

    def _finished(self, runner: Runner, event: Finished) -> None:
        for task_id, seconds in event.seconds.items():
            if task_id not in runner.tasks:
                continue
            if task_id not in runner.ended:
                self.mean_s = seconds if self.mean_s is None else 0.9 * self.mean_s + 0.1 * seconds
            if event.arriving:
                runner.ended.add(task_id)
            else:
                del runner.tasks[task_id]
                runner.ended.discard(task_id)

    def _ready(self, runner: Runner, event: RunnerReady) -> None:
        self._stillborn = 0
        runner.ready, runner.where, runner.recalling = True, event.where, False
        # After a lost connection: a task that it does not hold is on its way back as a result, or never reached it.
        lost = [task for task_id, task in runner.tasks.items() if task_id not in event.holds]
        held = [runner.tasks[task_id] for task_id in event.holds if task_id in runner.tasks]
        runner.tasks = {task.task_id: task for task in [*held, *lost]}
        if lost:
            self._effects.append(Give(runner.job_id, lost))

    def _not_begun(self, runner: Runner, event: NotBegun) -> None:
        for task_id in reversed(event.task_ids):
            task = runner.tasks.pop(task_id, None)
            if task is not None:
                runner.given -= 1
                if not event.cancelled:
                    self._queue(task, first=True)
        runner.recalling = runner.recalling and event.cancelled

    def _retires(self, runner: Runner) -> None:
        if not runner.retiring:
            runner.retiring = True
            self._recall(runner)
            self._effects.append(AskRunner())  # elsewhere

    def _ended(self, runner: Runner, event: RunnerEnded) -> None:
        del self.runners[runner.job_id]
        if not runner.ready:
            self._stillborn += 1
        if self._stillborn >= STILLBORN_AT_MOST:
            self._missing += 1  # until a task is submitted
        elif not runner.retiring or runner.spent:
            self._effects.append(AskRunner())
        # Results of tasks before the one that it was in were lost with it; those behind that one had not begun.
        cause = runner.tasks.get(event.task_id, runner.head)
        for task in reversed(runner.tasks.values()):
            if task is not cause and task.retries:
                self._queue(task, first=True)
        for task in runner.tasks.values():
            if task is cause or not task.retries:  # a task that may not run twice may have run
                self._lost(task, runner, event.reason)
        if self._stillborn >= STILLBORN_AT_MOST and not any(r.ready for r in self.runners.values()):
            for task in list(self._queued.values()):
                self._fail(task, "no runner", event.reason)

    def _lost(self, task: Task, runner: Runner, reason: str) -> None:
        if runner.verdict is not None:
            self._fail(task, *runner.verdict)
            return
        task.attempts += 1
        task.history += (f"attempt {task.attempts} on {runner.where or 'a runner that was never ready'}: {reason}",)
        if task.attempts > task.retries:
            self._fail(task, "lost", reason)
        elif task.attempts == 1:
            self._queue(task, first=True)
        else:
            self._queued[task.task_id] = task
            delay_s = min(BACKOFF_AT_MOST_S, BACKOFF_S * 2 ** min(task.attempts, 16))
            heappush(self._delayed, (self._now + delay_s, task.task_id, task))

    def _fail(self, task: Task, why: Why, text: str) -> None:
        self._queued.pop(task.task_id, None)
        self._effects.append(Fail(task, why, text))

    # Tasks

    def _queue(self, task: Task, first: bool = False) -> None:
        self._queued[task.task_id] = task
        if (queue := self._queues.get(task.priority)) is None:
            queue = self._queues[task.priority] = deque()
        if first:
            queue.appendleft(task)
        else:
            queue.append(task)

    def _next(self) -> Task | None:
        """The queued task that is first by priority. Drops cancelled ones on the way."""
        while self._queues:
            priority = max(self._queues) if len(self._queues) > 1 else next(iter(self._queues))
            queue = self._queues[priority]
            while queue:
                if self._queued.get(queue[0].task_id) is queue[0]:
                    return queue[0]
                queue.popleft()
            del self._queues[priority]
        return None

    def _dispatch(self) -> None:
        if not self._queued:
            return
        room = [r for r in self.runners.values() if r.is_open and len(r.tasks) < self._credit(r)]
        if not room:
            return
        room.sort(key=lambda runner: len(runner.tasks))
        share = -(-len(self._queued) // len(room))
        for runner in room:
            count = min(share, self._credit(runner) - len(runner.tasks))
            if self.tasks_at_most is not None:
                count = min(count, self.tasks_at_most - runner.given)
            if given := self._take(runner, count):
                runner.given += len(given)
                runner.spent = runner.given == self.tasks_at_most
                runner.retiring = runner.retiring or runner.spent
                if runner.head is None:
                    runner.head_since = self._now
                runner.tasks.update((task.task_id, task) for task in given)
                self._effects.append(Give(runner.job_id, given))

    def _take(self, runner: Runner, count: int) -> list[Task]:
        given: list[Task] = []
        while len(given) < count and (task := self._next()) is not None:
            if not task.retries and (given or runner.tasks):
                break  # behind another task, whether a task that must not run twice had begun could not be told
            self._queues[task.priority].popleft()
            del self._queued[task.task_id]
            given.append(task)
            if not task.retries:
                break
        return given

    def _credit(self, runner: Runner) -> int:
        """How many tasks may be in flight on a runner."""
        head = runner.head
        if head is not None and not head.retries:
            return 0
        if self.mean_s is None:
            return 1
        return max(1, min(IN_FLIGHT_AT_MOST, 1 + int(PREFETCH_S / max(self.mean_s, 1e-6))))

    def _recall(self, runner: Runner) -> None:
        waiting = tuple(runner.tasks)[1:]
        if waiting and not runner.recalling:
            runner.recalling = True
            self._effects.append(Recall(runner.job_id, waiting))

    # Time

    def _timers(self) -> Iterator[tuple[float, Timer, Runner | None]]:
        """Everything that time alone brings about, and when."""
        if self._delayed:
            yield self._delayed[0][0], "retry", None
        idle: bool | None = None  # computed once a runner has tasks behind its head: every event comes here
        for runner in self.runners.values():
            if not runner.tasks:
                continue
            if runner.verdict is None and (head := runner.head) is not None and head.timeout_s is not None:
                yield runner.head_since + head.timeout_s, "timeout", runner
            if len(runner.tasks) > 1 and not runner.recalling:
                idle = self.has_idle if idle is None else idle
                if idle:
                    yield runner.head_since + RECALL_AFTER_S, "recall", runner

    def _expire(self) -> None:
        for _, timer, runner in [found for found in self._timers() if found[0] <= self._now]:
            if runner is None:
                self._retry()
            elif timer == "recall":
                self._recall(runner)
            elif (head := runner.head) is not None:
                runner.verdict = "timeout", f"it did not end within {head.timeout_s:g} s, and its runner was ended"
                self._effects.append(EndRunner(runner.job_id, kill=True))

    def _retry(self) -> None:
        while self._delayed and self._delayed[0][0] <= self._now:
            _, task_id, task = heappop(self._delayed)
            if self._queued.get(task_id) is task:
                self._queue(task, first=True)
        self._dispatch()
