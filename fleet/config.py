"""Settings of this process from its environment, as typed values. No other module reads or writes the environment.

Knows names, defaults and valid values; opens no socket and starts nothing.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from fleet.errors import ConfigError
from fleet.secret import checked, read_secret

VERSION = "0.2.0"  # pyproject.toml reads it here
DEFAULT_ORCHESTRATOR = "orchestrator:50051"
ORCHESTRATOR_PORT = 50051
WORKER_PORT = 50052
DRAIN_S = 20
TORCH_BACKEND = "FLEET_TORCH_BACKEND"
TRACE = "FLEET_TRACE"
TRACE_FOLDER = ".fleet-trace"  # in a job's output folder: files with the traces of its members
CGROUP = Path("/sys/fs/cgroup")

Security = Literal["open", "plain", "curve"]


@dataclass(frozen=True)
class RankSettings:
    """A rank's settings in its environment. Its agent has the others, since a secret does not belong there."""

    control: str
    job_id: str
    attempt: int
    member_id: int
    world_size: int
    local_rank: int


def check_system() -> None:
    """Raises ConfigError on another system than Linux, before anything is imported that only Linux has."""
    if sys.platform != "linux":
        raise ConfigError(
            f"fleet runs on Linux only, and this is {sys.platform}: use a Linux machine, a container, or WSL on Windows"
        )


def rank_settings() -> RankSettings | None:
    """This process's place in a job, None outside of one."""
    control = os.environ.get("FLEET_CONTROL")
    if not control:
        return None
    try:
        return RankSettings(
            control=control,
            job_id=os.environ["FLEET_JOB"],
            attempt=int(os.environ["FLEET_ATTEMPT"]),
            member_id=int(os.environ["FLEET_RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"FLEET_CONTROL is set, but not what belongs to it ({error!r}); unset it to run alone"
        ) from None


@dataclass(frozen=True)
class TorchPlace:
    """This process's place as torchrun, or who starts processes by hand, tells it."""

    local_rank: int
    local_world_size: int  # 0: not told
    master_addr: str  # of rank 0; empty: not told
    master_port: int


def torch_place() -> TorchPlace:
    """LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, none of which must be set."""
    return TorchPlace(
        local_rank=_number("LOCAL_RANK", 0, 0, 1 << 20),
        local_world_size=_number("LOCAL_WORLD_SIZE", 0, 0, 1 << 20),
        master_addr=os.environ.get("MASTER_ADDR", ""),
        master_port=_number("MASTER_PORT", 0, 0, 65535),
    )


@dataclass(frozen=True)
class RankPlacement(RankSettings):
    """One rank's place, as its agent knows it."""

    local_world_size: int
    group_rank: int
    group_world_size: int
    master_addr: str
    master_port: int
    gpus: tuple[int, ...] | None = None  # of its machine; None: all that the agent itself may see
    output: str = ""  # folder of the files that outlive the job; empty: there is none


def rank_environment(place: RankPlacement, threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a rank: the agent's own without its secrets, fleet's variables and torchrun's.

    A script that reads torchrun's variables (Gloo's env:// rendezvous, Lightning, Accelerate) runs unchanged.
    """
    private = ("FLEET_SECRET", "FLEET_SECRET_FILE", "FLEET_CONTROL")
    environment = {name: value for name, value in os.environ.items() if name not in private}
    environment.update(extra)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment |= {
        "FLEET_CONTROL": place.control,
        "FLEET_JOB": place.job_id,
        "FLEET_ATTEMPT": str(place.attempt),
        "FLEET_RANK": str(place.member_id),
        "RANK": str(place.member_id),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "GROUP_RANK": str(place.group_rank),
        "GROUP_WORLD_SIZE": str(place.group_world_size),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(place.member_id),
        "ROLE_WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
        "TORCHELASTIC_RUN_ID": place.job_id,
        "TORCHELASTIC_RESTART_COUNT": str(place.attempt - 1),
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 listens on MASTER_PORT itself
    }
    if place.output:
        environment["FLEET_OUTPUT_DIR"] = place.output
    environment.setdefault("PYTHONUNBUFFERED", "1")  # so that output is seen at once
    if not (gpu_count() if place.gpus is None else place.gpus):
        # Without it, Accelerate on a machine without a GPU trains a model of its own in every rank.
        environment.setdefault("ACCELERATE_USE_CPU", "true")
    if place.gpus is not None:
        mine = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        # Where the agent may see some GPUs only, the numbers count those.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine[gpu] if gpu < len(mine) else str(gpu) for gpu in place.gpus)
    return environment


def replace_environment(environment: Mapping[str, str]) -> None:
    """Makes `environment` that of this process. Only a rank does this, in its own new process."""
    os.environ.clear()
    os.environ.update(environment)


def is_set(variable: str) -> bool:
    """Whether a variable of the environment is set, and not empty."""
    return bool(os.environ.get(variable))


def leave_job() -> None:
    """Makes `fleet.init()` form a world of one from here on: the process of a task is a rank to its agent only."""
    os.environ.pop("FLEET_CONTROL", None)


def threads_of_a_rank(slots: int) -> int:
    """How many threads the arithmetic of each rank may use where so many ranks share this machine."""
    return max(1, usable_cores() // slots)


def limit_threads(threads: int) -> None:
    """Sets OMP_NUM_THREADS where the user has not. The zygote's imports read that variable once."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def orchestrator_address() -> str | None:
    """ORCHESTRATOR_ADDR, None where it is unset or empty."""
    return os.environ.get("ORCHESTRATOR_ADDR") or None


def usable_cores() -> int:
    """The cores that this process may use, at least one."""
    return max(1, math.ceil(core_limit()))


def core_limit() -> float:
    """The cores that this process may use: its affinity, or the quota of its container where that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        quota, _, period = (CGROUP / "cpu.max").read_text(encoding="ascii").strip().partition(" ")  # cgroup v2
    except OSError:
        try:
            quota = (CGROUP / "cpu/cpu.cfs_quota_us").read_text(encoding="ascii").strip()  # and v1
            period = (CGROUP / "cpu/cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except OSError:
            return cores
    if not quota.isdigit() or not period.isdigit():
        return cores  # "max" and -1: no quota
    return min(cores, int(quota) / int(period))


def gpu_count() -> int:
    """The GPUs that this process may use: those of CUDA_VISIBLE_DEVICES where it is set, else the machine's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    # To CUDA, the list ends before the first name that is no device.
    return len(list(itertools.takewhile(lambda name: name.strip() not in ("", "-1"), visible.split(","))))


def worker_port() -> int:
    """WORKER_PORT: the data port of a worker's first slot, the next slot has the next one. 0: any free ports."""
    return _number("WORKER_PORT", WORKER_PORT, 0, 65535)


def worker_id(port: int) -> str | None:
    """FLEET_WORKER_ID, or a name that a restarted worker finds again: its host name and port. None: it is `@dns`,
    which stands for the name that the network's DNS has for this machine's address."""
    wanted = os.environ.get("FLEET_WORKER_ID")
    if wanted and wanted != "@dns":
        from fleet.bounds import WORKER_ID_CHARS, is_worker_id  # not for every rank: this loads msgspec

        if not is_worker_id(wanted):
            raise ConfigError(
                f"FLEET_WORKER_ID is {wanted!r}: a worker's name has 1 to {WORKER_ID_CHARS} letters, digits and _ . : @ + -"
            )
    return None if wanted == "@dns" else wanted or f"{socket.gethostname()}-{port}"


def metrics_port() -> int | None:
    """FLEET_METRICS_PORT: where /metrics and /healthz are served over HTTP. None: unset, nowhere. 0: any free port."""
    return _number("FLEET_METRICS_PORT", 0, 0, 65535) if is_set("FLEET_METRICS_PORT") else None


def health_file() -> Path | None:
    """FLEET_HEALTH_FILE: a file that an orchestrator or worker touches once a second while it is well, for health checks."""
    text = os.environ.get("FLEET_HEALTH_FILE")
    return Path(text) if text else None


def metrics_host() -> str | None:
    """FLEET_METRICS_HOST: the address that /metrics and /healthz are served at. None: unset, the process knows best."""
    return os.environ.get("FLEET_METRICS_HOST") or None


def page_at() -> str:
    """FLEET_PAGE_AT: HOST:PORT at which people reach the page. Empty: unset, where it is served."""
    return os.environ.get("FLEET_PAGE_AT", "")


def drain_s() -> float:
    """FLEET_DRAIN_S: the seconds after SIGTERM in which a worker's ranks may end by themselves."""
    return float(_number("FLEET_DRAIN_S", DRAIN_S, 0, 7 * 24 * 3600))


def state_folder(port: int) -> Path | None:
    """FLEET_STATE_DIR: where an orchestrator keeps its jobs. Else a folder of the user's for each port, None for port 0."""
    if text := os.environ.get("FLEET_STATE_DIR"):
        return Path(text)
    if not port:
        return None
    if (own := _own_place("XDG_STATE_HOME", ".local/state", str(port))) is None:
        raise ConfigError("there is no home folder to keep jobs in: say a folder with --state or FLEET_STATE_DIR")
    return own


def storage_folder() -> Path | None:
    """FLEET_STORAGE_DIR: where a worker keeps the output of jobs. Else a folder that all workers of this user here share.

    None for a user without a home.
    """
    if text := os.environ.get("FLEET_STORAGE_DIR"):
        return Path(text)
    return _own_place("XDG_STATE_HOME", ".local/state", "output")


def advertised_host() -> str | None:
    """FLEET_HOST: the address of this machine's ranks for their peers, where the one that fleet finds is wrong."""
    return os.environ.get("FLEET_HOST", "").removeprefix("[").removesuffix("]") or None


def preload() -> tuple[str, ...] | None:
    """FLEET_PRELOAD: modules, separated by commas, that are imported once and forked. None: fleet chooses."""
    text = os.environ.get("FLEET_PRELOAD")
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def torch_backend() -> str:
    """FLEET_TORCH_BACKEND: the backend of torch.distributed that scripts get in place of gloo. Empty: what they ask for."""
    return os.environ.get(TORCH_BACKEND, "")


def data_security(default: Security) -> Security:
    """FLEET_DATA_SECURITY: how tensors travel over TCP. The default is curve, but plain on loopback."""
    value = os.environ.get("FLEET_DATA_SECURITY") or default
    if value not in ("curve", "plain"):
        raise ConfigError(
            f"FLEET_DATA_SECURITY is {value!r}: say curve (encrypted), or plain (the same secret lets peers in, "
            "but tensors are not encrypted: for a trusted network)"
        )
    return cast(Security, value)


def shared_memory() -> Path | None:
    """FLEET_SHM_DIR (/dev/shm): the tmpfs that ranks of one host share. None: FLEET_SHARED_MEMORY is off."""
    shares = _is_on("FLEET_SHARED_MEMORY", "on", "on, or off for sockets between all ranks")
    return Path(os.environ.get("FLEET_SHM_DIR") or "/dev/shm") if shares else None


def keeps_pace() -> bool:
    """Whether this rank finds out who holds the others up."""
    return _is_on("FLEET_PACE", "on", "on, or off to find out nothing of who holds the others up")


def trace_folder() -> Path | None:
    """Where this rank writes its trace: in FLEET_OUTPUT_DIR, if FLEET_TRACE is on. None: nowhere."""
    traces = _is_on(TRACE, "off", "off, or on for a trace of what each rank does")
    output = os.environ.get("FLEET_OUTPUT_DIR")
    return Path(output) / TRACE_FOLDER if traces and output else None


def _is_on(variable: str, default: str, choice: str) -> bool:
    wanted = os.environ.get(variable) or default
    if wanted not in ("on", "off"):
        raise ConfigError(f"{variable} is {wanted!r}: it must be {choice}")
    return wanted == "on"


def secret(file: Path | None = None) -> str | None:
    """The cluster secret from `file`, FLEET_SECRET, FLEET_SECRET_FILE or the user's own file, in this order."""
    if file is not None:
        return read_secret(file)
    if text := given_secret():
        return text
    if path := os.environ.get("FLEET_SECRET_FILE"):
        return read_secret(Path(path))
    if (own := _own_secret()) is None:
        return None
    try:
        is_there = own.exists()
    except OSError as error:  # another user's home folder, as under su or in a container
        raise ConfigError(
            f"{own} cannot be looked at ({error.strerror}): set HOME, FLEET_SECRET_FILE or FLEET_SECRET"
        ) from None
    return read_secret(own) if is_there else None


def missing_secret(file: Path | None = None) -> Path | None:
    """The file that `secret` would read, if it is not there; None if there is a secret, or no such file could be."""
    if file is None and given_secret() is not None:
        return None
    named = file or (Path(os.environ["FLEET_SECRET_FILE"]) if is_set("FLEET_SECRET_FILE") else None)
    path = named or _own_secret()
    return None if path is None or path.exists() else path


def given_secret() -> str | None:
    """FLEET_SECRET, None where it is unset or empty."""
    text = os.environ.get("FLEET_SECRET")
    return checked(text, "FLEET_SECRET") if text else None


def secret_path() -> Path:
    """The user's own secret file, which `fleet orchestrator` on loopback makes. Raises ConfigError for a user without a home."""
    if (own := _own_secret()) is None:
        raise ConfigError("there is no home folder with a cluster secret: set FLEET_SECRET_FILE or FLEET_SECRET")
    return own


def _own_secret() -> Path | None:
    return _own_place("XDG_CONFIG_HOME", ".config", "secret")


def _own_place(variable: str, below_home: str, name: str) -> Path | None:
    """A path of the user's by the XDG base directory specification: in the variable's folder, or in one of the home folder."""
    if base := os.environ.get(variable):
        return Path(base) / "fleet" / name
    return None if (own := home()) is None else own / below_home / "fleet" / name


def home() -> Path | None:
    """The user's home folder; None for a user without one, as in a container that runs under any number."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def _number(name: str, default: int, low: int, high: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise ConfigError(f"{name} is {text!r}: it must be a whole number from {low} to {high}")
    return int(text)


@dataclass(frozen=True)
class SlurmTask:
    """This process, as one of several tasks that `srun` started together."""

    rank: int
    task_count: int
    node_count: int
    job_id: int
    first_host: str
    launched_from: str  # address of the machine that srun runs on
    local_rank: int
    local_count: int  # tasks of the step on this machine
    cores: int  # this task's share of the step's cores on this machine
    meeting_file: Path

    @property
    def port(self) -> int:
        return 15000 + self.job_id % 10000


def slurm_task() -> SlurmTask | None:
    """None outside of a Slurm step, in one of a single task (a batch script itself), and in a shell for a person."""
    number, node_list = os.environ.get("SLURM_STEP_NUM_TASKS"), os.environ.get("SLURM_STEP_NODELIST", "")
    if number is None or not number.isdigit() or int(number) < 2 or _in_slurm_shell():
        return None
    try:
        job_id, step_id = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
        folder = Path(os.environ.get("SLURM_SUBMIT_DIR") or os.getcwd())
        # A requeued job has the same numbers again. A file that its killed predecessor left is not for it.
        restart = os.environ.get("SLURM_RESTART_COUNT") or "0"
        here = tasks_on_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(os.environ.get("SLURM_NODEID", "0")))
        return SlurmTask(
            rank=int(os.environ["SLURM_PROCID"]),
            task_count=int(number),
            node_count=int(os.environ.get("SLURM_STEP_NUM_NODES", "1")),
            job_id=job_id,
            first_host=first_host(node_list),
            launched_from=os.environ.get("SLURM_LAUNCH_NODE_IPADDR", ""),
            local_rank=int(os.environ.get("SLURM_LOCALID", "0")),
            local_count=here,
            # Where Slurm binds tasks to cores, usable_cores() is less; where it does not, that is the whole machine.
            cores=min(usable_cores(), max(1, int(os.environ.get("SLURM_CPUS_ON_NODE", "1")) // here)),
            meeting_file=folder / f".fleet-step-{job_id}.{step_id}-{int(restart)}",
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(f"SLURM_STEP_NUM_TASKS is set, but not what belongs to it ({error!r})") from None


def _in_slurm_shell() -> bool:
    """Whether this is a shell for a person (`srun --pty bash`). Its step may have many tasks, one of which has the terminal.

    The job's name does not tell: in `salloc` it is `interactive` for steps of many tasks too.
    """
    is_task = os.environ.get("SLURM_TASK_PID") == str(os.getpid())
    return "SLURM_PTY_PORT" in os.environ and not is_task and os.isatty(0)


def tasks_on_node(text: str, node: int) -> int:
    """The number for one node in a list as Slurm writes it: of `4(x2),3` it is 4 for nodes 0 and 1, then 3."""
    for count, _, times in (part.rstrip(")").partition("(x") for part in text.split(",")):
        node -= int(times or 1)
        if node < 0:
            return max(1, int(count))
    return 1


def first_host(node_list: str) -> str:
    """The first name in a list as Slurm writes it: of `gpu[07-09,12],login` it is gpu07."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?", node_list)
    return found.group(1) + (found.group(2) or "") if found else ""
