"""Process of an Executor's local slots: a cluster of this machine alone. It ends when its parent closes the pipe to it."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from functools import partial

from fleet.cli import open_what_is_closed
from fleet.cli.agents import local_fork_server
from fleet.cli.runtime import runtime_folder
from fleet.client.embedded import Failure
from fleet.config import check_system
from fleet.errors import FleetError
from fleet.text import shown_lines
from fleet.worker.zygote import RUNNER


def main(words: list[str]) -> None:
    """Runs the process. `client/local_cluster.py` gives the words: slots, GPUs, modules, whether with a page, a descriptor."""
    slots, gpus, preload, page, answer = words
    try:
        check_system()
        open_what_is_closed()
        _serve(int(answer), int(slots), int(gpus), preload, bool(page))
    except FleetError as error:
        print(f"fleet: {shown_lines(str(error))}", file=sys.stderr)
        sys.exit(1)


def _serve(answer: int, slots: int, gpus: int, preload: str, page: bool) -> None:
    """Writes the orchestrator's endpoint and the page's address to the descriptor `answer`, and serves until stdin ends."""
    for number in (signal.SIGINT, signal.SIGHUP):
        # A terminal's signals are the parent's to act on. Not SIG_IGN, which runners would inherit.
        signal.signal(number, lambda number, frame: None)
    names = (RUNNER, *(name for name in preload.split(",") if name))
    with runtime_folder() as runtime, local_fork_server(slots, names) as zygote:
        # Imported beside the fork server's own imports, which take as long.
        from fleet.cli.embedded_cluster import embedded_cluster
        from fleet.worker.storage import Storage

        said: list[str] = []  # the address of the page
        told = said.append if page else None
        storage = Storage(runtime / "output")
        with embedded_cluster(runtime, slots, "tcp", zygote, storage, gpus, page=told) as target:
            # Where the parent was interrupted, nobody reads it, and standard input has ended.
            with suppress(BrokenPipeError), open(answer, "w", encoding="utf-8") as file:
                file.write("\n".join([target.endpoint, *said, ""]))
            target.failure.listen(partial(_end, target.failure))
            sys.stdin.buffer.read()


def _end(failure: Failure) -> None:
    """Ends the process at once, although its main thread waits for input. The Executor sees that."""
    try:
        failure.check()
    except FleetError as error:
        print(f"fleet: {error}", file=sys.stderr, flush=True)
    os._exit(1)
