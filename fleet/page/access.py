"""Access to the page: who may see it, and who may act. Pure.

Whoever has the token may do what a holder of the cluster secret may: cancel jobs, read their output. A browser shows the token
once, in the address that `fleet dashboard` prints, and keeps a cookie then. Without a secret the page is for this machine alone.
A page of another site can send a browser here, and can rebind its own name to this address; it neither sees the cookie nor names
this host (docs/MONITORING.md).
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from urllib.parse import parse_qs, urlsplit

from fleet.httpd import HttpRequest, HttpResponse, plain

COOKIE = "fleet-page"
# Nothing but this server's own files runs, is shown or is asked; no other page frames this one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GUARDED = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
NOT_KEPT = ("Cache-Control", "no-store")
_SEE_HERE = (
    "this page needs its token: `fleet dashboard` prints the address with it, as `fleet run --dashboard` has done"
)
_IN = b"""<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=/">
<title>fleet</title><a href="/">The page</a></html>
"""


@dataclass(frozen=True)
class Access:
    """Rules for each request. An empty token: there is no secret, and only this machine is let in."""

    token: str

    def refusal(self, request: HttpRequest) -> HttpResponse | None:
        """The answer to somebody who is not let in; None: the request may be answered."""
        host = request.headers.get("host", "")
        if not self.token and not (_is_loopback(request.peer) and _names_loopback(host)):
            said = "without a cluster secret the page is for this machine alone: http://127.0.0.1 and the port"
            return _refused(said, HTTPStatus.FORBIDDEN)
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _is_visit(request):
            return _refused("another site may not ask here", HTTPStatus.FORBIDDEN)
        if (origin := request.headers.get("origin")) is not None and not _is_of(origin, host):
            return _refused("another site may not ask here", HTTPStatus.FORBIDDEN)
        if self.token and not self._has_cookie(request):
            return _refused(_SEE_HERE, HTTPStatus.UNAUTHORIZED)
        if request.method == "POST":
            if request.headers.get("origin") is None:
                return _refused("an action comes from the page itself", HTTPStatus.FORBIDDEN)
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                return _refused("an action is JSON", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        return None

    def entry(self, request: HttpRequest) -> HttpResponse | None:
        """The answer to an address with a token: a cookie, and the way to the page. None: the address has none.

        The page follows by a refresh: to a redirect after a link of another site, a browser sends no such cookie.
        """
        given = parse_qs(request.query).get("token", [""])[0]
        if not given or not self.token:
            return None
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return _refused(f"this is not the token of this cluster's page; {_SEE_HERE}", HTTPStatus.UNAUTHORIZED)
        kept = f"{_cookie_name(request)}={self._cookie}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"
        return HttpResponse("text/html; charset=utf-8", _IN, headers=(*GUARDED, NOT_KEPT, ("Set-Cookie", kept)))

    @property
    def _cookie(self) -> str:
        return hmac.new(self.token.encode(), b"cookie", hashlib.sha256).hexdigest()

    def _has_cookie(self, request: HttpRequest) -> bool:
        pairs = (pair.strip().partition("=") for pair in request.headers.get("cookie", "").split(";"))
        given = [value for name, _, value in pairs if name == _cookie_name(request)]
        return any(hmac.compare_digest(value.encode(), self._cookie.encode()) for value in given)


def _cookie_name(request: HttpRequest) -> str:
    """A browser's cookies do not know ports: the name has this one."""
    port = request.headers.get("host", "").rpartition(":")[2]
    return f"{COOKIE}-{port if port.isdigit() else '80'}"


def _is_visit(request: HttpRequest) -> bool:
    """Whether a person follows a link to the page itself, which shows nothing to the site that the link is of."""
    return request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"


def _is_of(origin: str, host: str) -> bool:
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _names_loopback(host: str) -> bool:
    """Whether a Host header names this machine to itself. A name that another site rebinds is any other one."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def _refused(text: str, status: HTTPStatus) -> HttpResponse:
    answer = plain(text, status)
    return HttpResponse(answer.content_type, answer.body, status, (*GUARDED, NOT_KEPT))
