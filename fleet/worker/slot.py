"""A rank's process from fork to exit: its own process group, environment and output, then the user's code.

Runs in the forked child. Knows nothing of the cluster: what it runs calls fleet.init() or does not.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from fleet import config
from fleet.errors import WorldChanged

PR_SET_PDEATHSIG = 1
COMMAND_NOT_FOUND, COMMAND_NOT_EXECUTABLE = 127, 126  # the shell's


@dataclass(frozen=True)
class Plan:
    """What to run, and where."""

    kind: str
    target: str
    args: tuple[str, ...]
    directory: str
    environment: dict[str, str]


def main(plan: Plan, stdout: Connection, stderr: Connection) -> None:
    """Never returns."""
    _become_a_rank(stdout, stderr)
    config.replace_environment(plan.environment)
    try:
        os.chdir(plan.directory)
    except OSError as error:
        _say(f"fleet: this rank cannot run in {plan.directory}: {error.strerror}")
        os._exit(1)
    if plan.kind == "command":
        _execute(plan)
    if plan.kind == "tasks":
        _run_tasks(plan)
    code = _run_python(plan)
    # What interpreter shutdown does for a script; a forked child of multiprocessing skips it.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120  # as Python itself
    os._exit(code)


def _become_a_rank(stdout: Connection, stderr: Connection) -> None:
    os.setsid()  # a group of its own, so that a signal reaches all that it starts and a terminal's Ctrl-C does not
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it died before we asked to be told
    # multiprocessing hands every child the pipe that keeps the zygote alive, so that the zygote would outlive a killed
    # agent, and with it all ranks. Without it the zygote ends with the agent, and PDEATHSIG ends this process.
    server: Any = forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None
    # multiprocessing also hands on how a process was started; a script, and its DataLoaders, get Python's own default.
    multiprocessing.set_start_method(None, force=True)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stdout.close()
    stderr.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # New ones: those inherited from the zygote remember the file, perhaps one with a position, that fd 1 was then.
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        vars(sys).update({name: stream, f"__{name}__": stream})
    faulthandler.enable()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()  # the zygote's state would give every rank the same "random" numbers


def _execute(plan: Plan) -> None:
    """Replaces this process by the command."""
    # An ignored signal stays so across exec: Python ignores the first, and under Slurm the agent the others.
    for number in (signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(plan.target, [plan.target, *plan.args], plan.environment)
    except FileNotFoundError:
        _say(f"fleet: command not found: {plan.target}")
        os._exit(COMMAND_NOT_FOUND)
    except OSError as error:
        _say(f"fleet: cannot run {plan.target}: {error.strerror}")
        os._exit(COMMAND_NOT_EXECUTABLE)


def _run_python(plan: Plan) -> int:
    """Runs the script or module as `__main__`; the exit code that the interpreter would have given."""
    try:
        if plan.kind == "script":
            script = os.path.abspath(plan.target)
            sys.argv = [plan.target, *plan.args]
            sys.path[0:1] = [os.path.dirname(script)]
            runpy.run_path(script, run_name="__main__")
        else:
            sys.argv = [plan.target, *plan.args]
            sys.path[0:1] = [os.getcwd()]
            runpy.run_module(plan.target, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return _exit_code(end.code)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except WorldChanged:
        return 1  # the job's report says whom this rank has lost; a traceback from every rank would bury it
    except BaseException as error:
        error.__traceback__ = _users_part(error.__traceback__)  # the hook shows this one, not its argument
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _run_tasks(plan: Plan) -> NoReturn:
    """Calls what its client sends. What the client can import, this process can: by its search path, or from its bundle."""
    from fleet.worker.runner import serve

    sys.argv = [plan.target]
    sys.path[0:0] = plan.args or (os.getcwd(),)
    serve(plan.target if plan.target.startswith("ipc:") else "")


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    _say(str(code))
    return 1


def _users_part(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of fleet and runpy that led to the user's code."""
    ours = (str(Path(__file__)), runpy.__file__, "<frozen runpy>")
    rest = traceback
    while rest is not None and rest.tb_frame.f_code.co_filename in ours:
        rest = rest.tb_next
    return rest or traceback


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
