"""`fleet.init()`: the communicator of this process, from its environment."""

from __future__ import annotations

import atexit
import os
import threading

from fleet.bus import address
from fleet.bus.lock import Lock
from fleet.bus.mesh import Mesh
from fleet.bus.shared_memory import host_key
from fleet.collectives.communicator import Communicator, alone
from fleet.collectives.inbox import Receiver
from fleet.collectives.rendezvous import assemble, meet_again
from fleet.collectives.session import Session
from fleet.config import RankSettings, rank_settings, shared_memory
from fleet.errors import UsageError


class LocalMember:
    """Session and sockets of this process as a member of a job. They outlive its generations."""

    def __init__(self, settings: RankSettings) -> None:
        self._settings = settings
        before = _session
        self._session = _open_session(settings)
        self._made_session = self._session is not before  # else it serves records of other backends, too
        try:
            welcome = self._session.welcome()
            lock = Lock(welcome.security, welcome.secret if welcome.security != "open" else "")
            mesh = Mesh(lock, welcome.bind, self._session.strangers)
        except BaseException:
            if self._made_session:
                _close_session()
            raise
        self._session.flights.unreached = mesh.unreached
        self._receiver = Receiver(mesh)
        self._secret = welcome.secret
        # The inbox's endpoint for other members.
        port = mesh.endpoint.rpartition(":")[2]
        self._address = address.endpoint(welcome.advertise, port) if welcome.advertise else mesh.endpoint

    def form(self, timeout_s: float, join_timeout_s: float) -> Communicator:
        """The communicator of the next generation. All generations have the members of the first one."""
        directory, session = shared_memory(), self._session
        if not session.news.generations:
            memory = host_key(directory) if directory is not None else ""
            generation = session.join(self._address, memory, join_timeout_s)
        else:
            generation = meet_again(session.news, self._receiver, session, join_timeout_s)
        return assemble(
            generation, self._receiver, session,
            directory=directory, secret=self._secret, timeout_s=timeout_s, local_rank=self._settings.local_rank,
        )  # fmt: skip

    def close(self, linger: bool = True) -> None:
        self._session.flights.unreached = tuple
        self._receiver.close(linger)
        if self._made_session:
            _close_session()


_lock = threading.Lock()
_pid = 0  # of the process that made what follows
_session: Session | None = None
_member: LocalMember | None = None  # None: outside `fleet run`
_comm: Communicator | None = None  # the last one of this process


def init(timeout_s: float, join_timeout_s: float) -> Communicator:
    """See fleet.init."""
    global _comm, _member, _pid
    with _lock:
        if _comm is not None and _pid != os.getpid():
            raise UsageError(
                f"fleet.init() was called in pid {_pid}, of which this process (pid {os.getpid()}) is a fork"
            )
        if _comm is not None and not _comm.closed:
            return _comm
        if _member is not None:
            _comm = _member.form(timeout_s, join_timeout_s)
        elif (settings := rank_settings()) is None:
            _comm = alone(timeout_s)
        else:
            member = LocalMember(settings)
            try:
                _comm = member.form(timeout_s, join_timeout_s)
            except BaseException:
                member.close(linger=False)
                raise
            _member = member
        _pid = os.getpid()
        return _comm


def session(settings: RankSettings) -> Session | None:
    """The session of this rank's process, which its agent has welcomed; None in a fork of it. Forms no world.

    Raises FleetError if the agent refuses this process, or does not answer.
    """
    with _lock:
        if _session is not None:
            return _session if _pid == os.getpid() else None
        made = _open_session(settings)
        try:
            made.welcome()
        except BaseException:
            _close_session()
            raise
        return made


def _open_session(settings: RankSettings) -> Session:
    global _pid, _session
    if _session is None or _pid != os.getpid():
        _session, _pid = Session(settings, os.getpid()), os.getpid()
        atexit.register(_end)
    return _session


def _close_session() -> None:
    global _session
    if _session is not None:
        _session.close()
        _session = None
        atexit.unregister(_end)


def _end() -> None:
    """Closes all at the end of the process. A forked child inherits this hook, and closes nothing."""
    if _pid != os.getpid():
        return
    if _comm is not None and _member is not None:
        _comm.close()
        _member.close()
    _close_session()
