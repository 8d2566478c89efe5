"""Cells on a rank: code and functions of a notebook, called one after the other in one process. Runs in a task runner.

All cells of a rank share one namespace, that of `__main__`, with `comm`, `rank` and `world_size`.
"""

from __future__ import annotations

import ast
import contextlib
import linecache
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from fleet.collectives.communicator import Communicator
from fleet.collectives.init import init
from fleet.notebook.marks import end_mark
from fleet.worker.rank_process import end_at_users_code, users_part

SHOWN_CHARS = 20_000  # of a value, for a person
JOIN_WITHIN_S = 60.0  # for all ranks to be there


class Start(NamedTuple):
    """What a rank does before a cell."""

    number: int
    again: bool  # whether the ranks meet again, since the last cell has left some of them behind others
    timeout_s: float  # of each collective


class Ending(NamedTuple):
    """End of a cell on a rank."""

    value: Any = None
    error: str = ""  # the exception in one line; empty: the cell succeeded
    traceback: str = ""
    usable: bool = True  # False: this rank has not met the others, and makes no further cell


def run_source(start: Start, source: str, name: str, shows: bool) -> Ending:
    """Runs code. The value is that of a last expression: what a person sees of it with `shows`, else the value itself."""
    lines = source.splitlines(keepends=True)
    linecache.cache[name] = len(source), None, lines, name

    def run() -> Any:
        tree = ast.parse(source, name)
        last = tree.body[-1] if tree.body else None
        names = vars(sys.modules["__main__"])
        if not isinstance(last, ast.Expr):
            exec(compile(tree, name, "exec", dont_inherit=True), names)
            return None
        tree.body.pop()
        exec(compile(tree, name, "exec", dont_inherit=True), names)
        value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), names)
        return value if not shows else None if value is None or source.rstrip().endswith(";") else _shown(value)

    return _end(start, run)


def run_function(start: Start, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ending:
    return _end(start, lambda: function(*args, **kwargs))


def _shown(value: Any) -> str:
    text = repr(value)
    more = len(text) - SHOWN_CHARS
    return text if more <= 0 else f"{text[:SHOWN_CHARS]}... ({more} more characters)"


_inside = False
_comm: Communicator | None = None


def _end(start: Start, run: Callable[[], Any]) -> Ending:
    global _inside
    usable = False
    try:
        _inside = True
        _meet(start)
        usable = True
        ending = Ending(run())
    except BaseException as error:  # SystemExit too: the rank lives on
        _inside = False
        BaseException.with_traceback(error, users_part(error.__traceback__))
        end_at_users_code(error)
        only = traceback.format_exception_only(error)  # notes come behind, and of a SyntaxError the place before
        line = only[-1 if isinstance(error, SyntaxError) else 0].split("\n")[0]
        ending = Ending(None, line, "".join(traceback.format_exception(error)).rstrip(), usable)
    finally:
        _inside = False
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):  # the cell has closed it
                stream.flush()
            with contextlib.suppress(OSError):
                os.write(descriptor, end_mark(start.number))
    return ending


def _meet(start: Start) -> None:
    """Has the communicator of all ranks, which the first cell makes, and the next one after a failure."""
    global _comm
    if _comm is None:
        main = ModuleType("__main__")
        vars(main).update(__builtins__=__builtins__)
        sys.modules["__main__"] = main
        signal.signal(signal.SIGINT, _interrupted)
    elif not _comm.closed:
        if not start.again:
            return
        _comm.close()
    _comm = init(timeout_s=start.timeout_s, join_timeout_s=JOIN_WITHIN_S)
    vars(sys.modules["__main__"]).update(comm=_comm, rank=_comm.rank, world_size=_comm.world_size)


def _interrupted(number: int, frame: FrameType | None) -> None:
    if _inside:
        raise KeyboardInterrupt
