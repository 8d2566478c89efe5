"""The page of a cluster: where it is served, and its address with its token."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from fleet.bus.address import EVERY_INTERFACE, is_loopback, parse
from fleet.bus.address import shown as place
from fleet.bus.lock import Lock, derive_secret
from fleet.client.queries import welcome
from fleet.client.target import Target
from fleet.errors import ConfigError

if TYPE_CHECKING:
    from fleet.orchestrator.window import Pages, Serving, Window

ANSWER_WITHIN_S = 5.0


def token_of(lock: Lock) -> str:
    """Token of the page of a cluster with this secret, which the token does not tell. Empty: there is no secret."""
    return derive_secret(lock.secret, "token of the page") if lock.secret else ""


def serving(
    host: str, port: int, lock: Lock, token: str, reachable: Callable[[str], str] = str, known_as: str = ""
) -> Serving:
    """The HTTP port of an orchestrator with its page, and the HOST:PORT of it for people, if that is another one.

    `reachable` turns the orchestrator's endpoint into one that a client here connects to.
    """

    from fleet.orchestrator.window import Serving

    def pages(window: Window) -> Pages:
        from fleet.page.pages import ClusterPages  # costs a start without a page nothing

        here = Target("this orchestrator", reachable(window.endpoint), lock, ANSWER_WITHIN_S, local=True)
        return ClusterPages(window, token, here)

    return Serving(host, port, pages, known_as)


def new_token() -> str:
    return secrets.token_hex(32)


def with_token(address: str, token: str) -> str:
    return f"http://{address}/" + (f"?token={token}" if token else "")


def address_of(target: Target, host: str) -> list[str]:
    """Lines that say where the page of a cluster is, whose orchestrator a client reaches at `host`. Raises ConfigError."""
    page_at = welcome(target).page_at
    if not page_at:
        raise ConfigError(
            f"the orchestrator at {target.name} serves no page; of a job on this machine `fleet run --dashboard` shows one"
        )
    return places(page_at, host, token_of(target.lock))


def places(page_at: str, host: str, token: str) -> list[str]:
    """As address_of, for a page that the orchestrator says to be at `page_at`."""
    served_at, port = parse(page_at, 0, "the address of the page")
    if is_loopback(served_at) and not is_loopback(host):
        return [
            with_token(f"127.0.0.1:{port}", token),
            f"served on loopback of {host} only: `ssh -L {port}:127.0.0.1:{port} {host}` brings it here, "
            "--metrics-host 0.0.0.0 would serve it to the network",
        ]
    # Any address but one for all interfaces is where the orchestrator says that people reach it.
    return [with_token(place(host if served_at in EVERY_INTERFACE else served_at, port), token)]
