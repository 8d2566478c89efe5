"""Process of a rank from fork to exit: process group, environment and output of its own, then the user's code.

Runs in the forked child. Knows nothing of the cluster, which the user's code joins by fleet.init(), if at all.
"""

from __future__ import annotations

import ast
import ctypes
import faulthandler
import importlib.machinery
import io
import marshal
import os
import re
import runpy
import signal
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from fleet import config, interpreter
from fleet.errors import FleetError, WorldChanged
from fleet.worker.imports import imports_of

PR_SET_PDEATHSIG = 1
COMMAND_NOT_FOUND, COMMAND_NOT_EXECUTABLE = 127, 126  # exit codes, as of a shell
_OF_ANY_MAIN = ("__annotations__", "__builtins__", "__name__")
PLAN, STDOUT, STDERR, STATUS, STDIN = range(5)  # indices of the descriptors that a rank gets from its agent
_PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"
_FRAMES_OF_CPP = "\n\nAt:\n"  # what stands before them in the text of an error that came through C++
_RUNNING = _PACKAGE, runpy.__file__, "<frozen runpy>"  # files whose frames lead to the user's code


@dataclass(frozen=True)
class Plan:
    """Program of a rank, with its folder and environment."""

    kind: str
    target: str
    args: tuple[str, ...]
    directory: str
    environment: dict[str, str]
    runtime: str  # the agent's folder, which the agent removes, also if the rank is killed
    anywhere: bool = False  # the fork server has imported what suits most scripts; False: what suits this one


def main(descriptors: list[int], at_start: Collection[str]) -> None:
    """Carries out the plan. Returns or raises as the script does, so that the interpreter ends as after any script."""
    server = os.getppid()
    os.setsid()  # a signal to this group reaches all that the rank starts, and Ctrl-C of a terminal does not reach it
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:
        os._exit(1)  # the server died before this process asked to die with it
    said = [_content(1), _content(2)]
    os.dup2(descriptors[STDIN], 0)
    os.dup2(descriptors[STDOUT], 1)
    os.dup2(descriptors[STDERR], 2)
    plan_file = os.dup(descriptors[PLAN])
    for descriptor in descriptors:
        os.close(descriptor)
    plan = Plan(*marshal.loads(_content(plan_file)))
    _open_streams()
    config.replace_environment(plan.environment)
    try:
        os.chdir(plan.directory)
    except OSError as error:
        _say(f"fleet: this rank cannot run in {plan.directory}: {error.strerror}")
        os._exit(1)
    if plan.kind == "command":
        _execute(plan)
    if plan.anywhere and _wants_imports_of_its_own(plan):
        os.set_inheritable(plan_file, True)
        os.execv(sys.executable, interpreter.command("rank", str(plan_file)))
    os.close(plan_file)
    _begin_anew(plan.runtime)
    if plan.kind == "tasks":
        _run_tasks(plan)
        return
    for descriptor, data in enumerate(said, 1):
        os.write(descriptor, data)  # the imports printed this in the fork server
    _run_python(plan, at_start)


def main_afresh(plan_file: int, at_start: Collection[str]) -> None:
    """Goes on with a rank in a new interpreter, in which nothing was imported before."""
    plan = Plan(*marshal.loads(_content(plan_file)))
    os.close(plan_file)
    _open_streams()
    _run_python(plan, at_start)


def _wants_imports_of_its_own(plan: Plan) -> bool:
    """Whether the script may change what an import does, such as by a variable, before it imports something."""
    if plan.kind != "script" or "numpy" not in sys.modules:
        return False
    try:
        source = Path(plan.target).read_bytes()
        return bool(imports_of(ast.parse(source), Path(plan.target).resolve().parent).late)
    except (OSError, SyntaxError, ValueError):
        return False  # the run of the script will tell


def _content(descriptor: int) -> bytes:
    """The bytes of a file in memory. Its position is shared with other processes, and stays as it is."""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _open_streams() -> None:
    """Makes new standard streams. The fork server's remember another file behind their descriptors, and a position in it."""
    for descriptor, name, mode in ((0, "stdin", "rb"), (1, "stdout", "wb"), (2, "stderr", "wb")):
        like = getattr(sys, name)
        raw: Any = io.FileIO(descriptor, mode, closefd=False)
        raw.name = f"<{name}>"
        unbuffered = like.write_through and mode == "wb"  # PYTHONUNBUFFERED
        buffer = raw if unbuffered else io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw)
        stream: Any = io.TextIOWrapper(
            buffer, like.encoding, like.errors, newline="\n", line_buffering=mode == "wb", write_through=unbuffered
        )
        stream.mode = mode[0]
        vars(sys).update({name: stream, f"__{name}__": stream})
    faulthandler.enable()


def _begin_anew(runtime: str) -> None:
    """Replaces state of the fork server that each process must have for itself."""
    if (process := sys.modules.get("multiprocessing.process")) is not None:
        process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
        own: dict[str, Any] = process.current_process()._config
        own["authkey"] = process.AuthenticationString(os.urandom(32))
        own["tempdir"] = runtime
    if (random := sys.modules.get("numpy.random")) is not None:
        random.seed()  # with the state of the fork server all ranks would draw the same numbers


def _execute(plan: Plan) -> NoReturn:
    """Replaces this process by the command."""
    # Exec keeps ignored signals ignored. Python ignores the first two, and under Slurm the agent ignores the others.
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(plan.target, [plan.target, *plan.args], plan.environment)
    except FileNotFoundError:
        _say(f"fleet: command not found: {plan.target}")
        os._exit(COMMAND_NOT_FOUND)
    except OSError as error:
        _say(f"fleet: cannot run {plan.target}: {error.strerror}")
        os._exit(COMMAND_NOT_EXECUTABLE)


def _run_python(plan: Plan, at_start: Collection[str]) -> None:
    """Runs the script or module as `__main__`."""
    options = sys.orig_argv[1 : -len(sys.argv)]  # of the interpreter
    # A new module: the fork server's is never freed, and so would be all that it refers to.
    main = ModuleType("__main__")
    same = {name: value for name, value in vars(sys.modules["__main__"]).items() if name in _OF_ANY_MAIN}
    vars(main).update(same, __doc__=None, __loader__=None, __package__=None, __spec__=None)
    sys.modules["__main__"] = main
    before = [] if plan.kind == "script" else ["-m"]
    sys.argv = [*(before or [plan.target]), *plan.args]
    sys.orig_argv = [sys.orig_argv[0], *options, *before, plan.target, *plan.args]
    try:
        if plan.kind != "script":
            _set_first_folder(os.getcwd(), at_start)
            runpy._run_module_as_main(plan.target)  # type: ignore[attr-defined]
        elif _holds_main(plan.target):
            sys.path.insert(0, os.path.abspath(plan.target))
            runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
        else:
            _set_first_folder(os.path.dirname(os.path.realpath(plan.target)), at_start)
            # As in Python: the path is absolute, and links in it are not followed.
            file = os.path.join(os.getcwd(), plan.target)
            vars(main).update(__file__=file, __cached__=None)
            exec(_code(file, main), vars(main))
            _forget_file()
    except SystemExit:
        raise
    except WorldChanged:
        raise SystemExit(1) from None  # the report of the job names the lost rank: no traceback from every other one
    except BaseException as error:
        if _says_that_one_is_gone(error):
            raise SystemExit(1) from None
        _show_without_our_frames(plan.kind)
        raise


def _says_that_one_is_gone(error: BaseException) -> bool:
    """Whether it is a WorldChanged that came through torch, which leaves of it no more than its text."""
    if not isinstance(error, RuntimeError):
        return False
    text = _text(error)
    text = text if type(error).__name__ == "DistBackendError" else _after(text, "DistBackendError: ")
    return bool(text) and re.match(r"rank \d+ \(.*\) is gone: .*; generation \d+ has ended", text, re.S) is not None


def _text(error: BaseException) -> str:
    """The error's text; empty where the script's own class fails to make it."""
    with suppress(Exception):
        return str(error)
    return ""


def _after(text: str, mark: str) -> str:
    return text.partition(mark)[2]


def _code(file: str, main: ModuleType) -> CodeType:
    """The code of a script, which may be compiled already."""
    if file.endswith(".pyc"):
        compiled = main.__loader__ = importlib.machinery.SourcelessFileLoader("__main__", file)
        code = compiled.get_code("__main__")
        assert code is not None
        return code
    source = main.__loader__ = importlib.machinery.SourceFileLoader("__main__", file)
    return compile(source.get_data(file), file, "exec", dont_inherit=True)


def _holds_main(path: str) -> bool:
    """Whether the path is a folder or a zip file. Python runs the `__main__` module in it."""
    if os.path.isdir(path):
        return True
    with open(path, "rb") as file:
        if not file.read(2).startswith((b"PK", b"#!")):  # most scripts
            return False
    from zipfile import is_zipfile

    return is_zipfile(path)


def _forget_file() -> None:
    """Removes the names that Python removes once the last line of a script has run."""
    for name in ("__file__", "__cached__"):
        vars(sys.modules["__main__"]).pop(name, None)


def _set_first_folder(folder: str, at_start: Collection[str]) -> None:
    """Puts a folder first on the search path. Modules of the fork server that a file there has the name of are forgotten."""
    if sys.flags.safe_path:
        return
    sys.path.insert(0, folder)
    imported = {name for name in sys.modules if "." not in name and name not in at_start}
    try:
        hidden = imported & {entry.name.partition(".")[0] for entry in os.scandir(folder)}
    except OSError:
        return
    for top in hidden:
        found = importlib.machinery.PathFinder.find_spec(top, [folder])
        if found is not None and found.origin != getattr(sys.modules[top], "__file__", None) and found.origin:
            for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
                del sys.modules[name]


def _show_without_our_frames(kind: str) -> None:
    """Cuts fleet's frames off the traceback of an uncaught exception, at both ends."""
    hook = sys.excepthook

    def show(error_type: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        error.__traceback__ = users_part(traceback)  # a hook may look here or at its argument
        end_at_users_code(error)
        hook(error_type, error, error.__traceback__)
        if kind == "script":
            _forget_file()

    sys.excepthook = show


def _run_tasks(plan: Plan) -> None:
    """Makes the calls of a client. This process can import what the client can: from the same search path, or a bundle."""
    from fleet.worker.task_runner import serve

    sys.argv = [plan.target]
    sys.path[0:0] = plan.args or (os.getcwd(),)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # the client prints it in its own encoding
    serve(plan.target if plan.target.startswith("/") else "")


def users_part(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of fleet and runpy that led to the user's code."""
    rest = traceback
    while rest is not None and rest.tb_frame.f_code.co_filename.startswith(_RUNNING):
        rest = rest.tb_next
    return rest or traceback


def end_at_users_code(error: BaseException) -> None:
    """Cuts fleet's frames off the inner end of its errors, and of the errors that led to this one: their text says it all.
    The same for Ctrl-C inside of a collective, and for errors that came through torch."""
    seen: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        one = ahead.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        ahead += [one.__cause__, one.__context__]
        if isinstance(one, RuntimeError) and _after(text := _text(one), "DistBackendError: "):
            one.args = (text.partition(_FRAMES_OF_CPP)[0],)
        is_told = isinstance(one, FleetError | KeyboardInterrupt) or type(one).__name__ == "DistBackendError"
        last, at = None, one.__traceback__ if is_told else None
        while at is not None:
            if not at.tb_frame.f_code.co_filename.startswith(_PACKAGE):
                last = at
            at = at.tb_next
        if last is not None:
            last.tb_next = None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
