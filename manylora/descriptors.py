"""Open files and connections: what the operating system allows this process, and what of it clients may take."""

import resource

from manylora.server.api.connections import ConnectionLimits
from manylora.server.config import ServeSettings

MOST_CONNECTIONS = 16_384
SHARE = 0.75
"""Of the descriptors; the rest is for files, exports and the registry."""


def raise_descriptor_limit() -> int:
    """Let this process open as many files as it may at most; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return MOST_CONNECTIONS * 2 if hard == resource.RLIM_INFINITY else hard


def connection_limits(settings: ServeSettings, descriptors: int) -> ConnectionLimits:
    """Return the limits of connections for a process of so many descriptors."""
    most = max(1, min(MOST_CONNECTIONS, int(descriptors * SHARE)))
    return ConnectionLimits(
        connections=min(settings.max_connections or most, most),
        head_bytes=int(settings.max_head_kib * 1024),
        head_seconds=settings.head_timeout,
        body_seconds=settings.body_timeout,
        upload_seconds=settings.source_timeout,
        send_seconds=settings.send_timeout,
        idle_seconds=settings.idle_timeout,
    )
