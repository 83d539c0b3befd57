"""Who may ask: the bearer token, and protection of a loopback server from web pages.

A page of another site that a browser on this machine shows may send requests to 127.0.0.1. It cannot
send JSON there without asking first (no CORS header is ever given, and other content types are
refused), and a host name that an attacker points to 127.0.0.1 is not in the list of hosts.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from qvlm_runtime.serve.asgi import HttpError, Scope, header

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Access:
    """token: None lets everybody in. hosts: names the Host header may have; None means any."""

    token: str | None = None
    hosts: frozenset[str] | None = LOOPBACK

    def check_host(self, scope: Scope) -> None:
        """HttpError 421 for a host name that is not this server's."""
        if self.hosts is not None and host_name(header(scope, "host")) not in self.hosts:
            raise HttpError(421, "host: not a name of this server. Start it with --allow-host.")

    def check_token(self, scope: Scope) -> None:
        """HttpError 401 without the right token; the comparison takes the same time for any."""
        if self.token is None:
            return
        scheme, _, given = header(scope, "authorization").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode())
        if scheme.lower() != "bearer" or not right:
            raise HttpError(
                401,
                "authorization: expected the server's bearer token.",
                "authentication_error",
                {"www-authenticate": "Bearer"},
            )

    @staticmethod
    def check_json(scope: Scope) -> None:
        """HttpError 415 for a content type that a browser would send without asking first."""
        kind = header(scope, "content-type").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HttpError(415, f"content-type: got {kind!r}, expected application/json.")


def host_name(host: str) -> str:
    """The name in a Host header: without the port, an IPv6 address without its brackets; in lower case."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] or host if host.count(":") == 1 else host
