"""An Executor's decisions: which task goes to which runner, when it is tried again or given up. Pure.

`step(event, now) -> effects`, as the other cores. A runner is a job of one rank; a task is a number here, its function and
arguments are the shell's. Runners are given a little more than they can do at once, so that they never wait for the way
from here: as many short tasks as take PREFETCH_S, but nothing behind a task that must not run twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal

PREFETCH_S = 0.01
IN_FLIGHT_AT_MOST = 64
RECALL_AFTER_S = 0.02  # of a task that keeps others waiting while another runner has nothing to do
BACKOFF_S, BACKOFF_AT_MOST_S = 0.1, 10.0  # after the second attempt that lost its runner, doubled with each further one
STILLBORN_AT_MOST = 3  # runners in a row that end before they are ready

Timer = Literal["retry", "timeout", "recall"]
Why = Literal["lost", "timeout", "no runner"]


@dataclass(slots=True)
class Task:
    """Invariant: it is in the queue, delayed, or in flight on one runner, until it is settled."""

    task_id: int
    priority: int = 0
    retries: int = 2  # after the loss of a runner
    timeout_s: float | None = None  # from when it begins
    attempts: int = 0  # that lost their runner
    history: tuple[str, ...] = ()


@dataclass
class Runner:
    """`tasks` are in flight, in the order in which it makes the calls."""

    job_id: str
    ready: bool = False
    retiring: bool = False  # its worker drains: it finishes what it has begun
    tasks: dict[int, Task] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)  # of them: their results are on the way here
    given: int = 0  # tasks in its life
    spent: bool = False  # it was given all that it may have, and retires
    head_since: float = 0.0  # when the first of them can have begun
    recalling: bool = False
    where: str = ""  # worker and pid, for a person
    verdict: tuple[Why, str] | None = None  # why it is being ended, for its first task

    @property
    def head(self) -> Task | None:
        if not self.ended:
            return next(iter(self.tasks.values()), None)
        return next((task for task_id, task in self.tasks.items() if task_id not in self.ended), None)


# Events


@dataclass(frozen=True)
class Began:
    """Runners may be asked for: so many."""

    size: int


@dataclass(frozen=True)
class Submitted:
    tasks: list[Task]


@dataclass(frozen=True)
class Cancelled:
    """By whoever submitted them; those that have begun are not affected."""

    task_ids: list[int]


@dataclass(frozen=True)
class RunnerReady:
    """It is there, perhaps again; `holds` are the tasks that it has and has not ended."""

    job_id: str
    where: str
    holds: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    """Results that arrived from one runner, with the seconds that each took."""

    job_id: str
    seconds: dict[int, float]


@dataclass(frozen=True)
class Arriving:
    """Results whose large buffers are still on their way, with the seconds that each task took."""

    job_id: str
    seconds: dict[int, float]


@dataclass(frozen=True)
class GivenBack:
    """Tasks that a runner had not begun."""

    job_id: str
    task_ids: tuple[int, ...]


@dataclass(frozen=True)
class NotGiven:
    """Tasks that were cancelled before they could be given to a runner."""

    job_id: str
    task_ids: tuple[int, ...]


@dataclass(frozen=True)
class RunnerRetires:
    job_id: str


@dataclass(frozen=True)
class RunnerEnded:
    job_id: str
    reason: str
    task_id: int = 0  # that it was in, where that is known


@dataclass(frozen=True)
class Tick:
    pass


Event = (
    Began
    | Submitted
    | Cancelled
    | RunnerReady
    | Finished
    | Arriving
    | GivenBack
    | NotGiven
    | RunnerRetires
    | RunnerEnded
    | Tick
)


# Effects


@dataclass(frozen=True)
class AskRunner:
    """Submit a job for a further runner."""


@dataclass(frozen=True)
class Give:
    job_id: str
    tasks: list[Task]


@dataclass(frozen=True)
class Recall:
    job_id: str
    task_ids: tuple[int, ...]


@dataclass(frozen=True)
class EndRunner:
    job_id: str
    kill: bool


@dataclass(frozen=True)
class Fail:
    """The task is settled without a result."""

    task: Task
    why: Why
    text: str


Effect = AskRunner | Give | Recall | EndRunner | Fail


@dataclass
class TaskScheduler:
    """One Executor's tasks and runners."""

    tasks_at_most: int | None = None  # of one runner, which then ends
    runners: dict[str, Runner] = field(default_factory=dict)
    mean_s: float | None = None  # of what tasks take, the last ones counting most
    _queues: dict[int, deque[Task]] = field(default_factory=dict)  # by priority
    _delayed: list[tuple[float, int, Task]] = field(default_factory=list)
    _queued: dict[int, Task] = field(default_factory=dict)  # what is queued or delayed, by number
    _stillborn: int = 0
    _missing: int = 0  # runners that were not asked for again
    _effects: list[Effect] = field(default_factory=list)
    _now: float = 0.0

    def step(self, event: Event, now: float) -> list[Effect]:
        """What to do about one event."""
        self._effects, self._now = [], now
        if isinstance(event, Submitted):
            for task in event.tasks:
                self._queue(task)
            while self._missing:
                self._missing, self._stillborn = self._missing - 1, 0
                self._ask()
        elif isinstance(event, Finished):
            self._finished(event)
        elif isinstance(event, Began):
            self._effects += [AskRunner()] * event.size
        elif isinstance(event, Cancelled):
            for task_id in event.task_ids:
                self._queued.pop(task_id, None)
        elif isinstance(event, RunnerReady):
            self._ready(event)
        elif isinstance(event, Arriving):
            self._arriving(event)
        elif isinstance(event, GivenBack | NotGiven):
            self._not_begun(event)
        elif isinstance(event, RunnerRetires):
            self._retires(event.job_id)
        elif isinstance(event, RunnerEnded):
            self._ended(event)
        self._dispatch()
        self._expire()
        return self._effects

    def next_deadline(self) -> float | None:
        """When to send a Tick if nothing else happens."""
        return min((at for at, _, _ in self._timers()), default=None)

    def joined(self, job_id: str) -> None:
        """The job of a runner that was asked for has this id."""
        self.runners[job_id] = Runner(job_id)

    @property
    def has_idle(self) -> bool:
        """Whether a runner has nothing to do, and nothing waits for it."""
        if self._queued:
            return False
        return any(r.ready and not r.tasks and not r.retiring and r.verdict is None for r in self.runners.values())

    @property
    def has_room(self) -> bool:
        """Whether a further task may be given to a runner now, or have one asked for."""
        if self._missing:
            return True
        room = (r for r in self.runners.values() if r.ready and not r.retiring and r.verdict is None)
        return any(len(runner.tasks) < self._credit(runner) for runner in room)

    @property
    def task_count(self) -> int:
        return len(self._queued) + sum(len(runner.tasks) for runner in self.runners.values())

    # Runners

    def _ask(self) -> None:
        self._effects.append(AskRunner())

    def _ready(self, event: RunnerReady) -> None:
        runner = self.runners.get(event.job_id)
        if runner is None:
            return
        self._stillborn = 0
        runner.ready, runner.where, runner.recalling = True, event.where, False
        # After a lost connection: what it does not hold is on its way back as a result, or never reached it.
        lost = [task for task_id, task in runner.tasks.items() if task_id not in event.holds]
        held = [runner.tasks[task_id] for task_id in event.holds if task_id in runner.tasks]
        runner.tasks = {task.task_id: task for task in [*held, *lost]}
        if lost:
            self._effects.append(Give(event.job_id, lost))

    def _retires(self, job_id: str) -> None:
        runner = self.runners.get(job_id)
        if runner is None or runner.retiring:
            return
        runner.retiring = True
        self._recall(runner)
        self._ask()  # elsewhere
        self._end_if_retired(runner)

    def _end_if_retired(self, runner: Runner) -> None:
        if runner.retiring and not runner.tasks:
            self._effects.append(EndRunner(runner.job_id, kill=False))

    def _ended(self, event: RunnerEnded) -> None:
        runner = self.runners.pop(event.job_id, None)
        if runner is None:
            return
        if not runner.ready:
            self._stillborn += 1
        if self._stillborn >= STILLBORN_AT_MOST:
            self._missing += 1  # until somebody wants something again
        elif not runner.retiring or runner.spent:
            self._ask()
        # Of those before the one that it was in the results were lost, those after it had not begun.
        cause = runner.tasks.get(event.task_id, runner.head)
        for task in reversed(runner.tasks.values()):
            if task is not cause and task.retries:
                self._queue(task, first=True)
        for task in list(runner.tasks.values()):
            if task is cause or not task.retries:  # what may not run twice may have run
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
        queue = self._queues.setdefault(task.priority, deque())
        if first:
            queue.appendleft(task)
        else:
            queue.append(task)

    def _next(self) -> Task | None:
        """The task whose turn it is, still queued: what was cancelled is dropped on the way."""
        while self._queues:
            priority = max(self._queues) if len(self._queues) > 1 else next(iter(self._queues))
            queue = self._queues[priority]
            while queue:
                if self._queued.get(queue[0].task_id) is queue[0]:
                    return queue[0]
                queue.popleft()
            del self._queues[priority]
        return None

    def _finished(self, event: Finished) -> None:
        runner = self.runners.get(event.job_id)
        if runner is None:
            return
        head = runner.head
        for task_id, seconds in event.seconds.items():
            if runner.tasks.pop(task_id, None) is not None:
                self._took(runner, task_id, seconds)
                runner.ended.discard(task_id)
        self._next_head(runner, head)
        self._end_if_retired(runner)

    def _arriving(self, event: Arriving) -> None:
        runner = self.runners.get(event.job_id)
        if runner is None:
            return
        head = runner.head
        for task_id, seconds in event.seconds.items():
            if task_id in runner.tasks:
                self._took(runner, task_id, seconds)
                runner.ended.add(task_id)
        self._next_head(runner, head)

    def _took(self, runner: Runner, task_id: int, seconds: float) -> None:
        if task_id not in runner.ended:
            self.mean_s = seconds if self.mean_s is None else 0.9 * self.mean_s + 0.1 * seconds

    def _next_head(self, runner: Runner, before: Task | None) -> None:
        if runner.head is not before:
            runner.head_since = self._now

    def _not_begun(self, event: GivenBack | NotGiven) -> None:
        runner = self.runners.get(event.job_id)
        if runner is None:
            return
        head = runner.head
        for task_id in reversed(event.task_ids):
            task = runner.tasks.pop(task_id, None)
            if task is not None:
                runner.given -= 1
                if isinstance(event, GivenBack):
                    self._queue(task, first=True)
        runner.recalling = runner.recalling and isinstance(event, NotGiven)
        self._next_head(runner, head)
        self._end_if_retired(runner)

    def _dispatch(self) -> None:
        if not self._queued:
            return
        room = [r for r in self.runners.values() if r.ready and not r.retiring and r.verdict is None]
        room = [runner for runner in room if len(runner.tasks) < self._credit(runner)]
        if not room:
            return
        room.sort(key=lambda runner: len(runner.tasks))
        share = -(-len(self._queued) // len(room))
        for runner in room:
            count = min(share, self._credit(runner) - len(runner.tasks))
            if self.tasks_at_most is not None:
                count = min(count, self.tasks_at_most - runner.given)
            given = self._take(runner, count)
            if given:
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
                break  # what must not run twice waits behind nothing, or one could not tell whether it had begun
            self._queues[task.priority].popleft()
            del self._queued[task.task_id]
            given.append(task)
            if not task.retries:
                break
        return given

    def _credit(self, runner: Runner) -> int:
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
        idle = not self._queued and any(r.ready and not r.tasks and not r.retiring for r in self.runners.values())
        for runner in self.runners.values():
            head = runner.head
            if head is not None and head.timeout_s is not None and runner.verdict is None:
                yield runner.head_since + head.timeout_s, "timeout", runner
            if idle and len(runner.tasks) > 1 and not runner.recalling:
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
