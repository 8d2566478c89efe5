"""Rendezvous through torch's Store, under torchrun and where processes are started by hand: without agent and orchestrator.

Rank 0 makes a secret and puts it into the Store, which has no lock of its own: whoever reaches the Store can be a rank. Every
rank puts its address there, and rank 0 the world. The Store is not used from then on; see relay.py.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from time import sleep
from typing import Any, TypeVar

import msgspec
from torch._C import _distributed_c10d as c10d

from fleet import messages as m
from fleet.bounds import REASON_CHARS
from fleet.bus import address, forks
from fleet.bus.lock import Lock, derive_secret
from fleet.bus.mesh import Mesh
from fleet.bus.process import Watch, numbering
from fleet.bus.shared_memory import host_key
from fleet.bus.strangers import Strangers
from fleet.collectives.communicator import Communicator
from fleet.collectives.generations import Generation, RankActivity
from fleet.collectives.inbox import Receiver
from fleet.collectives.rendezvous import assemble
from fleet.collectives.session import Session
from fleet.config import RankSettings, Security, TorchPlace, advertised_host, data_security, shared_memory, torch_place
from fleet.errors import CollectiveTimeout, FleetError, Late
from fleet.stillness import Deadline
from fleet.torch.relay import Relay
from fleet.values import RankStatus
from fleet.world import Member, World, world_id

CALL = "init_process_group()"
ANYWHERE = "192.0.2.1"  # RFC 5737: an address of no machine, towards which the default route leads
LOOK_UP_S, LOOK_UP_AT_MOST_S = 0.002, 0.1  # between two looks into the Store
WORLD_WITHIN_S = 10.0  # for rank 0, once all have come

Values = TypeVar("Values", bound=msgspec.Struct)


class Invitation(msgspec.Struct, frozen=True):
    """What rank 0 puts into the Store before all else."""

    secret: str
    security: Security
    relay: str  # endpoint


class Card(msgspec.Struct, frozen=True):
    """One rank, as it puts itself into the Store."""

    member: Member
    numbering: str  # see bus.process.numbering


class Cards(msgspec.Struct, frozen=True):
    """All ranks, in order."""

    cards: list[Card]


class StoreRendezvous:
    """Meeting point of one world's ranks in a Store. A later world may use the same Store."""

    def __init__(self, store: Any, rank: int, size: int, place: TorchPlace, timeout_s: float) -> None:
        """Raises CollectiveTimeout if rank 0 does not come within `timeout_s`."""
        self._rank, self._size, self._place = rank, size, place
        # Counts this rank's worlds in the Store, so that no rank reads what an earlier world left there.
        number = store.add(f"fleet/worlds of rank {rank}", 1)
        self._store = c10d.PrefixStore(f"fleet/{number}", store)
        self.host = advertised_host() or own_host(place, size)
        self.relay: Relay | None = None  # of rank 0
        self._job_id = ""
        self._session: Session | None = None
        if rank == 0:
            invitation = self._invite()
        else:
            invitation = self._get("invitation", Invitation, timeout_s, self._missing_host)
        self.secret = invitation.secret
        self.lock = Lock(invitation.security, invitation.secret)
        self._relay_at = invitation.relay

    def join(self, address: str, memory: str, timeout_s: float) -> Generation:
        """See Rendezvous.join. Called once."""
        # A name for the eye: the address is what tells machines apart.
        name = "".join(c for c in socket.gethostname() if c.isalnum() or c in "-_.") or "host"
        mine = Card(Member(self._rank, name[:100], self.host, os.getpid(), address, memory), numbering())
        self._set(f"rank {self._rank}", mine)
        if self._rank == 0:
            self._set("world", Cards([self._card(rank, timeout_s) for rank in range(self._size)]))
        cards = self._get("world", Cards, timeout_s + WORLD_WITHIN_S * (self._rank > 0), self._missing).cards
        job_id = self._job_id = derive_secret(self.secret, "job")[:32]
        if self.relay is not None:
            hosts = {card.member.member_id: card.member.host for card in cards}
            self.relay.start(hosts, Watch(watched(job_id, cards[1:], "rank 0")))
        watch = Watch(watched(job_id, cards[: self._rank][:1], f"rank {self._rank}"))
        settings = RankSettings(self._relay_at, job_id, 1, self._rank, self._size, self._place.local_rank)
        self._session = Session(settings, os.getpid(), self.lock, watch)
        generation = self._session.news.form(World(1, world_id(job_id, 1, 1), tuple(card.member for card in cards)))
        try:
            self._session.welcome()
        except FleetError:
            raise FleetError(
                f"{CALL}: rank 0 at {self._relay_at} does not answer rank {self._rank}: is a firewall between them? Ranks "
                "connect to each other on any port, at FLEET_HOST where that is set"
            ) from None
        return generation

    def inquire(self, world: World, communicator_id: int, sequence: int) -> list[RankActivity]:
        """See Rendezvous.inquire."""
        assert self._session is not None  # there is a world
        return self._session.inquire(world, communicator_id, sequence)

    def tell_of(self, mesh: Mesh) -> None:
        """Lets this rank's answers tell of addresses that `mesh` does not reach."""
        assert self._session is not None
        self._session.flights.unreached = mesh.unreached

    def close(self, error: BaseException | None, at_exit: bool) -> None:
        """Ends this rank's part; `error` is what ends the process. Until `at_exit` rank 0 relays for the others."""
        if self._session is not None:
            self._session.send(self._last_news(error))
            self._session.close()
        if self.relay is not None and (at_exit or self._session is None):
            self.relay.close()
        elif self.relay is not None:
            self.relay.leave()

    def _last_news(self, error: BaseException | None) -> m.MemberLost:
        assert self._session is not None
        reason = "" if error is None else f"it has raised {type(error).__name__}: {error}"[:REASON_CHARS]
        mine = self._session.news.generations[-1].world.members[self._rank]
        status = RankStatus(
            mine.member_id, mine.worker_id, mine.host, mine.pid, 0 if error is None else 1, reason=reason
        )
        return m.MemberLost(self._job_id, 1, status, reason or "has ended", self._session.flights.made())

    def _invite(self) -> Invitation:
        security = data_security("plain" if address.is_loopback(self.host) else "curve")
        secret = secrets.token_hex(32)
        self.relay = Relay(Lock(security, secret), address.listening_host(self.host))
        invitation = Invitation(secret, security, address.endpoint(self.host, self.relay.port))
        self._set("invitation", invitation)
        return invitation

    def _card(self, rank: int, timeout_s: float) -> Card:
        return self._get(f"rank {rank}", Card, timeout_s, self._missing)

    def _missing(self) -> list[Late]:
        """The ranks that have not come, or rank 0, which has not said that all have."""
        late = [rank for rank in range(self._size) if not self._store.check([f"rank {rank}"])]
        return [Late(rank, "?", 0, f"has not called {CALL}") for rank in late] or self._missing_host()

    def _missing_host(self) -> list[Late]:
        return [Late(0, "?", 0, f"has not put the world into the Store at {self._place.master_addr or 'its file'}")]

    def _set(self, key: str, value: msgspec.Struct) -> None:
        self._store.set(key, msgspec.json.encode(value).decode())

    def _get(self, key: str, kind: type[Values], timeout_s: float, missing: Callable[[], list[Late]]) -> Values:
        """What another rank puts into the Store. Looks often rather than waits there, so that Ctrl-C ends it."""
        pause_s = LOOK_UP_S
        for wait_s in Deadline(timeout_s).waits(LOOK_UP_AT_MOST_S):
            if self._store.check([key]):
                return msgspec.json.decode(self._store.get(key), type=kind)
            sleep(min(wait_s, pause_s))
            pause_s *= 1.5
        raise CollectiveTimeout(0, CALL, self._rank, timeout_s, missing(), self._size)


def own_host(place: TorchPlace, size: int) -> str:
    """The address of this machine that the other ranks reach: of the interface towards MASTER_ADDR."""
    found = address.local_address_towards(place.master_addr, place.master_port or 1) if place.master_addr else None
    host = found or "127.0.0.1"
    if address.is_loopback(host) and 0 < place.local_world_size < size:
        # MASTER_ADDR is this machine's own name, which its /etc/hosts has as a loopback address.
        return address.local_address_towards(ANYWHERE, 1) or host
    return host


def watched(job_id: str, cards: list[Card], by: str) -> dict[int, tuple[int | None, m.MemberLost]]:
    """These ranks, with the news of each one's loss, for a Watch in this process. `by` is the rank of this process."""
    found: dict[int, tuple[int | None, m.MemberLost]] = {}
    for card in cards:
        member, here = card.member, bool(card.numbering) and card.numbering == numbering()
        reason = "its process has ended" if here else f"its connection to {by} is lost: it has ended, or is cut off"
        status = RankStatus(member.member_id, member.worker_id, member.host, member.pid, 0, reason=reason)
        found[member.member_id] = member.pid if here else None, m.MemberLost(job_id, 1, status, reason)
    return found


class StoreMember:
    """Rendezvous and sockets of this process as a rank of one world, and the world's communicator."""

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float) -> None:
        self._forks = forks.count
        self._closed = False
        place = torch_place()
        rendezvous = StoreRendezvous(store, rank, size, place, timeout_s)
        self._rendezvous = rendezvous
        self._receiver: Receiver | None = None
        try:
            mesh = Mesh(
                rendezvous.lock, address.endpoint(address.listening_host(rendezvous.host), "*"), Strangers(says=False)
            )
            self._receiver = Receiver(mesh)
            directory = shared_memory()
            memory = host_key(directory) if directory is not None else ""
            port = mesh.endpoint.rpartition(":")[2]
            generation = rendezvous.join(address.endpoint(rendezvous.host, port), memory, timeout_s)
            rendezvous.tell_of(mesh)
            self.comm: Communicator = assemble(
                generation, self._receiver, rendezvous,
                directory=directory, secret=rendezvous.secret, timeout_s=timeout_s, local_rank=place.local_rank,
            )  # fmt: skip
        except BaseException as error:
            self._close(error, at_exit=True)
            raise

    def close(self, error: BaseException | None = None, at_exit: bool = False) -> None:
        """Closes all, once; `error` is what ends the process. A forked child closes nothing."""
        if self._closed or self._forks != forks.count:
            return
        self._closed = True
        self.comm.close()
        self._close(error, at_exit)

    @property
    def relay(self) -> Relay | None:
        """What still relays for other ranks after `close`, until it is closed itself."""
        return self._rendezvous.relay if self._forks == forks.count else None

    def _close(self, error: BaseException | None, at_exit: bool) -> None:
        if self._receiver is not None:
            self._receiver.close(linger=error is None)
        self._rendezvous.close(error, at_exit)
