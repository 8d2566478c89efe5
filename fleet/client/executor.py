"""`fleet.Executor`: a concurrent.futures.Executor whose processes are slots of this machine, or of a cluster.

The caller's thread pickles a call. The thread of the Executor does nearly all else, see executor_thread.py.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor as AnyExecutor
from concurrent.futures import Future
from concurrent.futures import as_completed as _as_completed
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict, TypeVar, Unpack

from fleet import config, pickling
from fleet.client.caller_code import cluster_place
from fleet.client.executor_thread import ExecutorThread
from fleet.client.local_cluster import local_place
from fleet.client.pending_tasks import TaskOptions
from fleet.client.target import cluster_target
from fleet.errors import UsageError
from fleet.values import JobOptions
from fleet.versions import versions

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

T = TypeVar("T")
P = ParamSpec("P")

PENDING_TASKS = 10_000
MAX_BUNDLE = 64  # MB
_open: weakref.WeakSet[ExecutorThread] = weakref.WeakSet()  # a running thread keeps its object


class SomeOptions(TypedDict, total=False):
    """Fields of TaskOptions that differ from the Executor's."""

    retries: int
    timeout: float | None
    priority: int


class View(AnyExecutor):
    """The calls of an Executor, with options of their own for the tasks. Shutting down a view shuts down nothing."""

    def __init__(self, executor: Executor, options: TaskOptions) -> None:
        self._executor = executor  # which ends without a reference to it
        self._thread: ExecutorThread = executor._thread
        self._options = options

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future of fn(*args, **kwargs). Raises UsageError where it cannot be pickled, RuntimeError after shutdown."""
        return self._thread.submit(fn, args, kwargs, self._options)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Results of calls in order, as with concurrent.futures; `chunksize` calls are one task.

        The arguments are read at once, or, with `buffersize`, while at most so many tasks have a result that was not taken.
        """
        if chunksize < 1:
            raise UsageError(f"chunksize is {chunksize}: it must be at least 1")
        if buffersize is not None and buffersize < 1:
            raise UsageError(f"buffersize is {buffersize}: it must be None (no limit) or at least 1")
        calls = zip(*iterables, strict=False)
        if chunksize == 1:
            return _results((self.submit(fn, *args) for args in calls), timeout, buffersize)
        chunks = iter(lambda: list(islice(calls, chunksize)), [])
        futures = (self.submit(pickling.call_each, fn, chunk) for chunk in chunks)
        results: Iterator[list[T]] = _results(futures, timeout, buffersize)
        return chain.from_iterable(results)


class Executor(View):
    """Runs calls in `max_workers` processes: on this machine, or on the cluster at `addr` (else ORCHESTRATOR_ADDR).

    `max_workers` is by default the number of cores, on a cluster that of its slots. Each process takes `slots` slots and
    `gpus` GPUs of its worker, until the Executor is shut down. `priority` orders its processes among the cluster's jobs, and
    its tasks among each other. A task that loses its process is run again, `retries` times at most: 0 is for a task that
    must never run twice. After `timeout` seconds of running, its process is ended and its future raises TimeoutError.
    An exception of the task is never retried: the future raises it, with the remote traceback as its cause.

    As with ProcessPoolExecutor, the first argument may be `max_workers`; each process calls `initializer(*initargs)` before all
    tasks, and no task is run where that raises; a process is replaced after `max_tasks_per_child` tasks. `mp_context` may be
    one that does not fork.

    On a cluster the folder of the caller's script travels to the workers, `max_bundle` MB (2^20 bytes) at most.
    With `dashboard` an Executor of this machine serves a page, at the address `page_at`, until it is shut down.
    `submit` waits while `max_pending` tasks or 256 MB of arguments are unfinished. No `if __name__ == "__main__"` is needed.
    Raises ConfigError where the cluster does not answer within `connect_timeout` seconds, UsageError for bad arguments.
    """

    def __init__(
        self,
        addr: str | int | None = None,
        *,
        max_workers: int | None = None,
        mp_context: BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks_per_child: int | None = None,
        retries: int = 2,
        timeout: float | None = None,
        priority: int = 0,
        slots: int = 1,
        gpus: int = 0,
        max_pending: int = PENDING_TASKS,
        name: str = "executor",
        insecure: bool = False,
        connect_timeout: float = 60.0,
        max_bundle: int = MAX_BUNDLE,
        dashboard: bool = False,
    ) -> None:
        if isinstance(addr, int):
            if max_workers is not None:
                raise UsageError(f"max_workers is given twice: {addr}, and {max_workers}")
            addr, max_workers = None, addr
        if max_workers is not None and max_workers < 1:
            raise UsageError(f"max_workers is {max_workers}: an Executor needs at least one process")
        _check(max_tasks_per_child, initializer, mp_context)
        if slots < 1 or gpus < 0 or max_pending < 1:
            raise UsageError("slots and max_pending must be at least 1, gpus at least 0")
        self._options = TaskOptions(retries, timeout, priority)
        address = addr or config.orchestrator_address()
        python = "" if address is None else versions().python_minor
        options = JobOptions(name=name, priority=priority, max_restarts=0, slots=slots, gpus=gpus, python=python)
        if address is None:
            count = max_workers or config.usable_cores()
            cluster = local_place(count * slots, gpus * count, dashboard)
        elif dashboard:
            raise UsageError("a cluster has its page in any case: `fleet dashboard` prints the address")
        else:
            count = max_workers or 0
            cluster = cluster_place(cluster_target(address, None, insecure, connect_timeout), max_bundle << 20)
        with ExitStack() as stack:
            place = stack.enter_context(cluster)
            self.page_at = place.page_at
            if dashboard:
                print(f"fleet: the page is at {self.page_at}", file=sys.stderr)
            self._thread = ExecutorThread(
                place, options, count, max_pending, max_tasks_per_child, initializer, initargs, stack.pop_all()
            )
        _open.add(self._thread)
        try:
            self._thread.start()
        except KeyboardInterrupt:
            self._thread.finish(True, abandon=True)
            raise
        # The thread does not hold this object: once that is dropped, the thread ends when its futures are done.
        weakref.finalize(self, self._thread.drop).atexit = False

    def options(self, **options: Unpack[SomeOptions]) -> View:
        """The same processes, with other options for the tasks: pool.options(retries=0, timeout=None).submit(pay, 100)."""
        return View(self, replace(self._options, **options))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No more tasks are taken; with `wait`, returns when all have ended and every process is gone."""
        self._thread.finish(cancel_futures)
        if wait:
            self._thread.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _end(self._thread, kind)


def as_completed(
    futures: Iterable[Future[T]], timeout: float | None = None, progress: bool | str = False
) -> Iterator[Future[T]]:
    """Futures as they end. `progress` shows a bar, named by a text, where stderr is a terminal or this is a notebook."""
    wanted = list(futures)
    ended = _as_completed(wanted, timeout)
    if not progress:
        return ended
    from fleet.client.progress_bar import with_progress  # with the names of all characters in HTML

    return with_progress(ended, progress if isinstance(progress, str) else "tasks", len(set(wanted)))


def _check(max_tasks: int | None, initializer: object, context: BaseContext | None) -> None:
    """Raises UsageError for what no process of an Executor can do."""
    if max_tasks is not None and max_tasks < 1:
        raise UsageError(f"max_tasks_per_child is {max_tasks}: it must be None (no limit) or at least 1")
    if initializer is not None and not callable(initializer):
        raise UsageError(f"initializer is {initializer!r}, which cannot be called")
    if context is not None and context.get_start_method() == "fork":
        raise UsageError(
            "processes of an Executor are never forks of this one, which mp_context asks for: they inherit none of its "
            "memory; give them what they need by initializer and initargs"
        )


def _results(submitted: Iterator[Future[T]], timeout: float | None, at_once: int | None) -> Iterator[T]:
    """Results in order. Tasks that are left are cancelled when one raises or times out, and when the iterator is closed."""
    deadline = None if timeout is None else monotonic() + timeout
    futures = deque(islice(submitted, at_once))

    def each() -> Iterator[T]:
        try:
            while futures:
                left_s = None if deadline is None else deadline - monotonic()
                result = futures.popleft().result(left_s)
                if at_once is not None:
                    futures.extend(islice(submitted, 1))
                yield result
                del result
        finally:
            for future in futures:
                future.cancel()

    return each()


def _end(thread: ExecutorThread, kind: type[BaseException] | None) -> None:
    """After Ctrl-C at once, with all that runs; else once everything is done, as the standard library's executors."""
    thread.finish(False, abandon=kind is not None and issubclass(kind, KeyboardInterrupt))
    thread.join()


def _end_all() -> None:
    """Before the interpreter ends, perhaps with an error that nobody caught."""
    for thread in list(_open):
        _end(thread, getattr(sys, "last_type", None))


threading._register_atexit(_end_all)  # type: ignore[attr-defined]
