"""A Slurm of one node for a test: its own munged, slurmctld and slurmd, in a folder and on ports of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fleet.bus.address import free_port

CPUS = 8  # more than there are: ranks of tests mostly wait
STARTS_WITHIN_S = 30.0
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={control_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why Slurm cannot run here; empty if it can."""
    for command in ("slurmctld", "slurmd", "munged", "srun"):
        if shutil.which(command) is None:
            return f"{command} is not installed (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


@contextmanager
def slurm_node(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which srun, sbatch and scancel find it, once its node is idle."""
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    # munged refuses a socket or a key that others could have made.
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(host=host, folder=folder, control_port=free_port(), node_port=free_port(), cpus=CPUS)
    )
    environment = os.environ | {"SLURM_CONF": str(config)}
    munged = [
        "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
        f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munged.log",
    ]  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]):
            log = (folder / f"{command[0]}.out").open("wb")
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            log.close()
            if command is munged:
                _until(lambda: (folder / "munge.socket").exists(), folder, "munged")
        _until(lambda: _told(environment, "sinfo", "-h", "-o", "%T") == "idle", folder, "slurm")
        yield environment
    finally:
        # Of a test that failed: the process that slurmd starts for a step outlives slurmd.
        subprocess.run(["scancel", "--user", "root"], env=environment, check=False)
        with contextlib.suppress(AssertionError):
            _until(lambda: not _told(environment, "squeue", "-h"), folder, "an empty queue")
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _told(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


def _until(what: Callable[[], bool], folder: Path, name: str) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while not what():
        logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.[lo][ou][gt]"))
        assert time.monotonic() < deadline, f"{name} did not start:\n{logs}"
        time.sleep(0.1)
