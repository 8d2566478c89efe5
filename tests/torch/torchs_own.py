"""torch's own distributed tests on the backend fleet: `make test-torch`, or `python tests/torch/torchs_own.py PATTERN...`.

They are in torch's wheel (torch.testing._internal.distributed.distributed_test), and need the package expecttest. They ask for
gloo, and get fleet by zero words, as a script does; `--backend gloo` runs them on Gloo, to compare. Tests that 4 ranks are too
few for run with 8, those that only MPI passes of Gloo and NCCL run as if it were MPI. The ranks of each test are forked from
this process, which has imported torch once. Ends with 1 if a test fails that is not in DIFFERS or DIFFERS_LATER.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import os
import sys
import tempfile
import unittest
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

WITHIN_S = 60  # for one test
OUTPUT_CHARS = 20_000
# Tests that fail by design, and why.
WORDS = "expects Gloo's words in the error; fleet names the ranks that are missing in its own"
DIFFERS = {
    "test_get_backend": "zero words: dist.get_backend() answers fleet",
    "test_barrier_timeout_full_group": WORDS,
    "test_barrier_timeout_global": WORDS,
    "test_barrier_timeout_group": WORDS,
    "test_monitored_barrier_failure_order": WORDS,
    "test_monitored_barrier_gloo": WORDS,
    "test_monitored_barrier_gloo_rank_0_timeout": "a time limit of 0 is none, as in fleet's other calls",
    "test_monitored_barrier_gloo_subgroup": WORDS,
    "test_monitored_barrier_wait_all_ranks": WORDS,
}
# Those that differ with torch 2.14 and later, too.
DIFFERS_LATER = {
    "test_ddp_logging_data_cpu": "torch calls every backend in Python custom",
}


class Way(NamedTuple):
    """How a test runs: number of ranks, and the backend that its decorators look at."""

    ranks: int
    pretended: str


PLAIN = Way(4, "gloo")
# By a part of the reason for which PLAIN skips a test.
OTHER_WAYS = {"small world size": Way(8, "gloo"), "Only MPI supports": Way(8, "mpi")}


class Outcome(NamedTuple):
    kind: str  # passes, fails, hangs, skipped, differs
    why: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description="torch's own distributed tests on the backend fleet")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names of tests, as in 'test_all_reduce*'")
    parser.add_argument("--backend", choices=["fleet", "gloo"], default="fleet")
    parser.add_argument("--output", type=Path, help="folder for the output of each test that fails")
    given = parser.parse_args()
    os.environ |= {
        "DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": str(WITHIN_S),
        "FLEET_TORCH_BACKEND": "fleet" if given.backend == "fleet" else "",
        "OMP_NUM_THREADS": "1",
        "PYTORCH_PRINT_REPRO_ON_FAILURE": "0",
    }
    from fleet.torch.substitution import takes_one_of_several

    differs = DIFFERS | (DIFFERS_LATER if takes_one_of_several() else {})
    outcomes: dict[str, Outcome] = {}
    left = {PLAIN: [name for name in names() if matches(name, given.patterns)]}
    while left:
        way = next(iter(left))
        own = torchs_own(way)
        for name in left.pop(way):
            started = monotonic()
            with captured() as output:
                found = outcome(own, name)
            others = [other for part, other in OTHER_WAYS.items() if part in found.why and found.kind == "skipped"]
            if others and way == PLAIN:
                left.setdefault(others[0], []).append(name)
                continue
            if found.kind in ("fails", "hangs") and name in differs and given.backend == "fleet":
                found = Outcome("differs", differs[name])
            outcomes[name] = found
            last = found.why.strip().splitlines()[-1] if found.why else ""
            print(f"{found.kind:8}{name} ({way.ranks} ranks, {monotonic() - started:.1f} s) {last}", flush=True)
            if given.output is not None and found.kind in ("fails", "hangs"):
                given.output.mkdir(parents=True, exist_ok=True)
                (given.output / name).write_text(f"{found.why}\n{output()}")
    summary(outcomes)
    return 1 if any(found.kind in ("fails", "hangs") for found in outcomes.values()) else 0


def matches(name: str, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def names() -> list[str]:
    return list(unittest.TestLoader().getTestCaseNames(torchs_own(PLAIN)))


def torchs_own(way: Way) -> type[unittest.TestCase]:
    """The class of torch's tests, whose ranks are forks of this process."""
    os.environ |= {"BACKEND": way.pretended, "WORLD_SIZE": str(way.ranks), "INIT_METHOD": "file://"}
    import torch.multiprocessing
    from torch.testing._internal import common_distributed

    from fleet.torch import autoload

    autoload.register()
    if os.environ["FLEET_TORCH_BACKEND"]:
        importlib.import_module("fleet.torch.registration")  # here, for all ranks
    common_distributed.TIMEOUT_OVERRIDE.clear()
    name = "torch.testing._internal.distributed.distributed_test"
    sys.modules.pop(name, None)  # decorators look at the backend once
    of_torch: Any = importlib.import_module(name)
    of_torch.BACKEND = os.environ["BACKEND"] = "gloo"

    class TestOnFleet(of_torch.TestDistBackend, of_torch.DistributedTest._DistTestBase):  # type: ignore[misc, name-defined]
        def setUp(self) -> None:
            super().setUp()
            of_torch.INIT_METHOD = os.environ["INIT_METHOD"]  # this test's own file
            self._start_processes(torch.multiprocessing.get_context("fork").Process)

    return TestOnFleet


def outcome(own: type[unittest.TestCase], name: str) -> Outcome:
    result = unittest.TestResult()
    own(name).run(result)
    for _, why in (*result.failures, *result.errors):
        return Outcome("hangs" if "terminated or timed out" in why else "fails", why)
    for _, why in result.skipped:
        return Outcome("skipped", why)
    return Outcome("passes")


@contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """Output of this process and of its children, which the function that it gives returns."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        found = ""
        try:
            yield lambda: found
        finally:
            sys.stdout.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            for one in kept:
                os.close(one)
            file.seek(0)
            found = file.read().decode(errors="replace")[-OUTPUT_CHARS:]


def summary(outcomes: dict[str, Outcome]) -> None:
    print()
    for kind, count in sorted(Counter(found.kind for found in outcomes.values()).items()):
        print(f"{count:4} {kind}")
    for why, count in Counter(found.why for found in outcomes.values() if found.kind == "skipped").most_common():
        print(f"{count:4} skipped: {why}")


if __name__ == "__main__":
    sys.exit(main())
