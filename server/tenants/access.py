"""Which names a key may use: patterns over the base, adapters and mixtures. The one place that answers that."""

import fnmatch
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Pattern:
    matches: Callable[[str], object]
    text: str
    version: int | None


class Access:
    """What one key's patterns let it see. What they don't is, to its caller, not there.

    Names in another tenant's namespace are for patterns alone that begin with it, letter by letter: ``*`` is what
    belongs to nobody, and what is one's own.
    """

    def __init__(
        self,
        tenant: str,
        patterns: Collection[str],
        *,
        manages: bool,
        tenants: Callable[[], Collection[str]],
    ) -> None:
        """``manages``: its own namespace is seen whatever the patterns say; ``tenants``: all that there are now."""
        self._tenant = tenant
        self._manages = manages
        self._tenants = tenants
        self._patterns = tuple(map(_compiled, patterns))

    def allows(self, name: str, version: int | None = None) -> bool:
        """Return whether the name may be used in this version; None: it has none, or any is asked about."""
        owner, slash, _ = name.partition("/")
        own = bool(slash) and owner == self._tenant
        if own and self._manages:
            return True
        foreign = bool(slash) and not own and owner in self._tenants()
        return any(
            pattern.matches(name)
            and pattern.version in (None, version)
            and (not foreign or pattern.text.startswith(f"{owner}/"))
            for pattern in self._patterns
        )


def _compiled(pattern: str) -> _Pattern:
    name, _, version = pattern.partition("@")
    # fnmatch's expressions take no longer the more stars there are. Patterns hold no brackets.
    return _Pattern(re.compile(fnmatch.translate(name)).match, name, int(version) if version else None)
