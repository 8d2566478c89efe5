"""Functions, exceptions and values of every kind that the standard library's process pools take, and some that they do not."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import calls
import psutil
import pytest

import fleet


@pytest.fixture(scope="module")
def pool() -> Iterator[fleet.Executor]:
    with fleet.Executor(max_workers=1) as pool:
        pool.submit(calls.square, 1).result()
        yield pool


@dataclasses.dataclass(frozen=True)
class Scale:
    """Callable, and has no hash."""

    weights: list[int]

    def __call__(self, x: int) -> list[int]:
        return [weight * x for weight in self.weights]

    def first(self, x: int) -> int:
        return self.weights[0] * x

    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    @classmethod
    def of(cls, x: int) -> Scale:
        return cls([x])


def local_factorial() -> Callable[[int], int]:
    @functools.lru_cache(maxsize=7)
    def factorial(n: int) -> int:
        return n * factorial(n - 1) if n else 1

    return factorial


@functools.cache
def cached(x: int) -> int:
    return x + 1


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Scale([1, 2]), [3, 6]),
        (Scale([5]).first, 15),
        (Scale.double, 6),
        (Scale.of, Scale([3])),
        (functools.partial(pow, 2), 8),
        (functools.partial(Scale([1, 2])), [3, 6]),
        (calls.cached, 4),
        (local_factorial(), 6),
        ((3).__add__, 6),
        (functools.partialmethod(len).func, None),
        (lambda x: [y * x for y in range(3)], [0, 3, 6]),
    ],
)
def test_callables_of_any_kind(pool: fleet.Executor, function: Callable[..., Any], expected: Any) -> None:
    if expected is None:
        assert pool.submit(function, "abc").result(timeout=30) == 3
    else:
        assert pool.submit(function, 3).result(timeout=30) == expected
        assert list(pool.map(function, [3, 3])) == [expected] * 2


def test_a_cached_function_of_a_script_travels(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import fleet, functools\n"
        "@functools.cache\n"
        "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\n"
        "with fleet.Executor(max_workers=1) as pool: print(pool.submit(fib, 50).result(20))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("12586269025\n", 0), done.stderr


@pytest.mark.parametrize("name", sorted(calls.ERRORS))
def test_exceptions_of_any_class_come_back_as_what_they_were(pool: fleet.Executor, name: str) -> None:
    error = pool.submit(calls.raise_error, name).exception(timeout=30)
    expected = calls.ERRORS[name]()
    assert type(error) is type(expected)
    assert repr(error) == repr(expected)
    assert str(error) == str(expected)
    assert "calls.py" in str(error.__cause__)
    for attribute, value in vars(expected).items():
        if attribute != "lock":
            assert vars(error)[attribute] == value
    assert getattr(error, "errno", None) == getattr(expected, "errno", None)


def test_a_group_comes_back_with_its_members_and_the_text_of_all_causes(pool: fleet.Executor) -> None:
    error = pool.submit(calls.raise_group).exception(timeout=30)
    assert isinstance(error, ExceptionGroup)
    first, second = error.exceptions
    assert isinstance(first, calls.Odd)
    assert isinstance(second, ValueError)
    assert second.__notes__ == ["a note"]
    assert "KeyError: 'the cause'" in str(error.__cause__)


def test_the_text_of_an_exception_of_a_class_that_is_unknown_here_is_kept(pool: fleet.Executor, tmp_path: Path) -> None:
    (tmp_path / "plug.py").write_text(
        "class PluginError(Exception): pass\ndef fail(): raise PluginError('disk 7 is full')\n"
    )
    error = pool.submit(calls.fail_in_plugin, str(tmp_path)).exception(timeout=30)
    assert isinstance(error, fleet.TaskError)
    assert "plug.PluginError: disk 7 is full" in str(error)
    assert "in fail" in str(error)


def test_functions_that_are_no_longer_used_do_not_stay(pool: fleet.Executor) -> None:
    """Neither here nor in the process that ran them: 60 MB of them would be seen in both."""
    runner, caller = psutil.Process(pool.submit(os.getpid).result(timeout=30)), psutil.Process()

    def closure(number: int) -> Callable[[int], int]:
        table = number.to_bytes(4, "big") * 12_000
        return lambda x: len(table) + x

    def submit_many(count: int) -> int:
        for number in range(count):
            assert pool.submit(closure(number), 1).result(timeout=30) == 48_001
        gc.collect()
        return runner.memory_info().rss + caller.memory_info().rss

    before = submit_many(300)
    assert submit_many(1000) - before < 30 << 20


def test_a_function_that_the_runner_has_forgotten_is_sent_again(pool: fleet.Executor) -> None:
    def make(number: int) -> Callable[[], int]:
        return lambda: number

    functions = [make(number) for number in range(1200)]
    for _ in range(2):
        futures = [pool.submit(function) for function in functions]
        assert [future.result(timeout=60) for future in futures] == list(range(1200))


def test_values_that_exit_when_they_are_pickled_or_read_end_nothing(pool: fleet.Executor) -> None:
    assert isinstance(pool.submit(calls.give, "ExitsWhenPickled").exception(timeout=30), SystemExit)
    error = pool.submit(calls.give, "ExitsWhenRead").exception(timeout=30)
    assert isinstance(error, fleet.TaskError)
    assert "cannot be read here: SystemExit: read" in str(error)
    assert isinstance(pool.submit(calls.square, calls.ExitsWhenRead()).exception(timeout=30), SystemExit)  # type: ignore[arg-type]
    assert pool.submit(calls.square, 2).result(timeout=30) == 4
