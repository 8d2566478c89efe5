"""Parts of the conductor: the order of operations, the queue of asynchronous ones, and the script's line of a call."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from time import monotonic
from types import FrameType

import pytest

from fleet.collectives import script_line
from fleet.collectives.order import CLOSED, Order
from fleet.collectives.progress_queue import ProgressQueue
from fleet.collectives.script_line import LIBRARY_FILES, SCRIPT_FILES, calling_frame
from fleet.collectives.work import Work
from fleet.errors import RankEnded, UsageError

SOON = 1e18  # a deadline that never comes


@pytest.fixture
def order() -> Order:
    return Order()


@pytest.fixture
def progress(order: Order) -> Iterator[ProgressQueue]:
    found = ProgressQueue(order)
    yield found
    found.close(monotonic() + 5)


# Order


def test_an_operation_waits_for_that_of_another_thread_until_its_deadline(order: Order) -> None:
    assert order.wait(monotonic())
    assert not order.wait(monotonic())
    order.running.release()
    assert order.wait(SOON)


def test_the_first_error_ends_an_order_and_is_raised_again(order: Order) -> None:
    order.check_usable()
    first, second = RankEnded(1, "w", "h", 2, "barrier()"), RankEnded(2, "w", "h", 2, "barrier()")
    assert order.end(first) is first
    assert order.end(second) is first
    with pytest.raises(RankEnded) as found:
        order.check_usable()
    assert found.value is first
    order.close()
    assert order.closed
    with pytest.raises(RankEnded):
        order.check_usable()


def test_an_order_that_was_closed_or_interrupted_says_so(order: Order) -> None:
    order.close()
    with pytest.raises(UsageError, match=CLOSED):
        order.check_usable()
    interrupted = Order()
    interrupted.end(KeyboardInterrupt())
    with pytest.raises(UsageError, match=r"interrupted by KeyboardInterrupt\(\): ranks are no longer in step"):
        interrupted.check_usable()


# Progress


def test_queued_operations_are_carried_out_in_order_by_one_thread(order: Order, progress: ProgressQueue) -> None:
    seen: list[tuple[int, int]] = []
    works = [Work() for _ in range(5)]
    with order.running:  # the operation of another thread
        for number, work in enumerate(works):
            progress.put(work, lambda number=number: seen.append((number, threading.get_ident())))  # type: ignore[misc]
        assert progress.count == 5
        assert not seen
    for work in works:
        work.wait(5)
    assert [number for number, _ in seen] == [0, 1, 2, 3, 4]
    assert progress.thread is not None
    assert {thread for _, thread in seen} == {progress.thread.ident}
    assert progress.count == 0


def test_an_error_of_a_queued_operation_is_its_works(progress: ProgressQueue) -> None:
    def fails() -> None:
        raise RuntimeError("a peer has gone")

    work, after = Work(), Work()
    progress.put(work, fails)
    progress.put(after, lambda: None)
    after.wait(5)
    with pytest.raises(RuntimeError, match="a peer has gone"):
        work.wait(5)


def test_a_call_that_comes_too_late_is_not_carried_out(order: Order, progress: ProgressQueue) -> None:
    seen: list[str] = []
    with order.running:
        late = Work(monotonic(), lambda: TimeoutError("not begun"))
        progress.put(late, lambda: seen.append("late"))
        with pytest.raises(TimeoutError, match="not begun"):
            late.wait()
    after = Work()
    progress.put(after, lambda: seen.append("after"))
    after.wait(5)
    assert seen == ["after"]


def test_a_queue_takes_nothing_once_its_order_has_ended(order: Order, progress: ProgressQueue) -> None:
    order.close()
    with pytest.raises(UsageError, match=CLOSED):
        progress.put(Work(), lambda: None)
    assert progress.thread is None
    assert progress.count == 0


def test_what_was_carried_out_is_not_held_until_the_next_comes(progress: ProgressQueue) -> None:
    class Tensor:
        pass

    tensor = Tensor()
    before = sys.getrefcount(tensor)
    held, ready = [tensor], Work()
    progress.put(ready, lambda held=held: None)  # type: ignore[misc]
    del held
    ready.wait(5)
    progress.close(monotonic() + 5)
    assert sys.getrefcount(tensor) == before


# Done-callbacks


def test_callbacks_are_called_once_in_order_with_their_work() -> None:
    work, seen = Work(), []
    work.add_done_callback(lambda done: seen.append(("first", done)))
    work.add_done_callback(lambda done: seen.append(("second", done)))
    assert not seen
    work.end()
    assert seen == [("first", work), ("second", work)]
    work.add_done_callback(lambda done: seen.append(("at once", done)))
    assert seen[2:] == [("at once", work)]


def test_a_callback_sees_the_error_of_its_work() -> None:
    work, seen = Work(), []
    work.add_done_callback(lambda done: seen.append(done.exception()))
    error = RuntimeError("a peer has gone")
    work.end(error)
    assert seen == [error]


def test_a_callback_that_fails_is_logged_and_the_others_are_called(caplog: pytest.LogCaptureFixture) -> None:
    work, seen = Work(), []

    def fails(_: Work) -> None:
        raise ValueError("in a callback")

    work.add_done_callback(fails)
    work.add_done_callback(seen.append)
    with caplog.at_level(logging.ERROR):
        work.end()
        work.add_done_callback(fails)
    assert seen == [work]
    assert len(caplog.records) == 2
    assert "in a callback" in caplog.text


def test_a_call_given_up_calls_its_callbacks_outside_of_its_lock() -> None:
    work, seen = Work(monotonic() - 1, lambda: TimeoutError("not begun")), []
    work.add_done_callback(lambda done: seen.append(done.done()))  # would wait for the lock for ever
    assert work.done()
    assert seen == [True]
    assert not work.begin()


def test_a_callback_that_waits_for_its_own_thread_is_told_so(progress: ProgressQueue, order: Order) -> None:
    seen: list[str] = []
    later = Work(queue=progress)

    def waits(_: Work) -> None:
        with pytest.raises(UsageError, match="would wait for a call that comes after the callback"):
            later.wait()
        seen.append("told")

    with order.running:
        first = Work(queue=progress)
        first.add_done_callback(waits)
        progress.put(first, lambda: None)
        progress.put(later, lambda: None)
    later.wait(5)
    assert seen == ["told"]


def test_operations_of_a_callback_come_before_those_that_wait(progress: ProgressQueue, order: Order) -> None:
    seen: list[str] = []

    def put(name: str) -> Work:
        work = Work(queue=progress)
        progress.put(work, lambda: seen.append(name))
        return work

    def calls(_: Work) -> None:
        put("not waited for").add_done_callback(lambda _: put("of a callback of its own"))
        put("waited for").wait()
        seen.append("callback")

    with order.running:
        put("first").add_done_callback(calls)
        last = put("last")
    last.wait(5)
    assert seen == ["first", "not waited for", "waited for", "callback", "of a callback of its own", "last"]


# The script's line


@pytest.fixture(autouse=True)
def no_names_are_known() -> Iterator[None]:
    SCRIPT_FILES.clear()
    LIBRARY_FILES.clear()
    yield
    SCRIPT_FILES.clear()
    LIBRARY_FILES.clear()


def code_in(name: str, body: str) -> dict[str, FrameType]:
    namespace: dict[str, FrameType] = {"sys": sys}  # type: ignore[dict-item]
    exec(compile(body, name, "exec"), namespace)
    return namespace


def test_the_line_is_the_innermost_outside_of_fleet_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_line, "_libraries", lambda: ("/lib/fleet/", "/lib/torch/"))
    fleet = code_in("/lib/fleet/torch/backend.py", "def call(): return sys._getframe()")
    torch = code_in("/lib/torch/distributed/c10d.py", "def call(inner): return inner()")
    script = code_in("/home/me/torch/train.py", "def step(torch, fleet): return torch(fleet)")
    frame = script["step"](torch["call"], fleet["call"])  # type: ignore[operator]
    assert frame.f_code.co_filename == "/lib/fleet/torch/backend.py"
    assert calling_frame(frame).f_code.co_name == "step"
    assert sorted(SCRIPT_FILES) == ["/home/me/torch/train.py"]
    assert sorted(LIBRARY_FILES) == ["/lib/fleet/torch/backend.py", "/lib/torch/distributed/c10d.py"]


def test_where_all_is_library_code_the_line_is_its_innermost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_line, "_libraries", lambda: ("",))
    frame = sys._getframe()
    assert calling_frame(frame) is frame


def test_names_without_end_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_line, "KEPT", 3)
    for number in range(20):
        frame = code_in(f"<cell {number}>", "def call(): return sys._getframe()")["call"]()  # type: ignore[operator]
        assert calling_frame(frame) is frame
    assert len(SCRIPT_FILES) <= 3
