"""Who sends a request: found once, at the door, and asked by everything behind it."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from manylora.adapters.keys import Right
from manylora.server.tenants.access import Access
from manylora.server.tenants.account import Account

_LEAST_PRIORITY = -(1 << 31)


@dataclass(frozen=True, slots=True)
class Caller:
    """What is known of whoever sends a request."""

    name: str
    """For logs: a key's id, or how else the door was passed. No secret."""
    rights: frozenset[Right]
    tenant: str = ""
    """Empty: no tenant's, but the operator's."""
    access: Access | None = None
    """None: everything is seen."""
    account: Account | None = None
    """None: nothing is limited."""
    weight: float = 1.0
    """Turns of its tenant in the queue."""
    priority: int = 0
    """The most urgent priority that it may ask for."""

    @property
    def sees_all(self) -> bool:
        """Whether nothing is hidden from it."""
        return self.access is None

    def may(self, right: Right) -> bool:
        """Return whether it has a right; who may administer may do everything."""
        return right in self.rights or Right.ADMIN in self.rights

    def may_use(self, name: str, version: int | None = None) -> bool:
        """Return whether a name, of the base, an adapter or a mixture, is there for it. The one place that says so."""
        return self.access is None or self.access.allows(name, version)

    def visible(self, names: Iterable[str]) -> list[str]:
        """Return those of the names that are there for it."""
        return [name for name in names if self.may_use(name)]

    def owns(self, name: str) -> bool:
        """Return whether a name is its own to change: any for the operator, else those of its namespace."""
        return Right.ADMIN in self.rights or (bool(self.tenant) and name.startswith(f"{self.tenant}/"))


def operator(name: str, rights: Collection[Right], priority: int = _LEAST_PRIORITY) -> Caller:
    """Return a caller who is no tenant's, sees everything and has no limits."""
    return Caller(name, frozenset(rights), priority=priority)


OPEN = operator("anyone", (Right.INFER,), 0)
"""Of a server without keys."""
API_KEY = operator("--api-key", (Right.INFER,), 0)
ADMIN_KEY = operator("--admin-key", (Right.INFER, Right.MANAGE, Right.ADMIN))
LOCAL = operator("this machine", (Right.INFER, Right.MANAGE, Right.ADMIN))
"""A program on this machine, when there is no admin key."""
SERVER = operator("the server", (Right.INFER, Right.MANAGE, Right.ADMIN))
"""The server itself, and what goes on without anybody's request."""
