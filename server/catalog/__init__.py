"""Names → adapter ids while the server runs, and an adapter's whole life there. Touches no tensors, knows no HTTP."""

from manylora.adapters.types import FreedAdapter, Tier
from manylora.server.catalog.catalog import AdapterCatalog
from manylora.server.catalog.names import Kind
from manylora.server.catalog.quota import Quota
from manylora.server.catalog.routing import Routing
from manylora.server.catalog.types import (
    AdapterEngine,
    CatalogEntry,
    CatalogObserver,
    CatalogSettings,
    Described,
    MixtureEntry,
    PutOutcome,
    ResolvedModel,
    ResolvedPart,
    RestoreReport,
    Routed,
    Used,
    WithChanges,
)

__all__ = [
    "AdapterCatalog",
    "AdapterEngine",
    "CatalogEntry",
    "CatalogObserver",
    "CatalogSettings",
    "Described",
    "FreedAdapter",
    "Kind",
    "MixtureEntry",
    "PutOutcome",
    "Quota",
    "ResolvedModel",
    "ResolvedPart",
    "RestoreReport",
    "Routed",
    "Routing",
    "Tier",
    "Used",
    "WithChanges",
]
