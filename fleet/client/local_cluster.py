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
from fleet.errors import FleetError
from fleet.values import Spec, portable

PRELOADED = ("numpy", "torch")  # in the pool too, where the caller has them: a process then costs a fork
END_WITHIN_S = 10.0
ENDED_WITHIN_S = 1.0  # once its connection is down


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
    words = ["local-slots", str(slots), str(gpus), preload]
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
