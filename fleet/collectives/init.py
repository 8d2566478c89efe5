"""`fleet.init()`: from the environment of a rank to its communicator. Puts session, mesh and communicator together."""

from __future__ import annotations

import atexit
import os
import threading
from pathlib import Path

from fleet.bus import address
from fleet.bus.lock import Lock
from fleet.bus.mesh import Mesh
from fleet.bus.shared import host_key
from fleet.collectives.channel import Inbox
from fleet.collectives.communicator import Communicator, alone
from fleet.collectives.paths import Fabric
from fleet.collectives.session import Session
from fleet.config import RankSettings, joined_in, note_joined, rank_settings, shared_memory
from fleet.errors import CollectiveTimeout, UsageError

_lock = threading.Lock()
_made: tuple[int, Communicator] | None = None  # (pid that made it, the communicator of this process)


def init(timeout_s: float, join_timeout_s: float) -> Communicator:
    """See fleet.init."""
    global _made
    with _lock:
        if _made is None:
            settings = rank_settings()
            comm = alone(timeout_s) if settings is None else _join(settings, timeout_s, join_timeout_s)
            _made = os.getpid(), comm
        pid, comm = _made
        if pid != os.getpid():
            raise UsageError(
                f"fleet.init() was called in pid {pid}, of which this process (pid {os.getpid()}) is a fork"
            )
        return comm


def _check_not_taken(settings: RankSettings) -> None:
    """Raises UsageError in a process that multiprocessing or the script has started after it was a rank itself."""
    pid = joined_in(settings)
    if pid in (None, os.getpid()):  # its own: the script has replaced itself by exec
        return
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return
    raise UsageError(
        f"fleet.init() was called as rank {settings.member_id} in pid {pid}, which started this process (pid {os.getpid()}), and "
        'each rank is one process: call it behind `if __name__ == "__main__":`, which a process of multiprocessing does not run'
    )


def _join(settings: RankSettings, timeout_s: float, join_timeout_s: float) -> Communicator:
    _check_not_taken(settings)
    holder: list[Communicator] = []
    session = Session(settings, os.getpid(), lambda: holder[0].recorders if holder else [])
    directory = shared_memory()
    try:
        welcome = session.welcome()
        lock = Lock(welcome.security, welcome.secret if welcome.security != "open" else "")
        mesh = Mesh(lock, welcome.bind, session.strangers)
        session.unreached = mesh.unreached
        try:
            reached_at = _reachable(mesh.endpoint, welcome.advertise)
            world = session.join(reached_at, host_key(directory) if directory is not None else "", join_timeout_s)
            if world is None:
                late = [activity.late for activity in session.inquire() if activity.sequence < 0]
                raise CollectiveTimeout(
                    0, "fleet.init()", settings.member_id, join_timeout_s, late, settings.world_size
                )
            rank = world.rank_of(settings.member_id)
            addresses = [member.address for member in world.members]
            inbox = Inbox(mesh, rank, addresses, world.world_id, session.check)
            name = f"{settings.job_id}-{settings.attempt}-{world.generation}"
            comm = Communicator(
                rank,
                range(world.size),
                Fabric(inbox, world.members, directory or Path(), name, session.check, welcome.secret, session.ended),
                timeout_s=timeout_s,
                local_rank=settings.local_rank,
                generation=world.generation,
                inquire=session.inquire,
            )
        except BaseException:
            mesh.close(linger=False)
            raise
    except BaseException:
        session.close()
        raise
    holder.append(comm)
    pid = os.getpid()
    note_joined(settings, pid)

    def end() -> None:
        if os.getpid() == pid:  # a forked child inherits this hook, and nothing that it would end
            comm.close()
            session.close()

    atexit.register(end)
    return comm


def _reachable(bound: str, advertise: str) -> str:
    """The bound endpoint as others must connect to it."""
    return address.endpoint(advertise, bound.rpartition(":")[2]) if advertise else bound
