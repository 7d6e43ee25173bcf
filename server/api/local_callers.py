"""Whether a request was sent by a program on this machine: what adapters are managed by when there is no admin key.

Three things can make a request from elsewhere look local. A proxy on this machine passes on what strangers sent to
it. A browser on this machine runs other sites' pages, which may send requests here. And such a page may have its own
name resolve to this machine (DNS rebinding), after which the browser takes the server for the page's own.
"""

import ipaddress
import re

from fastapi import Request

from manylora.server.api.dependencies import ApiSettings
from manylora.server.errors import Forbidden

PROXY_HEADERS = frozenset(
    {
        "forwarded",
        "via",
        "x-real-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "x-envoy-external-address",
        "x-appengine-user-ip",
        "x-azure-clientip",
        "x-original-forwarded-for",
        "x-proxyuser-ip",
        "client-ip",
        "true-client-ip",
        "fastly-client-ip",
        "fly-client-ip",
        "proxy-client-ip",
        "wl-proxy-client-ip",
        "x-arr-clientip",
        "x-original-host",
        "x-scheme",
    }
)
PROXY_PREFIXES = ("x-forwarded", "cf-", "x-amzn-", "x-amz-cf-", "tailscale-")
"""Headers that proxies, load balancers and tunnels add, and no client of its own accord."""
_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
"""A host and a port as browsers write them: no user, no path, nothing that two parsers could read in two ways."""


def require_local(request: Request, settings: ApiSettings) -> None:
    """Raise Forbidden unless a program on this machine, or a page whose origin is named, sent the request."""
    proxy = _proxy_header(request)
    if proxy is not None:
        raise Forbidden(
            f"adapters are managed from this machine only, and this request came through a proxy (its header {proxy!r}"
            " says so): start with --admin-key to allow others"
        )
    if not _arrived_from_here(request):
        raise Forbidden("adapters are managed from this machine only: start with --admin-key to allow others")
    hosts = request.headers.getlist("host")
    if len(hosts) != 1 or not _is_this_server(hosts[0], settings):
        raise Forbidden(
            f"adapters are not managed under the host name {', '.join(hosts)[:100]!r}: call 127.0.0.1 or localhost,"
            " name the host with --allowed-host, or start with --admin-key"
        )
    if not _is_welcome_page(request, settings):
        raise Forbidden("adapters are not managed from web pages: name the page with --cors-origin")


def is_loopback(host: str) -> bool:
    """Return whether a host name or an address, IPv6 in brackets or not, is this machine to itself."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    # A socket that takes IPv4 and IPv6 shows callers of the former as ::ffff:127.0.0.1.
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _proxy_header(request: Request) -> str | None:
    """Return the first header that a proxy added."""
    names = request.headers.keys()
    return next((name for name in names if name in PROXY_HEADERS or name.startswith(PROXY_PREFIXES)), None)


def _arrived_from_here(request: Request) -> bool:
    if request.client is None:
        return False
    # Who calls this machine's own address from this machine has that address.
    own = (request.scope.get("server") or (None,))[0]
    return is_loopback(request.client.host) or request.client.host == own


def _is_this_server(authority: str, settings: ApiSettings) -> bool:
    found = _AUTHORITY.fullmatch(authority)
    if found is None:
        return False
    host = found["host"].lower().strip("[].")
    return is_loopback(host) or host in settings.hosts


def _is_welcome_page(request: Request, settings: ApiSettings) -> bool:
    """Return whether no page sent this, or one that may: browsers name it, and say how far away it is."""
    origins = request.headers.getlist("origin")
    if not origins:
        # What a page embeds (images, scripts) has no origin.
        return request.headers.get("sec-fetch-site", "none") != "cross-site"
    if len(origins) > 1:
        return False
    if origins[0] in settings.cors_origins:
        return True
    scheme, _, authority = origins[0].partition("://")
    found = _AUTHORITY.fullmatch(authority)
    return scheme in ("http", "https") and found is not None and is_loopback(found["host"])
