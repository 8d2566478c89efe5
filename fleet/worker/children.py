"""Child processes of an agent: starts, pipes, signals and ends of its ranks. Decides nothing."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from signal import SIGKILL
from time import monotonic

from fleet.bus.descriptors import left
from fleet.bus.poller import Poller, Source
from fleet.worker.guard import Guard
from fleet.worker.output_window import Stream
from fleet.worker.progress import last_task
from fleet.worker.rank_process import Plan
from fleet.worker.state import AttemptKey, Event, Key, Printed, ProcessExited, ReadOutput, SignalGroup, Spawned
from fleet.worker.usage import oom_kill_count
from fleet.worker.zygote import Child, Zygote

READ_BYTES = 64 << 10
# Descriptors for the start of a rank, and for its connections, which come later. libzmq aborts a process without any left.
FILES_TO_START, FILES_OF_A_RANK = 7, 2
# In one turn of the loop. Starting hundreds of ranks on a busy machine takes seconds, in which heartbeats are due.
START_FOR_S = 0.5

log = logging.getLogger("fleet.worker")


class Children:
    """Registers pipes and sentinels at `poller`. `control` is the endpoint at which ranks reach the agent."""

    def __init__(self, zygote: Zygote, poller: Poller, control: str) -> None:
        self._zygote = zygote
        self._poller = poller
        self._control = control
        self._guard = Guard()
        self._children: dict[Key, tuple[Child, int]] = {}  # with the number of out-of-memory kills before the start
        self._readers: dict[int, tuple[Key, Stream]] = {}  # by descriptor of an open pipe
        self._sentinels: dict[int, Key] = {}
        # To be started in turns to come. A wait for the zygote, or for many of its forks, would hold up the heartbeats.
        self._waiting: deque[tuple[Key, Plan, int | None]] = deque()
        self._imported = False  # the zygote has done its imports
        self._starting_s = 0.0  # of this turn, for starts
        poller.add(zygote.fileno())

    def start(self, key: Key, plan: Plan, stdin: int | None) -> list[Event]:
        """Starts a process, at once or later. Answered by Spawned, or by ProcessExited if it cannot be started."""
        if self._imported and not self._waiting and self._starting_s < START_FOR_S:
            return [self._start(key, plan, stdin)]
        self._waiting.append((key, plan, stdin))
        return []

    @property
    def has_more(self) -> bool:
        """Whether `take` has processes to start, whatever is ready."""
        return self._imported and bool(self._waiting)

    def take(self, ready: Iterable[Source]) -> Iterator[Event]:
        """The events of the descriptors that are ready. Output comes before exits: the last output of a rank is read first."""
        if not self._imported and self._zygote.fileno() in ready:
            self._poller.remove(self._zygote.fileno())
            self._imported = True
        self._starting_s = 0.0
        while self.has_more and self._starting_s < START_FOR_S:
            yield self._start(*self._waiting.popleft())
        for descriptor in [source for source in ready if source in self._readers]:
            yield from self._read(descriptor)
        for sentinel in [source for source in ready if source in self._sentinels]:
            yield self._reap(sentinel)

    def signal(self, effect: SignalGroup) -> list[Event]:
        reaped = effect.key not in self._children
        done = signal_group(effect.pid, effect.signal, with_leader=not reaped)
        if effect.signal != SIGKILL:
            return []
        if reaped:
            self._guard.release(effect.pid)
        elif not done:
            self._drop(effect.key)
            reason = f"it runs as another user now (pid {effect.pid}): its worker cannot end it, and it may run on"
            log.warning("rank %d of job %s: %s", effect.key[2], effect.key[0], reason)
            return [ProcessExited(effect.key, 1, 0, False, reason=reason)]
        return []

    def forward(self, number: int) -> None:
        """Sends a signal to every rank, not to the children of ranks."""
        for child, _ in self._children.values():
            signal_process(child.pid, number)

    def read(self, effect: ReadOutput) -> None:
        for descriptor, (key, _) in self._readers.items():
            if key == effect.key:
                if effect.on:
                    self._poller.add(descriptor)
                else:
                    self._poller.remove(descriptor)

    def remove(self, attempt: AttemptKey) -> None:
        """Closes the pipes of an attempt. Processes of it that wait for their start are not started."""
        for descriptor in [d for d, (key, _) in self._readers.items() if key[:2] == attempt]:
            self._close(descriptor)
        self._waiting = deque(one for one in self._waiting if one[0][:2] != attempt)

    def close(self) -> None:
        """Kills all ranks and the processes that they have started."""
        for child, _ in self._children.values():
            signal_group(child.pid, SIGKILL, with_leader=True)
        self._guard.close()
        for descriptor in self._readers:
            os.close(descriptor)

    def _start(self, key: Key, plan: Plan, stdin: int | None) -> Event:
        oom_kills_before, begun = oom_kill_count(), monotonic()
        try:
            if left() < FILES_TO_START + FILES_OF_A_RANK * (len(self._children) + 1):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            child = self._zygote.spawn(plan, stdin)
        except (OSError, EOFError) as error:
            log.error("rank %d of job %s cannot be started: %s", key[2], key[0], error)
            return ProcessExited(key, 1, 0, False, reason=f"its worker cannot start it: {error}")
        finally:
            self._starting_s += monotonic() - begun
        self._guard.watch(child.pid)
        self._children[key] = child, oom_kills_before
        self._sentinels[child.sentinel] = key
        self._readers[child.stdout], self._readers[child.stderr] = (key, "stdout"), (key, "stderr")
        for descriptor in (child.sentinel, child.stdout, child.stderr):
            self._poller.add(descriptor)
        return Spawned(key, child.pid)

    def _read(self, descriptor: int) -> Iterator[Event]:
        key, stream = self._readers[descriptor]
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._close(descriptor)
        yield Printed(key, stream, data)

    def _reap(self, sentinel: int) -> Event:
        key = self._sentinels[sentinel]
        child, oom_kills_before = self._children[key]
        code, signal = child.status()
        self._drop(key)
        out_of_memory = signal == SIGKILL and oom_kill_count() > oom_kills_before
        return ProcessExited(key, code, signal, out_of_memory, last_task(self._control, key[0], key[2]))

    def _drop(self, key: Key) -> None:
        sentinel = self._children.pop(key)[0].sentinel
        self._poller.remove(sentinel)
        del self._sentinels[sentinel]
        os.close(sentinel)

    def _close(self, descriptor: int) -> None:
        with contextlib.suppress(KeyError):
            self._poller.remove(descriptor)  # not there while a reader is paused
        del self._readers[descriptor]
        os.close(descriptor)


def signal_group(pid: int, number: int, with_leader: bool) -> bool:
    """Signals the process group that a rank leads. False: the rank runs as another user, and may not be signalled.

    `with_leader`: the rank has not been reaped. A rank that does not lead a group yet is signalled alone. Without it, another
    process may have the number by now, so only the group is signalled.
    """
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return not with_leader or signal_process(pid, number)
    except PermissionError:  # of each process in the group
        return False
    return not with_leader or signal_process(pid, 0)


def signal_process(pid: int, number: int) -> bool:
    """Signals a process; 0 only asks. False: the process runs as another user. A process that has ended is no error: its parent
    may have reaped it before this process is told."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return True
