"""From the settings to where adapters may come from."""

from manylora.adapters.sources.allowed import Allowed
from manylora.adapters.sources.finding import Finding
from manylora.adapters.sources.web import WebLimits
from manylora.server.catalog.on_demand import OnDemand, Resolver
from manylora.server.config import ServeSettings


def finding_of(settings: ServeSettings, trusted: frozenset[str]) -> Finding:
    """Return where adapters may come from, besides ``trusted`` directories. Raises ValueError for a place of none."""
    try:
        allowed = Allowed.of(settings.allow_source)
    except ValueError as error:
        raise ValueError(f"{settings.name_of('allow_source')}: {error}") from None
    return Finding(settings.adapter_root, trusted, allowed, _limits(settings))


def on_demand_of(settings: ServeSettings) -> OnDemand | None:
    """Return what looks for models that aren't registered, if anything does. Raises ValueError."""
    if settings.resolve is None:
        return None
    try:
        resolver = Resolver.of(settings.resolve, _limits(settings))
    except ValueError as error:
        raise ValueError(f"{settings.name_of('resolve')}: {error}") from None
    return OnDemand(resolver, settings.resolve_timeout)


def _limits(settings: ServeSettings) -> WebLimits:
    return WebLimits(settings.source_timeout, settings.private_sources)
