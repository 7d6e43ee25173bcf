"""What is said of an adapter over what its files say: a description, and which prompts are its own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.manifest import parse_manifest
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.catalog import AdapterCatalog, CatalogEntry
from manylora.server.errors import InvalidRequest


def words_of(deps: ApiDependencies, entry: CatalogEntry) -> dict[str, object]:
    """Return what counts of an adapter now."""
    own = entry.manifest
    told = own if deps.routing is None else deps.routing.manifest_of(entry.record.name, own)
    return {"description": told.description, "examples": list(told.examples), "threshold": told.threshold}


def checked(words: Mapping[str, object]) -> dict[str, Any]:
    """Return words as a manifest has them. Raises InvalidRequest for what none could have."""
    try:
        given = parse_manifest(words, file=None)
    except InvalidAdapter as error:
        raise InvalidRequest(error.message) from None
    return {field: getattr(given, field) for field in words}


async def say(deps: ApiDependencies, catalog: AdapterCatalog, name: str, words: Mapping[str, Any]) -> None:
    """Have words that were ``checked`` count of an adapter from now on; those that aren't given stay as they are.

    Raises UnknownAdapter, and StoreFull if they can't be kept.
    """
    routing = deps.routing
    if not words or routing is None:
        return

    async def added(entry: CatalogEntry) -> None:
        before = routing.manifest_of(name, entry.manifest)
        await routing.say(name, replace(before, **words))

    await catalog.while_it_stays(name, added)
