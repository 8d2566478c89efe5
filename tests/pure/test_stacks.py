"""Stacks of all threads but the one that asks, in words."""

from __future__ import annotations

import threading

from fleet.collectives.stacks import THREADS_AT_MOST, stacks_of_all_threads


def waits_in_a_data_loader(begun: threading.Semaphore, done: threading.Event) -> None:
    begun.release()
    done.wait()


def test_each_thread_is_told_by_its_name_and_the_line_that_it_is_at() -> None:
    begun, done, told = threading.Semaphore(0), threading.Event(), list[str]()
    threads = [
        threading.Thread(target=waits_in_a_data_loader, args=(begun, done), name=f"loader-{number}")
        for number in range(THREADS_AT_MOST + 3)
    ]
    try:
        for thread in threads:
            thread.start()
            begun.acquire()
        asker = threading.Thread(target=lambda: told.append(stacks_of_all_threads()), name="asker")
        asker.start()
        asker.join()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    (text,) = told
    first, *others = text.split("\n\n")
    assert first.startswith("thread MainThread (")
    assert "in test_each_thread_is_told" in first
    assert "thread asker (" not in text
    assert len(others) == THREADS_AT_MOST
    assert others[-1].startswith("and ")
    assert all("in waits_in_a_data_loader" in other for other in others if other.startswith("thread loader-"))
