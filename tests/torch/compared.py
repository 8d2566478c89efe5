"""Checks of what is built on torch.distributed, run by every rank on the backends fleet and gloo, whose results must be equal.

A check is a function without arguments that returns tensors and numbers, in lists and dicts. It runs in a process group that
is there already. All checks run in the same ranks, so a job starts once.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

BACKENDS = ("fleet", "gloo")
TIMEOUT = timedelta(seconds=60)

Check = Callable[[], Any]


def rounds(tolerance: float) -> Callable[[Check], Check]:
    """A check whose numbers are rounded on their way, in another order in each backend."""

    def marked(check: Check) -> Check:
        check.tolerance = tolerance  # type: ignore[attr-defined]
        return check

    return marked


def main(*checks: Check) -> None:
    """Runs the checks, and writes what is wrong with each into the folder that the command line names."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    chosen = [check for check in checks if not names or check.__name__ in names]
    # One store for both: where each made its own at the same port, a rank could still find the first one's dying server.
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=TIMEOUT)
    outcomes = {}
    for backend in BACKENDS:
        prefixed = dist.PrefixStore(backend, store)
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size, timeout=TIMEOUT)
        outcomes[backend] = {check.__name__: _outcome(check) for check in chosen}
        dist.destroy_process_group()
    wrong: dict[str, str] = {}
    for check in chosen:
        fleets, gloos = (outcomes[backend][check.__name__] for backend in BACKENDS)
        if reason := _difference(fleets, gloos, getattr(check, "tolerance", 1e-4)):
            wrong[check.__name__] = reason
    names = [check.__name__ for check in chosen]
    (folder / f"{rank}.json").write_text(json.dumps({"checks": names, "wrong": wrong}))


def _outcome(check: Check) -> Any:
    """The check's results, or its traceback."""
    torch.manual_seed(7)
    began = time.monotonic()
    try:
        found = check()
    except Exception:
        found = traceback.format_exc()
    print(f"{dist.get_backend()} {check.__name__} {time.monotonic() - began:.2f} s", file=sys.stderr)
    dist.barrier()
    return found


def _difference(fleets: Any, gloos: Any, tolerance: float) -> str:
    """What differs, in words; "": nothing."""
    if isinstance(gloos, str) or isinstance(fleets, str):
        return "" if fleets == gloos and "Traceback" not in fleets else f"fleet: {fleets}\ngloo: {gloos}"
    try:
        torch.testing.assert_close(fleets, gloos, rtol=tolerance, atol=tolerance / 10, equal_nan=True)
    except (AssertionError, ValueError, TypeError) as error:
        return f"{error}\nfleet: {fleets}\ngloo: {gloos}"
    return ""
