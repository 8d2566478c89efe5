"""What an Executor needs of the machine that it is made on: a pool of slots beside it, and the code of its caller."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fleet.bus.lock import Lock
from fleet.client.bundle import pack
from fleet.client.target import Target
from fleet.errors import FleetError
from fleet.values import Spec

PRELOADED = ("numpy", "torch")  # in the pool too, where the caller has them: a process then costs a fork
END_WITHIN_S = 10.0


@dataclass(frozen=True)
class Code:
    """What a runner is to be started with, and the bundle that has it, if it has to travel."""

    spec: Spec
    bundle: Path | None


@contextmanager
def local_pool(slots: int, gpus: int) -> Iterator[tuple[Target, str]]:
    """A process of its own with an orchestrator, a worker and its slots; it ends with this one, however that ends.

    And where the Executor is to listen for its runners: beside the orchestrator, which would be two hops more each way.
    Of its own, so that the caller's module is never imported a second time, and its GIL is its own.
    """
    preload = ",".join(name for name in PRELOADED if name in sys.modules)
    words = ["pool", "--slots", str(slots), "--gpus", str(gpus), "--preload", preload]
    process = subprocess.Popen(
        [sys.executable, "-m", "fleet", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in a terminal is the caller's to act on
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        endpoint = process.stdout.readline().decode().strip()
        if not endpoint:
            raise FleetError(f"the pool of local slots did not start: it ended with code {process.wait()}")
        # Beside its orchestrator, so in a folder that is this user's alone.
        direct = endpoint.removesuffix("orchestrator") + "client"
        yield Target("this machine", endpoint, Lock(), 60.0, local=True), direct
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@contextmanager
def code_of_caller(direct: str) -> Iterator[Code]:
    """On this machine runners search where the caller does; on a cluster the folder of its script travels."""
    if direct:
        search = tuple(dict.fromkeys(os.path.abspath(entry) for entry in sys.path))
        yield Code(Spec("tasks", direct, search, os.getcwd()), None)
        return
    folder = _folder_of_main()
    if folder is None:
        yield Code(Spec("tasks", "executor", (), "/"), None)
        return
    with tempfile.TemporaryDirectory(prefix="fleet-code-") as into:
        bundle = pack(folder, Path(into))
        yield Code(Spec("tasks", "executor", (), "", bundle.digest, bundle.size_bytes), bundle.path)


def _folder_of_main() -> Path | None:
    """The folder of the running script, of a module the current one; None in a notebook, and for what is installed."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib", "scripts")]
    if any(path.is_relative_to(folder) for folder in installed):
        return None
    return Path.cwd() if getattr(main, "__spec__", None) is not None else path.parent
