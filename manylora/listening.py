"""The sockets of a server: bound before the base loads, so that a port in use is told at once; uvicorn listens later.

Bound, not listening: who connects meanwhile is refused, as before the start, and doesn't hang until a model is loaded.
"""

import errno
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from manylora.server.config import ServeSettings

NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
PRIVILEGED = 1024


Address = tuple[Any, ...]
"""As the socket module takes it: host and port, for IPv6 also flow and scope."""


class ListenError(ValueError):
    """The address can't be listened on. One line: why, and what to do."""


def bind(settings: ServeSettings) -> list[socket.socket]:
    """Return a bound socket for each address of the host. Raises ListenError."""
    addresses = _addresses(settings)
    port, refused = settings.port, None
    with ExitStack() as undo:
        bound: list[socket.socket] = []
        for family, address in addresses:
            try:
                found = _bind_one(family, (address[0], port, *address[2:]))
            except OSError as error:
                refused = error
                # A name may stand for addresses that this machine hasn't; one that is taken is another matter.
                if error.errno in NO_SUCH_ADDRESS:
                    continue
                break
            undo.callback(found.close)
            bound.append(found)
            # Where any port will do, the others take the first one's.
            port = found.getsockname()[1]
        else:
            if bound:
                undo.pop_all()
                return bound
    assert refused is not None
    raise ListenError(why(settings, refused))


def url_of(settings: ServeSettings, sockets: Sequence[socket.socket]) -> str:
    """Return the server's URL, without a path."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{sockets[0].getsockname()[1]}"


def why(settings: ServeSettings, error: OSError) -> str:
    """Say why an address can't be listened on, and which setting chose it."""
    host, port = settings.name_of("host"), settings.name_of("port")
    where = f"can't listen on {settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{where}: the port is in use: is another server there? {port} names another, 0 takes a free one"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        low = f": ports under {PRIVILEGED} are for root" if settings.port < PRIVILEGED else ""
        return f"{where}: no permission{low}; {port} names another"
    if error.errno in NO_SUCH_ADDRESS:
        return f"{where}: this machine has no such address; {host} names another, 0.0.0.0 takes all"
    return f"{where}: {error.strerror or error}"


def _addresses(settings: ServeSettings) -> list[tuple[socket.AddressFamily, Address]]:
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        detail = error.strerror if isinstance(error, OSError) else str(error)
        raise ListenError(
            f"{settings.name_of('host')}: {settings.host!r} is no address of this machine: {detail}"
        ) from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _bind_one(family: socket.AddressFamily, address: Address) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            # A restart doesn't wait for the last connections of the server before it.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made
