"""What a name means at the moment when it is to be exported: versions of adapters, and their weights."""

from manylora.adapters.mixtures import MixturePart, spell
from manylora.adapters.names import with_version
from manylora.adapters.records import AdapterRecord
from manylora.server.catalog import AdapterCatalog, ResolvedModel
from manylora.server.errors import InvalidRequest
from manylora.server.exports.job import ExportedPart, ExportSource


def source_of_name(catalog: AdapterCatalog, name: str, combine: str | None) -> ExportSource:
    """Return the version of an adapter that its name means now, or a named mixture's parts. Raises UnknownAdapter."""
    if catalog.kind_of(name) == "mixture":
        return source_of_model(catalog, catalog.resolve(name), combine)
    return _of_adapter(catalog.get(name).record, combine)


def source_of_model(catalog: AdapterCatalog, found: ResolvedModel, combine: str | None) -> ExportSource:
    """Return a model's parts with the files that are theirs now; the loop is not left between the two.

    Raises InvalidRequest for the base, and for parts that pool texts differently.
    """
    if not found.adapters:
        what = "every weight is 0" if found.parts else f"{found.name[:200]!r} is the base"
        raise InvalidRequest(f"{what}: there is nothing to export", param="model")
    if len(found.poolings) > 1:
        raise InvalidRequest(
            "the mixture's adapters pool texts in different ways, last and mean, and what is exported says one:"
            " give them the same 1_Pooling/config.json, or take it out of one",
            param="model",
        )
    if not found.parts:
        return _of_adapter(catalog.get(found.name).record, combine)
    parts = tuple(
        _part(catalog.get(with_version(part.name, part.version)).record, part.weight)
        for part in found.parts
        if part.weight != 0
    )
    entry = catalog.get_mixture(found.name)
    if entry is not None:
        return ExportSource(entry.record.name, entry.record.version, None, parts)
    text = spell([MixturePart(part.adapter, part.weight) for part in parts])
    return ExportSource(text, None, None, parts)


def _of_adapter(record: AdapterRecord, combine: str | None) -> ExportSource:
    """Return one adapter; one that is to be combined is a mixture of itself."""
    parts = () if combine is None else (_part(record, 1.0),)
    return ExportSource(record.name, record.version, record.digest, parts)


def _part(record: AdapterRecord, weight: float) -> ExportedPart:
    return ExportedPart(record.name, record.version, record.digest, weight)
