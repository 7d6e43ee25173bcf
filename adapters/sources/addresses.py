"""Which addresses may be connected to. A name is looked up once for each connection, and what it gave is what is used.

A name that means a public address when it is checked and a private one when it is connected to (DNS rebinding) finds
no gap here: between the two there is no second look.
"""

import ipaddress
import socket
from collections.abc import Iterable

import httpcore

from manylora.adapters.errors import SourceForbidden

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class CheckedBackend(httpcore.SyncBackend):
    """Connections of httpcore's, to public addresses alone unless private ones are allowed."""

    def __init__(self, *, allow_private: bool) -> None:
        super().__init__()
        self._allow_private = allow_private

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address of ``host`` that answers. Raises SourceForbidden if none may be connected to."""
        failed: Exception | None = None
        for address in self._addresses(host, port):
            try:
                return super().connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        assert failed is not None
        raise failed

    def _addresses(self, host: str, port: int) -> list[str]:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"the name can't be looked up: {error}") from None
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        allowed = [each for each in addresses if self._allow_private or is_public(each)]
        if not allowed:
            # The address isn't told: what names mean inside is nobody's business.
            raise SourceForbidden(
                f"{host!r} is at a private, loopback or link-local address, and this server may not read from those:"
                " whoever runs it allows them with --private-sources"
            )
        return allowed


def is_public(text: str) -> bool:
    """Return whether anybody on the internet reaches the same machine by this address."""
    address: Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        # An IPv4 address within another is where the packets go in the end.
        if any(each is not None and not _is_global(each) for each in inner):
            return False
        if address.ipv4_mapped is not None:
            return True
    return _is_global(address)


def _is_global(address: Address) -> bool:
    return address.is_global and not address.is_multicast
