"""Metrics of HTTP itself: requests by method, route and status, those that no engine ever saw included.

Routes are templates ("/adapters/{name}"), never paths: what clients make up gives no series of its own.
"""

from prometheus_client import CollectorRegistry, Counter
from starlette.types import Scope

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"


class HttpCounters:
    """Counts requests that are over."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "manylora_http_requests",
            "HTTP requests that are over, by route and status",
            ["method", "route", "status"],
            registry=registry,
        )
        self.served = 0
        """Requests that are over, but for probes."""

    def count(self, scope: Scope, status: int) -> None:
        """Count a request that was answered with ``status``."""
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self._requests.labels(method, route_of(scope), str(status)).inc()


def route_of(scope: Scope) -> str:
    """Return the template of the route that took a request, or "other" if none did."""
    template = getattr(scope.get("route"), "path", None)
    if isinstance(template, str):
        return template.replace(":path}", "}")
    # Routes of the framework's own (/docs) leave no route behind; they have no parameters.
    return scope["path"] if "endpoint" in scope and not scope.get("path_params") else OTHER
