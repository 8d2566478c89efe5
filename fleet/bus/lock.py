"""Security of sockets: three mechanisms, and the ZAP handler that admits only holders of the secret.

All keys are derived from one secret, so a cluster has one thing to hand out and enrols nobody. The secret yields two key
pairs, one for sockets that bind and one for sockets that connect. Knowing either pair means holding the secret. The price
is that keys do not tell peers apart: each peer trusts all holders.

- open: no check. For ipc:// inside a directory that only its owner may enter.
- plain: a password derived from the secret is checked, then bytes travel unencrypted. For a trusted network.
- curve: CurveZMQ (rfc.zeromq.org/spec/26): both sides prove that they hold the secret, and all bytes are encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from dataclasses import dataclass
from typing import NamedTuple

import zmq
from zmq.utils import z85

from fleet.bus.poller import Poller, Wake
from fleet.bus.strangers import SILENT_S, Strangers, happened
from fleet.config import Security

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # rfc.zeromq.org/spec/27


def derive(secret: str, purpose: str) -> bytes:
    """32 bytes that only holders of the secret can compute, different for every purpose."""
    return hashlib.blake2b(purpose.encode(), key=hashlib.sha512(secret.encode()).digest(), digest_size=32).digest()


def derive_secret(secret: str, purpose: str) -> str:
    """A secret for one purpose, such as one job. Its holders learn nothing of `secret`."""
    return derive(secret, purpose).hex()


@dataclass(frozen=True, repr=False)
class Lock:
    """Security of the sockets of one context. Invariant: open if and only if there is no secret."""

    kind: Security = "open"
    secret: str = ""

    def bind(self, socket: zmq.Socket[bytes]) -> None:
        """Prepares a socket that binds. It will serve only holders of the secret."""
        if self.kind == "open":
            return
        socket.zap_domain = b"fleet"  # without a domain libzmq asks no ZAP handler about PLAIN
        if self.kind == "plain":
            socket.plain_server = True
        else:
            socket.curve_server = True
            socket.curve_secretkey = self._key("bind")

    def connect(self, socket: zmq.Socket[bytes]) -> None:
        """Prepares a socket that connects. It will prove that it holds the secret."""
        if self.kind == "plain":
            socket.plain_username = b"fleet"
            socket.plain_password = self._password()
        elif self.kind == "curve":
            socket.curve_serverkey = zmq.curve_public(self._key("bind"))
            socket.curve_secretkey = self._key("connect")
            socket.curve_publickey = zmq.curve_public(self._key("connect"))

    def admits(self, mechanism: bytes, credentials: list[bytes]) -> bool:
        """Whether these credentials prove that a peer holds the secret."""
        if self.kind == "curve" and mechanism == b"CURVE" and len(credentials) == 1:
            return hmac.compare_digest(z85.encode(credentials[0]), zmq.curve_public(self._key("connect")))
        if self.kind == "plain" and mechanism == b"PLAIN" and len(credentials) == 2:
            return hmac.compare_digest(credentials[1], self._password())
        return False

    def _key(self, side: str) -> bytes:
        key: bytes = z85.encode(derive(self.secret, f"curve {side}"))
        return key

    def _password(self) -> bytes:
        return derive_secret(self.secret, "plain").encode()


class Watched(NamedTuple):
    """A bound socket's monitor, and the refused connections of that socket."""

    monitor: zmq.Socket[bytes]
    strangers: Strangers


class Doorkeeper:
    """ZAP handler of one context, in a thread of its own. Must start before any socket of the context binds.

    Its thread also reads the monitor of one bound socket, and passes the events to its strangers.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], lock: Lock, watched: Watched | None) -> None:
        self._lock = lock
        self._watched = watched
        self._zap = context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(_ZAP_ENDPOINT)
        self._stop = Wake()
        self._thread = threading.Thread(target=self._run, name="fleet-doorkeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._stop.close()

    def _run(self) -> None:
        watched = self._watched
        sockets = [self._zap] if watched is None else [self._zap, watched.monitor]
        poller = Poller([*sockets, self._stop])
        while True:
            crowded = watched is not None and watched.strangers.crowded
            ready = poller.wait(SILENT_S if crowded else None)
            if self._stop.fileno() in ready:
                break
            if self._zap in ready:
                version, request_id, _domain, _address, _identity, mechanism, *credentials = self._zap.recv_multipart()
                admitted = self._lock.admits(mechanism, credentials)
                status = [b"200", b"OK"] if admitted else [b"400", b"wrong secret"]
                self._zap.send_multipart([version, request_id, *status, b"fleet" if admitted else b"", b""])
            if watched is not None:
                while watched.monitor.poll(0):
                    watched.strangers.saw(*happened(watched.monitor))
                watched.strangers.thin_out()
        for socket in sockets:
            socket.close(linger=0)
