"""Task runner: a process that makes the calls of an Executor, one after the other, and sends back their results.

The main thread makes the calls, and owns the socket between them, so that a short task waits for no other thread. During a long
call an attendant thread owns the socket, so that the client can take calls back and fetch results. The messages are those of
fleet/tasks.py.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import threading
import traceback
from collections import OrderedDict, deque
from time import monotonic, sleep
from typing import Any

from fleet import config, pickling, tasks
from fleet import messages as m
from fleet.bus.blobs import Blob, BlobReader, Shelf
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Dealer, Sent
from fleet.bus.knock import endpoint_of, knock
from fleet.bus.lock import Lock
from fleet.bus.poller import DescriptorPoller
from fleet.bus.shared_memory import host_key
from fleet.errors import ProtocolError
from fleet.large_buffers import LargeBuffers
from fleet.worker.progress import UNKNOWN, Progress

ATTEND_EVERY_S = 0.02
SEND_AFTER_S, SEND_FROM_BYTES = 0.001, 64 << 10  # results of short calls are sent together
QUIET_AFTER_S = 1.0  # without work: then the attendant sleeps too
TEXT_CHARS = 16 << 10  # at the end of a traceback


def serve(direct: str) -> None:
    """Returns when its client needs it no more. `direct` is that client's door; empty: it is reached by the relay."""
    settings = config.rank_settings()
    assert settings is not None, "a runner is started by an agent"
    if settings.world_size == 1:
        config.leave_job()
    try:
        TaskRunner(settings, direct).run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # threads of tasks cannot hold this process up


class TaskRunner:
    """The lock guards the socket and the queues. The main thread holds it, except during a call."""

    def __init__(self, settings: config.RankSettings, direct: str) -> None:
        self._pid = os.getpid()
        self._head = m.relay_head(settings.job_id, settings.member_id)
        name = f"{settings.job_id}/runner/{settings.member_id}/{self._pid}"
        self._bus = Bus(Lock())
        endpoint = endpoint_of(direct, settings.job_id) if direct else settings.control
        self._dealer = Dealer(self._bus, endpoint, name.encode(), listens=bool(direct))
        if direct:
            knock(direct, settings.job_id)
        self._watch = DescriptorPoller(self._dealer.descriptors())
        if not direct:
            self._dealer.send(m.encode(m.RankHello(settings.job_id, settings.attempt, settings.member_id, self._pid)))
        directory = config.shared_memory()
        self._shelf = Shelf(directory if directory is not None and host_key(directory) else None)
        self._arguments = LargeBuffers("the argument", BlobReader(), self._say)
        self._memory = host_key(directory) if directory is not None else ""
        self._progress = Progress(settings.control, settings.job_id, settings.member_id)
        self._lock = threading.Lock()
        self._active = threading.Event()  # set while there is work, and for a moment after
        self._active.set()  # work may come before this process waits for the first time
        self._waiting: deque[tasks.Call] = deque()
        self._running: tasks.Call | None = None
        self._interrupted = 0  # the last call that was
        self._functions = pickling.Functions()
        self._function_of: dict[int, pickling.Function] = {}  # by the number of each task that waits
        self._kept: OrderedDict[int, tasks.Result] = OrderedDict()  # sent, and not known to have arrived
        self._unsent: list[tasks.Result] = []
        self._unsent_bytes, self._unsent_since = 0, 0.0
        self._blobs: dict[tuple[int, int], Blob] = {}  # of results, by task and index
        self._leaving = False
        self._dropped_count = 0  # malformed messages
        self._streams = sys.stdout, sys.stderr  # tasks may replace those in sys
        self._behind = False  # a message was lost

    def run(self) -> None:
        threading.Thread(target=self._attend, name="fleet-attendant", daemon=True).start()
        self._lock.acquire()
        self._ready()
        while not self._leaving or self._waiting or self._unsent:
            self._turn(wait=not self._waiting and not self._unsent)
            if self._waiting and self._arguments.are_here(self._waiting[0].task_id):
                self._call(self._waiting.popleft())
            elif self._waiting:
                self._send_results()
                if not self._dealer.has_event():
                    self._watch.wait(QUIET_AFTER_S)
            else:
                self._send_results()
        self._progress.begin(UNKNOWN)
        self._shelf.close()
        self._bus.close()

    def _attend(self) -> None:
        seen: tasks.Call | None = None
        while True:
            self._active.wait()
            sleep(ATTEND_EVERY_S)
            running = self._running
            if running is not None and running is seen and self._lock.acquire(blocking=False):
                try:
                    if self._running is not None:
                        self._turn(wait=False)
                        self._send_results()
                finally:
                    self._lock.release()
            seen = running

    # The socket

    def _turn(self, wait: bool) -> None:
        """Takes all messages that have arrived. With `wait`, there is at least one."""
        while True:
            arrived = self._dealer.receive()
            for message in arrived:
                self._take(message)
            # After `receive`, which notices that there is a connection, or room in its queue.
            if self._behind:  # sends all that matters again, as in answer to Sync
                self._behind = False
                self._say_all()
                self._send_results()
            if arrived or not wait:
                return
            self._dealer.changes()
            if not self._watch.wait(QUIET_AFTER_S) and not self._behind:
                self._active.clear()
                self._watch.wait(None)
            self._active.set()

    def _take(self, arrived: Arrived) -> None:
        if m.relayed(arrived.data) is None or not arrived.rest:
            return  # of the agent itself
        try:
            said = tasks.decode(arrived.rest[0].buffer)
        except ProtocolError as error:
            self._dropped_count += 1
            if self._dropped_count & (self._dropped_count - 1) == 0:  # the 1st, 2nd, 4th, ...
                print(
                    f"fleet: {self._dropped_count} messages were dropped, the last one since it is {error}",
                    file=sys.stderr,
                )
            return
        if isinstance(said, tasks.MakeCalls):
            self._forget(said.arrived)
            self._take_calls(said)
        elif isinstance(said, tasks.ReturnCalls):
            back = set(said.task_ids)
            given = tuple(call.task_id for call in self._waiting if call.task_id in back)
            self._waiting = deque(call for call in self._waiting if call.task_id not in back)
            self._arguments.drop(given)
            for task_id in given:
                self._function_of.pop(task_id, None)
            self._say(tasks.CallsReturned(given))
        elif isinstance(said, tasks.Interrupt):
            running = self._running
            if running is not None and running.task_id == said.task_id != self._interrupted:
                self._interrupted = said.task_id
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        elif isinstance(said, tasks.Leave):
            self._leaving = True
        elif isinstance(said, tasks.Sync):
            self._say_all()
        elif isinstance(said, tasks.ReadBuffer):
            blob = self._blobs.get((said.task_id, said.index))
            data = blob.piece(said.offset, tasks.PIECE_BYTES) if blob is not None else b""
            self._say(tasks.BufferPiece(said.task_id, said.index, said.offset), data)
        elif isinstance(said, tasks.BufferPiece) and len(arrived.rest) == 2:
            self._arguments.piece(said, arrived.rest[1].buffer)

    def _take_calls(self, said: tasks.MakeCalls) -> None:
        known = {call.task_id for call in self._waiting} | self._kept.keys()
        known |= {self._running.task_id} if self._running else set()
        missing = False
        for call in said.calls:
            function = self._functions.get(call.function) if call.function else None
            if call.function and function is None:
                pickled = said.functions.get(call.function)
                if pickled is None:
                    missing = True  # the message with the function was lost with a connection
                    continue
                function = pickling.Function(call.function, pickled)
                self._functions.add(function)
            if call.task_id not in known:
                if function is not None:
                    self._function_of[call.task_id] = function
                self._waiting.append(call)
                self._arguments.expect(call.task_id, call.buffers)
        if missing:
            self._ready()

    def _say(self, said: tasks.TaskMessage, piece: bytes | None = None) -> None:
        body = [tasks.encode(said)] if piece is None else [tasks.encode(said), piece]
        if self._dealer.send(self._head, body) is Sent.FULL:
            self._behind = True

    def _say_all(self) -> None:
        """Sends again what the runner holds, all results that are kept, and the questions for missing pieces."""
        self._ready()
        self._unsent, self._unsent_bytes = list(self._kept.values()), 0
        self._arguments.ask_again()

    def _ready(self) -> None:
        held = ([self._running] if self._running else []) + list(self._waiting)
        python = platform.python_version()
        self._say(tasks.Ready(self._memory, python, self._pid, tuple(call.task_id for call in held)))

    def _send_results(self) -> None:
        if self._unsent:
            self._say(tasks.Results(tuple(self._unsent)))
            self._unsent, self._unsent_bytes = [], 0

    def _forget(self, task_ids: tuple[int, ...]) -> None:
        for task_id in task_ids:
            result = self._kept.pop(task_id, None)
            for index in range(len(result.buffers) if result else 0):
                if (blob := self._blobs.pop((task_id, index), None)) is not None:
                    blob.release()

    # A call

    def _call(self, call: tasks.Call) -> None:
        self._running = call
        self._progress.begin(call.task_id)
        started = monotonic()
        try:
            function, args, kwargs = self._prepared(call)
            with contextlib.suppress(Exception):  # a name for people to read fails no task
                self._progress.calls(args[0] if function is pickling.call_each else function)
            self._lock.release()
            try:
                value = function(*args, **kwargs)
            finally:
                if os.getpid() != self._pid:
                    os._exit(0)  # the call has forked, and the child has returned from it: it is no second runner
                self._lock.acquire()
            result = self._succeeded(call.task_id, value, monotonic() - started)
        except BaseException as error:
            result = self._failed(call.task_id, error, monotonic() - started)
        self._running = None
        self._progress.end()
        self._kept[call.task_id] = result
        if not self._unsent:
            self._unsent_since = monotonic()
        self._unsent.append(result)
        self._unsent_bytes += len(result.data) + len(result.text)
        late = monotonic() - self._unsent_since >= SEND_AFTER_S
        if not self._waiting or late or self._unsent_bytes >= SEND_FROM_BYTES:
            self._flush()
            self._send_results()

    def _flush(self) -> None:
        for stream in self._streams:
            with contextlib.suppress(OSError, ValueError):  # a task has closed the stream
                stream.flush()

    def _prepared(self, call: tasks.Call) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        buffers = self._arguments.take(call.task_id, call.buffers)
        function, args, kwargs = pickling.loads(call.data or buffers.pop(0), buffers)
        held = self._function_of.pop(call.task_id, None)
        return held.value() if held is not None else function, args, kwargs

    def _succeeded(self, task_id: int, value: Any, seconds: float) -> tasks.Result:
        try:
            data, views = pickling.dumps(value, tasks.INLINE_BYTES)
        except Exception as error:
            kind = type(value).__qualname__
            text = _text(f"its result, a {kind}, cannot be pickled: {type(error).__name__}: {error}")
            return tasks.Result(task_id, False, b"", seconds, text=text)
        return tasks.Result(task_id, True, data, seconds, self._apart(task_id, views) if views else ())

    def _apart(self, task_id: int, views: list[pickling.Parts]) -> tuple[tasks.LargeBuffer, ...]:
        """Buffers that stay here, for the client to map or to fetch."""
        buffers = []
        for index, view in enumerate(views):
            blob = self._blobs[task_id, index] = self._shelf.blob(view)
            buffers.append(tasks.LargeBuffer(blob.size_bytes, blob.path))
        return tuple(buffers)

    def _failed(self, task_id: int, error: BaseException, seconds: float) -> tasks.Result:
        # An assignment would fail for a frozen class.
        BaseException.with_traceback(error, pickling.without_runner(error.__traceback__))
        try:
            text = _text("".join(traceback.format_exception(error))[-TEXT_CHARS:])
        except Exception as broken:
            text = f"{type(error).__qualname__}, whose traceback cannot be written: {type(broken).__qualname__}"
        BaseException.with_traceback(error, None)
        data = pickling.exception_bytes(error)
        buffers: tuple[tasks.LargeBuffer, ...] = ()
        if len(data) >= tasks.INLINE_BYTES:
            data, buffers = b"", self._apart(task_id, [(data,)])
        return tasks.Result(task_id, False, data, seconds, buffers, text)


def _text(text: str) -> str:
    """The text in a form that can be sent. Names of files may have bytes that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode()
