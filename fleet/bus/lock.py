"""Who may talk: the three ways a socket is secured, and the ZAP handler that lets only holders of the secret in.

Keys are derived from one secret, so that a cluster has one thing to hand out and nothing to enrol. Two key pairs follow
from it, one for whoever binds and one for whoever connects; knowing either means holding the secret. The price: peers
are not told apart by key, so each trusts all holders.

- open: no check. For ipc:// inside a directory that only its owner may enter.
- plain: a password derived from the secret is checked, then bytes travel as they are. For a trusted network.
- curve: CurveZMQ (rfc.zeromq.org/spec/26): both sides prove that they hold the secret, all is encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from dataclasses import dataclass

import zmq
from zmq.utils import z85

from fleet.bus.strangers import SILENT_S, Strangers, happened
from fleet.config import Security

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # rfc.zeromq.org/spec/27
_STOP = b"stop"


def derive(secret: str, purpose: str) -> bytes:
    """32 bytes that only holders of the secret can compute, different for every purpose."""
    return hashlib.blake2b(purpose.encode(), key=hashlib.sha512(secret.encode()).digest(), digest_size=32).digest()


def derive_secret(secret: str, purpose: str) -> str:
    """A secret of its own for one purpose, such as one job: its holders learn nothing of the one it came from."""
    return derive(secret, purpose).hex()


@dataclass(frozen=True, repr=False)
class Lock:
    """How the sockets of one context are secured. Invariant: open if and only if there is no secret."""

    kind: Security = "open"
    secret: str = ""

    def bind(self, socket: zmq.Socket[bytes]) -> None:
        """Prepares a socket that binds: it serves only peers that hold the secret."""
        if self.kind == "open":
            return
        socket.zap_domain = b"fleet"  # without a domain libzmq asks no ZAP handler about PLAIN
        if self.kind == "plain":
            socket.plain_server = True
        else:
            socket.curve_server = True
            socket.curve_secretkey = self._key("bind")

    def connect(self, socket: zmq.Socket[bytes]) -> None:
        """Prepares a socket that connects: it proves that it holds the secret."""
        if self.kind == "plain":
            socket.plain_username = b"fleet"
            socket.plain_password = self._password()
        elif self.kind == "curve":
            socket.curve_serverkey = zmq.curve_public(self._key("bind"))
            socket.curve_secretkey = self._key("connect")
            socket.curve_publickey = zmq.curve_public(self._key("connect"))

    def admits(self, mechanism: bytes, credentials: list[bytes]) -> bool:
        """Whether a peer that shows these credentials holds the secret."""
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


class Doorkeeper:
    """The ZAP handler of one context, in a thread of its own. Must start before any socket of the context binds.

    It also reads `monitor`, that of a bound socket whose owner does not: what it says of `strangers`.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        lock: Lock,
        monitor: zmq.Socket[bytes] | None = None,
        strangers: Strangers | None = None,
    ) -> None:
        self._lock = lock
        self._monitor = monitor
        self._strangers = strangers
        self._zap = context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(_ZAP_ENDPOINT)
        stop = f"inproc://doorkeeper-{id(self)}"
        self._stopped = context.socket(zmq.PAIR)
        self._stopped.bind(stop)
        self._stop = context.socket(zmq.PAIR)
        self._stop.linger = 0
        self._stop.connect(stop)
        self._thread = threading.Thread(target=self._run, name="fleet-doorkeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.send(_STOP)
        self._thread.join()
        self._stop.close()

    def _patience_ms(self) -> int | None:
        """How long to wait for something to happen."""
        return round(SILENT_S * 1000) if self._strangers is not None and self._strangers.crowded else None

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._zap, self._stopped, self._monitor):
            if socket is not None:
                poller.register(socket, zmq.POLLIN)
        while self._stopped not in (ready := dict(poller.poll(self._patience_ms()))):
            if self._zap in ready:
                version, request_id, _domain, _address, _identity, mechanism, *credentials = self._zap.recv_multipart()
                admitted = self._lock.admits(mechanism, credentials)
                status = [b"200", b"OK"] if admitted else [b"400", b"wrong secret"]
                self._zap.send_multipart([version, request_id, *status, b"fleet" if admitted else b"", b""])
            if self._monitor is not None and self._strangers is not None:
                while self._monitor.poll(0):
                    self._strangers.saw(*happened(self._monitor))
                self._strangers.thin_out()
        for socket in (self._zap, self._stopped, self._monitor):
            if socket is not None:
                socket.close(linger=0)
