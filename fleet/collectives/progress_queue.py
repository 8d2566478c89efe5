"""Progress queue: the thread that carries out a communicator's queued operations, in the order of the calls.

Operations that a done-callback calls come right after that operation, before all that wait: where ranks differ in how far their
scripts are ahead of the callback, they still agree on the order.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

from fleet.collectives.order import Order
from fleet.collectives.work import Work

_Item = tuple[Work, Callable[[], None]]


class ProgressQueue:
    """Queue of asynchronous operations, and of all that come after one. Its thread starts with the first operation."""

    def __init__(self, order: Order) -> None:
        # Number of operations in the queue and in the thread. While it is not 0, no other thread may overtake them.
        self.count = 0
        self.thread: threading.Thread | None = None
        self._order = order
        self._items: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._of_callbacks: deque[_Item] = deque()  # of the thread alone
        self._changing = threading.Lock()  # guards `count` and `thread`

    def put(self, work: Work, act: Callable[[], None]) -> None:
        """Queues `act`; its end is the end of `work`. Raises the error that has ended the communicator, if there is one."""
        with self._changing:
            self._order.check_usable()
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="fleet-progress", daemon=True)
                self.thread.start()
            self.count += 1
            if self.thread is threading.current_thread():
                self._of_callbacks.append((work, act))
            else:
                self._items.put((work, act))

    def advance(self, work: Work) -> bool:
        """See CallQueue."""
        while not work.done():
            if not self._of_callbacks:
                return False
            self._carry_out(*self._of_callbacks.popleft())
        return True

    def close(self, deadline: float) -> None:
        """Waits until `deadline` (monotonic) for the queued operations."""
        if self.thread is not None:
            self._items.put(None)
            if self.thread is not threading.current_thread():  # else a callback of the last work closes
                self.thread.join(max(0.0, deadline - monotonic()))

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            self._carry_out(*item)
            del item  # its tensors must not live until the next one comes
            while self._of_callbacks:
                self._carry_out(*self._of_callbacks.popleft())

    def _carry_out(self, work: Work, act: Callable[[], None]) -> None:
        error: BaseException | None = None
        with self._order.running:
            begins = work.begin()
            try:
                if begins:
                    act()
            except BaseException as raised:
                error = raised
        if begins:
            work.end(error)
        # After the callbacks: until then no other thread may come between.
        with self._changing:
            self.count -= 1
