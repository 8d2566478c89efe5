"""A rank's process from fork to exit: its own process group, environment and output, then the user's code.

Runs in the forked child. Knows nothing of the cluster: what it runs calls fleet.init() or does not.
"""

from __future__ import annotations

import ast
import ctypes
import faulthandler
import importlib.machinery
import io
import marshal
import os
import runpy
import signal
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from fleet import config, interpreter
from fleet.errors import FleetError, WorldChanged
from fleet.worker.imports import imports_of

PR_SET_PDEATHSIG = 1
COMMAND_NOT_FOUND, COMMAND_NOT_EXECUTABLE = 127, 126  # the shell's
_OF_ANY_MAIN = ("__annotations__", "__builtins__", "__name__")
PLAN, STDOUT, STDERR, STATUS, STDIN = range(5)  # of the descriptors that a rank is started with
_PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"


@dataclass(frozen=True)
class Plan:
    """What to run, and where."""

    kind: str
    target: str
    args: tuple[str, ...]
    directory: str
    environment: dict[str, str]
    anywhere: bool = False  # whether the server imported what suits most scripts, rather than what suits this one


def main(descriptors: list[int], at_start: Collection[str]) -> None:
    """Carries out the plan, and returns or raises as the script does: the interpreter ends as after any script."""
    server = os.getppid()
    os.setsid()  # a group of its own, so that a signal reaches all that it starts and a terminal's Ctrl-C does not
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:
        os._exit(1)  # it died before we asked to be told
    said = [_content(1), _content(2)]
    os.dup2(descriptors[STDIN], 0)
    os.dup2(descriptors[STDOUT], 1)
    os.dup2(descriptors[STDERR], 2)
    plan_file = os.dup(descriptors[PLAN])
    for descriptor in descriptors:
        os.close(descriptor)
    runtime, plan = _read_plan(plan_file)
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
    _begin_anew(runtime)
    if plan.kind == "tasks":
        _run_tasks(plan)
        return
    for descriptor, data in enumerate(said, 1):
        os.write(descriptor, data)  # what importing printed, which it would have printed here
    _run_python(plan, at_start)


def main_afresh(plan_file: int, at_start: Collection[str]) -> None:
    """Goes on with a rank for which nothing may have been imported before: it runs in a new interpreter."""
    _, plan = _read_plan(plan_file)
    os.close(plan_file)
    _open_streams()
    _run_python(plan, at_start)


def _read_plan(descriptor: int) -> tuple[str, Plan]:
    """The agent's runtime folder, and what to run."""
    runtime, *fields = marshal.loads(_content(descriptor))
    return runtime, Plan(*fields)


def _wants_imports_of_its_own(plan: Plan) -> bool:
    """Whether the script does something before an import that may change it, such as setting a variable."""
    if plan.kind != "script" or "numpy" not in sys.modules:
        return False
    try:
        source = Path(plan.target).read_bytes()
        return bool(imports_of(ast.parse(source), Path(plan.target).resolve().parent).late)
    except (OSError, SyntaxError, ValueError):
        return False  # running it will say so


def _content(descriptor: int) -> bytes:
    """All of a file in memory. Its position is shared with other processes, so that is left alone."""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _open_streams() -> None:
    """New ones: those inherited from the fork server remember the file, with a position, that their descriptor was then."""
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
    """What a process has of its own is not the fork server's."""
    if (process := sys.modules.get("multiprocessing.process")) is not None:
        process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
        own: dict[str, Any] = process.current_process()._config
        own["authkey"] = process.AuthenticationString(os.urandom(32))
        own["tempdir"] = runtime  # what it leaves there when it is killed goes with the runtime folder
    if (random := sys.modules.get("numpy.random")) is not None:
        random.seed()  # the server's state would give every rank the same "random" numbers


def _execute(plan: Plan) -> NoReturn:
    """Replaces this process by the command."""
    # An ignored signal stays so across exec: Python ignores the first two, and under Slurm the agent the others.
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
    options = sys.orig_argv[1 : -len(sys.argv)]  # those of the interpreter
    # A new one: what the fork server's refers to is kept for good.
    main = ModuleType("__main__")
    same = {name: value for name, value in vars(sys.modules["__main__"]).items() if name in _OF_ANY_MAIN}
    vars(main).update(same, __doc__=None, __loader__=None, __package__=None, __spec__=None)
    sys.modules["__main__"] = main
    try:
        if plan.kind == "script" and _holds_main(plan.target):
            sys.argv = [plan.target, *plan.args]
            sys.orig_argv = [sys.orig_argv[0], *options, *sys.argv]
            sys.path.insert(0, os.path.abspath(plan.target))
            runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
        elif plan.kind == "script":
            sys.argv = [plan.target, *plan.args]
            sys.orig_argv = [sys.orig_argv[0], *options, *sys.argv]
            _set_first_folder(os.path.dirname(os.path.realpath(plan.target)), at_start)
            # As Python does: the file's name is absolute, and not the real one behind a link.
            file = os.path.join(os.getcwd(), plan.target)
            vars(main).update(__file__=file, __cached__=None)
            code = _compiled(file, main) if file.endswith(".pyc") else _source(file, main)
            exec(code, vars(main))
            _forget_file()
        else:
            sys.argv = ["-m", *plan.args]
            sys.orig_argv = [sys.orig_argv[0], *options, "-m", plan.target, *plan.args]
            _set_first_folder(os.getcwd(), at_start)
            runpy._run_module_as_main(plan.target)  # type: ignore[attr-defined]
    except SystemExit:
        raise
    except WorldChanged:
        raise SystemExit(1) from None  # the job's report says whom this rank has lost: no traceback from every rank
    except BaseException:
        _show_without_our_frames(plan.kind)
        raise


def _source(file: str, main: ModuleType) -> CodeType:
    loader = main.__loader__ = importlib.machinery.SourceFileLoader("__main__", file)
    code: CodeType = compile(loader.get_data(file), file, "exec", dont_inherit=True)
    return code


def _compiled(file: str, main: ModuleType) -> CodeType:
    loader = main.__loader__ = importlib.machinery.SourcelessFileLoader("__main__", file)
    code = loader.get_code("__main__")
    assert code is not None
    return code


def _holds_main(path: str) -> bool:
    """Whether it is a folder or a zip file, of which Python runs the `__main__` module."""
    if os.path.isdir(path):
        return True
    with open(path, "rb") as file:
        if not file.read(2).startswith((b"PK", b"#!")):  # as most scripts do not
            return False
    from zipfile import is_zipfile

    return is_zipfile(path)


def _forget_file() -> None:
    """As Python does once a script's last line has run."""
    for name in ("__file__", "__cached__"):
        vars(sys.modules["__main__"]).pop(name, None)


def _set_first_folder(folder: str, at_start: Collection[str]) -> None:
    """Puts it first on the search path, and what it has is found there, though the server has imported others of that name."""
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
    """An exception that nobody caught is shown without the frames that led to the user's code, or from it into fleet."""
    hook = sys.excepthook

    def show(error_type: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        error.__traceback__ = _users_part(traceback)  # the hook may look at either
        _end_at_users_code(error)
        hook(error_type, error, error.__traceback__)
        if kind == "script":
            _forget_file()

    sys.excepthook = show


def _run_tasks(plan: Plan) -> None:
    """Calls what its client sends. What the client can import, this process can: by its search path, or from its bundle."""
    from fleet.worker.task_runner import serve

    sys.argv = [plan.target]
    sys.path[0:0] = plan.args or (os.getcwd(),)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # its client writes it in its own
    serve(plan.target if plan.target.startswith("/") else "")


def _users_part(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of fleet and runpy that led to the user's code."""
    rest = traceback
    while rest is not None and rest.tb_frame.f_code.co_filename.startswith(
        (_PACKAGE, runpy.__file__, "<frozen runpy>")
    ):
        rest = rest.tb_next
    return rest or traceback


def _end_at_users_code(error: BaseException) -> None:
    """Cuts fleet's own frames off the inner end of its errors, also of those that led to this one: they say all in words.
    Where in a collective Ctrl-C has met a rank is no news either."""
    seen: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        one = ahead.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        ahead += [one.__cause__, one.__context__]
        last, at = None, one.__traceback__ if isinstance(one, FleetError | KeyboardInterrupt) else None
        while at is not None:
            if not at.tb_frame.f_code.co_filename.startswith(_PACKAGE):
                last = at
            at = at.tb_next
        if last is not None:
            last.tb_next = None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
