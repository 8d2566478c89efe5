"""`srun fleet run train.py`: the tasks of one Slurm step become one cluster for one job, and rank N is task N.

Task 0 embeds the orchestrator and is the client: it prints the output, and its exit code is the job's. Every task, 0 too, is a
worker with one slot. They find task 0 by a file in the folder that the step was submitted from, which only its user may read
and which is gone once all are there; it holds the address and a throw-away secret. Where the machines share no folder, set
FLEET_SECRET: then task 0 listens on port 15000 + the last four digits of the job's id, on the first machine of the list.

Knows no Slurm command and asks Slurm nothing: what a task is, config has from its environment.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

from fleet import config
from fleet.bus.address import endpoint, is_loopback, listening_host, local_address_towards, parse, shown
from fleet.bus.lock import Lock
from fleet.bus.ownership import open_own
from fleet.cli.agents import OneLineFormatter, fork_server
from fleet.cli.embedded_cluster import embedded, embedded_orchestrator
from fleet.cli.runtime import runtime_folder
from fleet.client.attached_job import say
from fleet.client.queries import workers
from fleet.client.target import Target
from fleet.errors import ConfigError, rank_set
from fleet.worker.agent import Agent, Surroundings
from fleet.worker.rank_sockets import RankSockets
from fleet.worker.state import Settings
from fleet.worker.storage import Storage
from fleet.worker.zygote import Zygote

SAY_WAITING_AFTER_S = 5.0
_POLL_S = 0.05
_FORWARDED = (signal.SIGUSR1, signal.SIGUSR2)  # signals of `sbatch --signal`, which are for the script
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def step_cluster(
    task: config.SlurmTask,
    runtime: Path,
    preload: tuple[str, ...],
    timeout_s: float,
    interrupted: Callable[[], bool],
    storage: Storage,
) -> Iterator[Target]:
    """The side of task 0. Entered when all tasks are there, or at an interruption. When left, all of the cluster has ended.

    Raises ConfigError that names the tasks which do not show up in time.
    """
    with _zygote(task, preload) as zygote:
        given = config.given_secret()
        lock = Lock("curve", given or secrets.token_urlsafe(32))
        # All interfaces: other machines may reach this one at any of them.
        bind = endpoint("127.0.0.1" if task.node_count == 1 else "*", task.port if given else 0)
        service = embedded_orchestrator(bind, lock, runtime, "by-name")
        host, port = own_address(task), int(service.endpoint.rpartition(":")[2])
        agent = _agent(task, runtime, zygote, host, port, lock, timeout_s, storage)
        target = Target("this step", endpoint(host, port), lock, timeout_s, local=True)
        with embedded(service, agent, target):
            with _meeting_file(task, None if given else f"{host} {port} {lock.secret}"):
                _wait_for_all(task, target, interrupted)
            yield target


def serve(task: config.SlurmTask, preload: tuple[str, ...], timeout_s: float, storage: Storage) -> int:
    """The side of any other task: a worker that lasts as long as task 0. Raises ConfigError if task 0 does not show up."""
    told: list[int] = []
    agents: list[Agent] = []

    def stop(number: int, _: object) -> None:
        told.append(number)
        for agent in agents:
            with suppress(OSError):  # the agent has ended
                # The first signal ends the rank, and so the job. A job that was handed back would wait for another worker.
                agent.forward(signal.SIGTERM) if len(told) == 1 else agent.stop()

    for number in _ENDING:
        signal.signal(number, stop)
    with runtime_folder() as runtime, _zygote(task, preload) as zygote:
        met = _meet(task, timeout_s, lambda: bool(told))
        if met is not None:
            agents.append(_agent(task, runtime, zygote, *met, timeout_s, storage))
            if not told:
                agents[0].run()
    return 0  # the exit code of the job is that of task 0


def own_address(task: config.SlurmTask) -> str:
    """The host at which the other machines of the step reach this one."""
    if task.node_count == 1:
        return "127.0.0.1"
    if given := config.advertised_host():
        return given
    found = local_address_towards(task.launched_from, 1)
    return socket.gethostname() if found is None or is_loopback(found) else found


def _agent(
    task: config.SlurmTask,
    runtime: Path,
    zygote: Zygote,
    host: str,
    port: int,
    lock: Lock,
    timeout_s: float,
    storage: Storage,
) -> Agent:
    here = own_address(task)
    sockets = RankSockets(
        listening_host(here), config.data_security("plain" if task.node_count == 1 else "curve"), lock.secret
    )
    agent = Agent(
        Settings(f"task-{task.rank:05d}", 1, shown(host, port), here, join_within_s=timeout_s),
        Surroundings(runtime, task.cores, storage, sockets, local=(task.local_rank, task.local_count)),
        zygote,
        endpoint(host, port),
        lock,
    )

    def forward(number: int, _: object) -> None:
        with suppress(OSError):  # the agent has ended
            agent.forward(number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    return agent


def _zygote(task: config.SlurmTask, preload: tuple[str, ...]) -> AbstractContextManager[Zygote]:
    """The fork server, and all that comes before it.

    Slurm may signal all processes of a task, not only the first (proctrack/linuxproc and pgid do), and ranks die with the zygote:
    it ignores what is not for it. So does a rank with _FORWARDED, until its script says what to do.
    """
    # Only errors are logged: a worker that loses task 0 has seen the end of the job, or ends with an error.
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    handler.setFormatter(OneLineFormatter(f"fleet: task {task.rank}: %(message)s"))
    logging.getLogger("fleet.worker").addHandler(handler)
    for number in _FORWARDED:
        signal.signal(number, signal.SIG_IGN)  # in this process only until there is an agent that forwards it
    return fork_server("a task of this step", 1, task.cores, preload)


def _wait_for_all(task: config.SlurmTask, target: Target, interrupted: Callable[[], bool]) -> None:
    started_at, said = monotonic(), False
    while not interrupted():
        here = {worker.worker_id for worker in workers(target)}
        missing = [rank for rank in range(task.task_count) if f"task-{rank:05d}" not in here]
        if not missing:
            return
        names = f"task{'s' if len(missing) > 1 else ''} {rank_set(missing, task.task_count + 1)} of this step"
        if monotonic() > started_at + target.timeout_s:
            raise ConfigError(
                f"{names} did not show up within {target.timeout_s:g} s: did they end, and do their machines reach "
                f"{target.endpoint}? (--timeout waits longer)"
            )
        if not said and monotonic() > started_at + SAY_WAITING_AFTER_S:
            said = True
            say(f"waiting for {names}, for {target.timeout_s:g} s")
        sleep(_POLL_S)


@contextmanager
def _meeting_file(task: config.SlurmTask, text: str | None) -> Iterator[None]:
    """The file that tells the other tasks the address and the secret. It has its name only once it is whole."""
    if text is None:
        yield
        return
    draft = task.meeting_file.with_name(f"{task.meeting_file.name}-{os.getpid()}")
    try:
        # A new file: another user could read one that was there before.
        with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
            file.write(text)
        draft.replace(task.meeting_file)
    except OSError as error:
        raise ConfigError(
            f"{task.meeting_file} cannot be written ({error.strerror}): set FLEET_SECRET to do without it"
        ) from None
    try:
        yield
    finally:
        task.meeting_file.unlink(missing_ok=True)


def _meet(task: config.SlurmTask, timeout_s: float, interrupted: Callable[[], bool]) -> tuple[str, int, Lock] | None:
    """(host, port, lock) of the orchestrator of task 0. None: interrupted."""
    if (given := config.given_secret()) is not None:
        host, port = parse(shown(task.first_host, task.port), task.port, "SLURM_STEP_NODELIST")
        return ("127.0.0.1" if task.node_count == 1 else host), port, Lock("curve", given)
    deadline = monotonic() + timeout_s
    while monotonic() < deadline:
        if interrupted():
            return None
        try:
            with os.fdopen(open_own(task.meeting_file), encoding="ascii") as file:
                host, text, secret = file.read().split()
            return host, int(text), Lock("curve", secret)
        except FileNotFoundError:
            sleep(_POLL_S)  # shared folders send no events
        except PermissionError:
            raise ConfigError(f"{task.meeting_file} belongs to somebody else: remove it, or set FLEET_SECRET") from None
        except OSError as error:
            raise ConfigError(f"{task.meeting_file} cannot be read: {error.strerror}") from None
    raise ConfigError(
        f"task 0 of this step did not show up within {timeout_s:g} s: {task.meeting_file} is missing. Do the machines "
        "share that folder? If not, set FLEET_SECRET to the same text for all tasks"
    )
