"""Who calls, for everything that is done for a request: found once, at the door (auth.py), asked from anywhere behind.

Whoever works without a request of HTTP's (a batch's line) says for whom: ``acting_for``. Without that there is nobody,
and who asks is told so: a road that forgot its caller fails and doesn't show everything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from manylora.server.api.dependencies import ApiDependencies
from manylora.server.catalog import AdapterCatalog, Quota
from manylora.server.tenants.account import Ticket
from manylora.server.tenants.caller import Caller

_caller: ContextVar[Caller] = ContextVar("caller")
_behind: ContextVar[int] = ContextVar("behind", default=0)
_BEHIND = 1 << 32
"""More than any two priorities differ by."""
_ticket: ContextVar[Ticket | None] = ContextVar("ticket", default=None)


def current_caller() -> Caller:
    """Return who sent the request that is being served. Raises LookupError if nobody passed the door."""
    return _caller.get()


def current_ticket() -> Ticket | None:
    """Return the request's place in its key's account; None: nothing is limited."""
    return _ticket.get()


def behind() -> int:
    """Return how much is added to the priority of what is asked: 0 for what comes by a connection."""
    return _behind.get()


@contextmanager
def behind_others() -> Iterator[None]:
    """Ask within the ``with`` behind everybody who asks by a connection, whatever priority each names."""
    token = _behind.set(_BEHIND)
    try:
        yield
    finally:
        _behind.reset(token)


def set_caller(caller: Caller) -> None:
    """Have the request under way be this one's."""
    _caller.set(caller)


def set_ticket(ticket: Ticket) -> None:
    """Have what the request under way uses be counted here."""
    _ticket.set(ticket)


@contextmanager
def acting_for(caller: Caller, ticket: Ticket | None = None) -> Iterator[None]:
    """Work for a caller within the ``with``, tasks that begin there included."""
    tokens = _caller.set(caller), _ticket.set(ticket)
    try:
        yield
    finally:
        _caller.reset(tokens[0])
        _ticket.reset(tokens[1])


def seen_catalog(deps: ApiDependencies) -> AdapterCatalog:
    """Return the catalog as the caller may see it: everything that it can't use isn't there."""
    caller = current_caller()
    return deps.catalog if caller.sees_all else deps.catalog.seen_by(caller.may_use)


def managed_catalog(deps: ApiDependencies) -> AdapterCatalog:
    """Return the catalog as the caller may change it: a tenant reads from its own folder, up to its quota."""
    caller = current_caller()
    if caller.sees_all:
        return deps.catalog
    quota = Quota(caller.tenant)
    if caller.account is not None:
        terms = caller.account.terms
        quota = Quota(caller.tenant, terms.adapter_rows, terms.adapter_bytes)
    return deps.catalog.managed_by(caller.may_use, quota)
