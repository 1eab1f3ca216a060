"""Which web pages may call: those of this server, and those of the origins it is told to allow.

A browser sends a page's requests with its user's reach: to the user's own machine and network.
Programs send no Origin and are not concerned.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from aiohttp import web

from server.errors import ApiError

__all__ = ["Origins"]

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Origins:
    """The rule for a server that listens on ``host``; ``allowed`` are origins, ``*`` is any."""

    def __init__(self, host: str, allowed: Sequence[str] = ()) -> None:
        self._allowed = frozenset(allowed)
        self._loopback = _is_loopback(host)

    def foreign(self, http: web.Request) -> str | None:
        """Return the request's Origin if it is one that is allowed by name (CORS)."""
        origin = http.headers.get("Origin")
        return origin if origin in self._allowed or "*" in self._allowed else None

    def check(self, http: web.Request) -> None:
        """Refuse what another site's page sends, and its WebSocket (RFC 6455, section 10.2).

        Where the server listens on the loopback address only, a page that has pointed its own
        name at this machine (DNS rebinding) is another site too. Raises ApiError 403.
        """
        origin = http.headers.get("Origin")
        opens_socket = http.headers.get("Upgrade", "").lower() == "websocket"
        if origin is None or (http.method in _SAFE_METHODS and not opens_socket):
            return
        if self.foreign(http):
            return
        site = urlsplit(origin)
        if site.netloc.lower() == http.host.lower() and (
            not self._loopback or _is_loopback(site.hostname or "")
        ):
            return
        raise ApiError(
            403,
            f"Pages of {origin[:100]} may not call this server; its operator can allow that "
            f"(allowed_origins).",
            kind="permission_error",
            code="origin_not_allowed",
        )

    def preflight(self, http: web.Request) -> web.Response | None:
        """Return the answer to a browser that asks what an allowed page may send."""
        if http.method != "OPTIONS" or "Access-Control-Request-Method" not in http.headers:
            return None
        if not self.foreign(http):
            return None
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST, DELETE",
                "Access-Control-Allow-Headers": http.headers.get(
                    "Access-Control-Request-Headers", "*"
                ),
                "Access-Control-Max-Age": "600",
            },
        )

    def add_headers(self, http: web.Request, response: web.StreamResponse) -> None:
        """Let an allowed page read the answer."""
        if origin := self.foreign(http):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "x-request-id, Retry-After"
            response.headers["Vary"] = "Origin"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
