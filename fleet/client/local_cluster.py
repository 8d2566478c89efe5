"""The local cluster of an Executor: the process beside it that has its slots."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fleet import interpreter
from fleet.bus.lock import Lock
from fleet.client.target import Target
from fleet.config import gpu_count
from fleet.errors import FleetError, UsageError
from fleet.values import Spec, portable

# Modules that runners find imported where the caller has imported them: a runner then costs a fork.
PRELOADED = ("fleet.collectives.init", "numpy", "torch")
END_WITHIN_S = 10.0
ENDED_WITHIN_S = 1.0  # after the loss of its connection


@dataclass(frozen=True)
class Place:
    """Where an Executor's runners run, and what they are started with."""

    target: Target
    door: str  # where runners tell their client that they listen; empty: they are reached through the relay
    spec: Spec
    bundle: Path | None = None  # the code, if it has to travel
    ended: Callable[[], str] = lambda: ""  # how the process of the local slots has ended, in words
    page_at: str = ""  # address of its page, with the token; empty: there is none


def check_gpus(count: int) -> None:
    """Raises UsageError where this machine has fewer GPUs: processes would get numbers of some that are not there."""
    if count > (found := gpu_count()):
        raise UsageError(
            f"{count} {'GPU is' if count == 1 else 'GPUs are'} asked for, and this machine has {found or 'none'} "
            "(CUDA_VISIBLE_DEVICES, /dev/nvidia*); ORCHESTRATOR_ADDR says which cluster has some"
        )


@contextmanager
def local_place(slots: int, gpus: int, page: bool = False) -> Iterator[Place]:
    """Starts a process with an orchestrator, a worker and its slots. That ends with this process, however this one ends.

    It is no thread of this process, so that the caller's module is not imported a second time, and each has its own GIL.
    Runners search for modules where the caller does. Raises UsageError where there are not so many GPUs.
    """
    check_gpus(gpus)
    preload = ",".join(name for name in PRELOADED if name in sys.modules)
    words = ["local-slots", str(slots), str(gpus), preload, "page" if page else ""]
    read, write = os.pipe()
    with open(read, "rb") as answer:
        try:
            process = subprocess.Popen(
                interpreter.command(*words, str(write)),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # a hook of this Python that prints at each start has printed here
                pass_fds=[write],
                start_new_session=True,  # Ctrl-C in a terminal is the caller's to act on
            )
        finally:
            os.close(write)
        endpoint, page_at, *_ = (*answer.read().decode().split("\n"), "", "")
    assert process.stdin is not None
    try:
        if not endpoint:
            raise FleetError(f"the pool of local slots did not start: it {_how_it_ended(process)}")
        # In the folder of its orchestrator, which is this user's alone.
        door = endpoint.removeprefix("ipc://").removesuffix("orchestrator") + "client"
        search = tuple(dict.fromkeys(portable(os.path.abspath(entry)) for entry in sys.path))
        target = Target("this machine", endpoint, Lock(), 60.0, local=True)
        spec = Spec("tasks", door, search, portable(os.getcwd()))
        yield Place(target, door, spec, ended=lambda: _how_it_ended(process), page_at=page_at)
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
