"""What tests have runners call: of a module that both sides import, so that it travels by its name."""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fleet


def square(x: int) -> int:
    return x * x


def double(array: Any) -> Any:
    return array * 2


def change(array: Any) -> Any:
    """In place: the caller's own must not change."""
    array[:] = 7
    return float(array.sum())


def fail(text: str) -> None:
    raise KeyError(text)


def pid() -> int:
    return os.getpid()


def leave(code: int) -> None:
    os._exit(code)


def say_exit() -> None:
    sys.exit(3)


def mark_and_die(path: str) -> str:
    """Dies the first time, and leaves a mark for each try."""
    with open(path, "a") as marks:
        marks.write("x")
    if Path(path).read_text() == "x":
        os.kill(os.getpid(), signal.SIGKILL)
    return Path(path).read_text()


def mark_and_always_die(path: str) -> None:
    with open(path, "a") as marks:
        marks.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_line(path: str) -> str:
    with open(path) as fifo:
        return fifo.readline()


def say_and_wait(say: str, wait: str) -> str:
    with open(say, "w") as fifo:
        fifo.write(f"{os.getpid()}\n")
    with open(wait) as fifo:
        return fifo.readline()


def for_ever() -> None:
    while True:
        time.sleep(3600)


def print_much(megabytes: int) -> int:
    line = "x" * 1023 + "\n"
    for _ in range(megabytes * 1024):
        sys.stdout.write(line)
    return megabytes


def fork_and_return() -> str:
    """Both processes come back from this call; only one is the runner."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return "parent" if child else "child"


def unpicklable() -> Any:
    return lambda: (x for x in ())  # cloudpickle takes the function


def generator() -> Any:
    return (x for x in range(3))


class Odd(Exception):
    """Can be pickled, and not read again."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def raise_odd() -> None:
    raise Odd(1, 2)


def total(array: Any) -> float:
    return float(np.asarray(array, dtype=np.float64).sum())


@functools.lru_cache(maxsize=10)
def cached(x: int) -> int:
    return x + 1


@dataclasses.dataclass(frozen=True)
class BadRow(Exception):
    row: int


class Keywords(Exception):
    def __init__(self, *, code: int) -> None:
        self.code = code
        super().__init__(f"code {code}")


class Locked(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text
        self.lock = threading.Lock()


class OddError(OSError):
    def __init__(self, name: str) -> None:
        super().__init__(errno.ENOSPC, "full", name)


class Reduced(Exception):
    def __reduce__(self) -> Any:
        return (Reduced,)  # and loses what it was made with


class NoReduce(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not this one")


class Slotted(Exception):
    __slots__ = ("detail",)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "frozen": lambda: BadRow(3),
    "frozen, by keyword": lambda: BadRow(row=3),
    "odd": lambda: Odd(1, 2),
    "keywords": lambda: Keywords(code=3),
    "locked": lambda: Locked("with a lock"),
    "os": lambda: OddError("disk"),
    "os, builtin": lambda: FileNotFoundError(2, "gone", "x"),
    "no reduce": lambda: NoReduce(1, "a"),
    "slotted": lambda: Slotted("s"),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"),
    "exit": lambda: SystemExit(3),
    "interrupt": lambda: KeyboardInterrupt(),
    "bytes in a name": lambda: ValueError("file \udcff"),
    "stop": lambda: StopIteration(4),
}


def raise_error(name: str) -> None:
    raise ERRORS[name]()


def raise_group() -> None:
    second = ValueError("second")
    second.add_note("a note")
    try:
        raise KeyError("the cause")
    except KeyError as cause:
        raise ExceptionGroup("both", [Odd(1, 2), second]) from cause


def fail_in_plugin(folder: str) -> None:
    sys.path.insert(0, folder)
    importlib.import_module("plug").fail()


_initialized = ""


def initialize(value: str) -> str:
    global _initialized
    _initialized = value
    return value


def initialized() -> str:
    return _initialized


def sum_in_a_world() -> tuple[int, list[float]]:
    comm = fleet.init()
    x = np.full(2, 3.0)
    comm.all_reduce(x)
    return comm.world_size, x.tolist()


class ExitsWhenPickled:
    def __reduce__(self) -> Any:
        sys.exit("pickled")


class ExitsWhenRead:
    """Read anywhere, it ends a careless thread."""

    def __reduce__(self) -> Any:
        return sys.exit, ("read",)


def give(kind: str) -> Any:
    return globals()[kind]()
