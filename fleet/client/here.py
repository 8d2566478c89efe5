"""What an Executor needs of the machine that it is made on: a pool of slots beside it, and the code of its caller."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fleet import interpreter
from fleet.bus.folders import PREFIX, held_folder
from fleet.bus.lock import Lock
from fleet.client.target import Target
from fleet.errors import FleetError
from fleet.values import Spec, portable

PRELOADED = ("numpy", "torch")  # in the pool too, where the caller has them: a process then costs a fork
CODE_PREFIX = f"{PREFIX}code-"  # of the folder with the bundle
END_WITHIN_S = 10.0
ENDED_WITHIN_S = 1.0  # once its connection is down


log = logging.getLogger("fleet.executor")


@dataclass(frozen=True)
class Place:
    """Where an Executor's runners run, and what they are started with."""

    target: Target
    door: str  # where runners tell their client that they listen; empty: they are reached through the relay
    spec: Spec
    bundle: Path | None = None  # the code, if it has to travel
    ended: Callable[[], str] = lambda: ""  # how the process of the local slots has ended, in words


@contextmanager
def local_place(slots: int, gpus: int) -> Iterator[Place]:
    """A process of its own with an orchestrator, a worker and its slots; it ends with this one, however that ends.

    Of its own, so that the caller's module is never imported a second time, and its GIL is its own. The Executor listens
    beside the orchestrator, which would be two hops more each way. Runners search for modules where the caller does.
    """
    preload = ",".join(name for name in PRELOADED if name in sys.modules)
    words = ["pool", str(slots), str(gpus), preload]
    read, write = os.pipe()
    with open(read, "rb") as answer:
        try:
            process = subprocess.Popen(
                interpreter.command(*words, str(write)),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # what a hook of this Python prints at each start was printed here
                pass_fds=[write],
                start_new_session=True,  # Ctrl-C in a terminal is the caller's to act on
            )
        finally:
            os.close(write)
        endpoint = answer.readline().decode().strip()
    assert process.stdin is not None
    try:
        if not endpoint:
            raise FleetError(f"the pool of local slots did not start: it {_how_it_ended(process)}")
        # Beside its orchestrator, so in a folder that is this user's alone.
        door = endpoint.removeprefix("ipc://").removesuffix("orchestrator") + "client"
        search = tuple(dict.fromkeys(portable(os.path.abspath(entry)) for entry in sys.path))
        target = Target("this machine", endpoint, Lock(), 60.0, local=True)
        yield Place(
            target, door, Spec("tasks", door, search, portable(os.getcwd())), ended=lambda: _how_it_ended(process)
        )
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(ENDED_WITHIN_S)
    except subprocess.TimeoutExpired:
        return "does not answer"
    return f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"


@contextmanager
def cluster_place(target: Target, max_bundle_bytes: int) -> Iterator[Place]:
    """A cluster, to which the folder of the caller's script travels."""
    from fleet.client.bundle import (
        pack_selected,
    )  # here, for what they import takes 10 ms, and local slots need none of it
    from fleet.client.selection import select

    folder = _folder_of_main()
    if folder is None:
        yield Place(target, "", Spec("tasks", "executor", (), "/"))
        return
    with held_folder(CODE_PREFIX) as into:
        selected = select(folder)
        if keys := selected.keys():
            log.warning("these do not travel, since they may hold keys: %s", ", ".join(keys))
        bundle = pack_selected(selected, into, max_bundle_bytes)
        spec = Spec("tasks", "executor", (), "", bundle.digest, bundle.size_bytes)
        yield Place(target, "", spec, bundle.path)


def _folder_of_main() -> Path | None:
    """The folder of the running script, of a module the current one; None in a notebook, and for what is installed."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    if _is_installed(path):
        return None
    return Path.cwd() if getattr(main, "__spec__", None) is not None else path.parent


def _is_installed(path: Path) -> bool:
    """Whether a file, its links followed, belongs to Python or a package, which each worker has of its own."""
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib", "scripts")]
    return any(path.is_relative_to(folder) for folder in installed)


def with_hint(error: BaseException) -> BaseException:
    """The error of a task; one about a module that is only here gets a note that says how it travels."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return error
    module = sys.modules.get(error.name)
    file = getattr(module, "__file__", None)
    if file is not None and not _is_installed(Path(file).resolve()):
        error.add_note(
            f"The module {error.name} lies in {Path(file).parent}, which did not travel: of a script its folder does, of a "
            f"notebook, a test or a prompt none. import cloudpickle; cloudpickle.register_pickle_by_value({error.name}) before "
            "submit sends the module's functions and classes with the call."
        )
    return error
