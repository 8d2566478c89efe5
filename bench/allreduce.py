"""Benchmark of all_reduce on this machine: fleet against Gloo and three MPIs. Each round measures all of them in turn.

    python bench/allreduce.py [--sizes 4K,64K,1M,16M,64M] [--world-sizes 2,4,8] [--dtypes float32] [--systems ...]
                              [--rounds 5] [--latency] [--json FILE] [--plot FILE.png]

Columns are those of nccl-tests: algbw is bytes / time, busbw is algbw * 2 (N - 1) / N, time is that of the slowest rank,
and the median of the rounds. floor is the time in which the ranks could read and write their bytes once, by the best
copy of the same rounds. Sizes are bytes, K and M are powers of 1024; --sizes none, with --latency, leaves the first table
out. fleet-shared has its tensors from comm.empty, fleet-tcp may only use sockets. MPIs come from bench/peers.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import allreduce_report as report
import peers
from allreduce_group import Group, GroupFailed, adopt_orphans, end, kill_descendants
from floor import Copiers, floor_s

SYSTEMS = ("fleet", "fleet-shared", "fleet-tcp", "gloo", "openmpi", "mpich", "impi")
ELEMENT_BYTES = {"float32": 4, "float64": 8, "int32": 4, "float16": 2, "bfloat16": 2}
HALVES = ("float16", "bfloat16")
REPEATS = {64 << 10: 200, 1 << 20: 40, 16 << 20: 6}  # calls per round up to so many bytes
REPEATS_ABOVE = 3
FLOOR_BYTES_AT_LEAST = 1 << 20  # smaller buffers live in caches, which the floor does not describe
LATENCY_BYTES = 8
OTHERS = ("broadcast", "reduce", "all_gather", "reduce_scatter", "gather", "scatter", "all_to_all", "scan")
OTHERS_BYTES = (4 << 10, 1 << 20)
RANK = Path(__file__).resolve().with_name("allreduce_rank.py")


@dataclass(frozen=True)
class Case:
    """Case of the benchmark. `bytes` is the size of a rank's larger buffer, a multiple of the world size if it is divided."""

    collective: str
    dtype: str
    bytes: int

    @property
    def count(self) -> int:
        return self.bytes // ELEMENT_BYTES[self.dtype]

    @property
    def repeats(self) -> int:
        return next((repeats for size, repeats in REPEATS.items() if self.bytes <= size), REPEATS_ABOVE)


@dataclass
class Measurement:
    """Rounds of one case for one system: seconds of the slowest rank, and wrong elements of all ranks."""

    seconds: list[float]
    wrong: int = 0


class Comparison:
    """Groups of one world size. They are asked in turn; a group that fails is left out from then on."""

    def __init__(self, world_size: int, folder: Path, copiers: Copiers, notes: report.Notes) -> None:
        self.world_size = world_size
        self._folder = folder
        self._copiers = copiers
        self._notes = notes
        self._groups: dict[str, Group] = {}

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        end(list(self._groups.values()), politely=kind is None)

    def start(self, system: str) -> None:
        folder = self._folder / str(self.world_size)
        folder.mkdir(exist_ok=True)
        group = self._groups[system] = Group(system, folder)
        try:
            group.start(command(system, self.world_size, group.address), environment(system, folder), self.world_size)
        except GroupFailed as error:
            self._leave_out(system, f"{system} does not start with {self.world_size} ranks: {error}")

    def measure(self, case: Case, rounds: int) -> tuple[dict[str, Measurement], float | None]:
        """The measurement of each system for a case, and the best bytes per second of the copies between them."""
        able = [system for system in self._groups if not (case.dtype in HALVES and system in peers.PACKAGES)]
        measured = {system: Measurement([]) for system in able}
        rates = []
        for index in range(rounds):
            if case.bytes >= FLOOR_BYTES_AT_LEAST:
                rates.append(self._copiers.bytes_per_s())
            turn = index % max(1, len(able))  # so that no system is always first, or always behind the same one
            for system in able[turn:] + able[:turn]:
                if system in measured and not self._ask(system, case, measured[system]):
                    del measured[system]
        return measured, max(rates, default=None)

    def _ask(self, system: str, case: Case, into: Measurement) -> bool:
        what = f"{case.collective} of {report.size(case.bytes)} {case.dtype} on {self.world_size} ranks"
        try:
            request = {"collective": case.collective, "count": case.count, "dtype": case.dtype}
            answers = self._groups[system].ask(**request, repeats=case.repeats)
        except GroupFailed as error:
            self._leave_out(system, f"{system} failed in {what}, and is left out from there: {error}")
            return False
        except OSError:
            self._leave_out(system, f"{system} died before {what}, and is left out from there")
            return False
        if "error" in answers[0]:  # in all answers: the ranks are still in step
            if case.collective in OTHERS:
                self._notes.remark(f"{system} has no {case.collective} here: {answers[0]['error']}")
            else:
                self._leave_out(system, f"{system} failed in {what}, and is left out from there: {answers[0]['error']}")
            return False
        into.seconds.append(max(answer["seconds"] for answer in answers))
        wrong = sum(answer["wrong"] for answer in answers)
        if wrong:
            into.wrong += wrong
            self._notes.fault(f"{system} got {wrong} elements wrong in {what}")
        return True

    def _leave_out(self, system: str, sentence: str) -> None:
        self._notes.fault(sentence)
        group = self._groups.pop(system)
        if said := group.last_lines():
            print(f"{system} said last:\n  " + "\n  ".join(said), file=sys.stderr, flush=True)
        end([group], politely=False)


def command(system: str, world_size: int, address: str) -> list[str]:
    """Starts a system's ranks, as its users do."""
    arguments = [str(RANK), system, address]
    if system.startswith("fleet"):
        return [sys.executable, "-m", "fleet", "run", "--workers", str(world_size), str(RANK), "--", system, address]
    if system == "gloo":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, f"--nproc-per-node={world_size}", *arguments]
    return peers.launcher(system, world_size, RANK, arguments[1:])


def environment(system: str, folder: Path) -> Mapping[str, str]:
    """One thread per rank for all systems, and temporary files in a folder that is removed with everything else."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    for name in ("ORCHESTRATOR_ADDR", "FLEET_SHARED_MEMORY"):
        variables.pop(name, None)
    if system == "fleet-tcp":
        variables["FLEET_SHARED_MEMORY"] = "off"
    return variables


def records(
    bench: str, case: Case, world_size: int, measured: Mapping[str, Measurement], rate: float | None
) -> list[Any]:
    """What --json writes: one object per system."""
    return [
        {
            "bench": bench,
            "system": system,
            "world_size": world_size,
            "collective": case.collective,
            "bytes": case.bytes,
            "count": case.count,
            "dtype": case.dtype,
            "op": "sum" if "reduce" in case.collective or case.collective == "scan" else None,
            "median_s": statistics.median(measurement.seconds),
            "min_s": min(measurement.seconds),
            "rounds": len(measurement.seconds),
            "repeats": case.repeats,
            "floor_s": None if rate is None else floor_s(world_size, case.bytes, rate),
            "correct": measurement.wrong == 0,
            "wrong": measurement.wrong,
        }
        for system, measurement in measured.items()
    ]


def compare(options: argparse.Namespace, systems: Sequence[str], folder: Path, notes: report.Notes) -> list[Any]:
    """All records, each printed at once. Only the groups of one world size run at a time."""
    kept: list[Any] = []
    with Copiers() as copiers:
        for world_size in options.world_sizes:
            with Comparison(world_size, folder, copiers, notes) as comparison:
                for system in systems:
                    comparison.start(system)
                if options.sizes:
                    report.header(world_size)
                for case in (Case("all_reduce", dtype, size) for dtype in options.dtypes for size in options.sizes):
                    found = records("allreduce", case, world_size, *comparison.measure(case, options.rounds))
                    report.rows(found)
                    kept += found
                if options.latency:
                    found = [
                        record for case in latency_cases(world_size) for record in latency(comparison, case, options)
                    ]
                    report.latencies(world_size, found, systems)
                    kept += found
    return kept


def latency(comparison: Comparison, case: Case, options: argparse.Namespace) -> list[Any]:
    measured, _ = comparison.measure(case, options.rounds)
    return records("latency", case, comparison.world_size, measured, None)


def latency_cases(world_size: int) -> list[Case]:
    cases = [Case("barrier", "float32", 0), Case("all_reduce", "float32", LATENCY_BYTES)]
    step = 4 * world_size
    return cases + [Case(name, "float32", size // step * step) for name in OTHERS for size in OTHERS_BYTES]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=report.sizes, default="4K,64K,1M,16M,64M")
    parser.add_argument("--world-sizes", type=lambda text: [int(part) for part in text.split(",")], default="2,4,8")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default="float32", help=", ".join(ELEMENT_BYTES))
    parser.add_argument("--systems", type=lambda text: text.split(","), default=",".join(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--latency", action="store_true", help="also barrier, 8-byte all_reduce and the other collectives"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    for chosen, known in ((options.systems, SYSTEMS), (options.dtypes, ELEMENT_BYTES)):
        if unknown := [name for name in chosen if name not in known]:
            parser.error(f"there is no {', '.join(unknown)}: there are {', '.join(known)}")
    if options.rounds < 1 or min(options.world_sizes) < 2:
        parser.error("needs at least 1 round, and 2 ranks")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which the extra `bench` installs")
    return options


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, with the number of the signal."""


def interrupt(number: int, _: object) -> None:
    """Ends the run. Further signals do not interrupt the clean-up, which takes seconds."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


def main() -> None:
    options = parse()
    notes = report.Notes()
    missing = [name for name in options.systems if name in peers.PACKAGES and not peers.installed(name)]
    if missing:
        notes.fault(f"{', '.join(missing)}: not installed, `python bench/peers.py {' '.join(missing)}` makes them")
    if set(options.systems) & set(peers.PACKAGES) and (halves := [name for name in options.dtypes if name in HALVES]):
        notes.remark(f"mpi4py has no {' and no '.join(halves)}: the MPIs are left out there")
    systems = [name for name in options.systems if name not in missing]
    adopt_orphans()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="fleet-bench-", ignore_cleanup_errors=True) as folder:
            try:
                found = compare(options, systems, Path(folder), notes)
            finally:
                kill_descendants()
    except Interrupted as error:
        sys.exit(128 + error.args[0])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    report.ratios(found)
    if options.plot and any(record["bench"] == "allreduce" for record in found):
        report.plot(found, options.plot)
    notes.repeat()
    sys.exit(1 if notes.faults else 0)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
