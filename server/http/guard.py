"""What a browser must not be talked into: requests that some web page makes it send to a server on this machine.

Such a page cannot read the answers, and cannot send JSON without asking first, unless its own name leads here (DNS
rebinding). So names are checked where there are no keys, and what needs no asking is refused to other sites.
"""

from __future__ import annotations

import ipaddress

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from server.http.errors import ApiError

JSON = "application/json"
OWN_SITE = frozenset({"same-origin", "none"})
"""What browsers say in Sec-Fetch-Site of this server's own pages, and of what the person at the browser typed."""


def guard(own: str, allowed_hosts: str | None, *, has_keys: bool) -> Middleware:
    """The middleware that refuses them, for a server that listens on the address `own`."""
    own = own.lower()
    allowed = {own, *(name.strip("[] ").lower() for name in (allowed_hosts or "").split(","))} - {""}
    checks_names = allowed_hosts is not None or (is_loopback(own) and not has_keys)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if checks_names and (host := request.headers.get(hdrs.HOST)) is not None:
            name = host_name(host)
            if not (is_loopback(name) or name in allowed):
                raise ApiError(
                    403,
                    f"this server answers to names of this machine only, not to {name[:100]!r}: start it with "
                    "--allowed-hosts to add others",
                    code="host_not_allowed",
                )
        if request.method == hdrs.METH_POST:
            _check_body(request)
        return await handler(request)

    return check


def _check_body(request: web.Request) -> None:
    """Raises `ApiError` for a body that is not to be read."""
    if (encoding := request.headers.get(hdrs.CONTENT_ENCODING, "identity")).lower() != "identity":
        raise ApiError(415, f"request bodies are read as they are, not in Content-Encoding {encoding[:40]!r}")
    if _is_of_another_site(request) and request.content_type != JSON:
        raise ApiError(415, f"a page of another site can send {JSON} only")


def _is_of_another_site(request: web.Request) -> bool:
    if request.headers.get("Sec-Fetch-Site", "none").lower() not in OWN_SITE:
        return True
    origin = request.headers.get(hdrs.ORIGIN)
    return origin is not None and origin.partition("://")[2].lower() != request.headers.get(hdrs.HOST, "").lower()


def host_name(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


def is_loopback(name: str) -> bool:
    """Whether only this machine has this name or address, so that no other site can."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
