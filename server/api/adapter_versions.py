"""Routes for the versions of an adapter: which there are, going back, canaries, letting one go."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.convertors import IntegerConvertor, register_url_convertor

from manylora.adapters.records import AdapterState
from manylora.server.api.adapter_jobs import begun, trials_ended, waited_for
from manylora.server.api.adapter_schemas import CanaryRequest, Version
from manylora.server.api.adapter_uploads import adapter_body, asked_of
from manylora.server.api.adapters import check_own, shown
from manylora.server.api.auth import require_manager
from manylora.server.api.body import read_body_if_any
from manylora.server.api.calling import managed_catalog
from manylora.server.api.dependencies import dependencies
from manylora.server.api.disconnect import unless_gone
from manylora.server.api.openapi import body_of
from manylora.server.api.request_context import note
from manylora.server.api.strict import Strict
from manylora.server.catalog import AdapterCatalog, CatalogEntry
from manylora.server.catalog.registrations import Registration


class _Version(IntegerConvertor):
    """A version's number in a path, as bodies have it: Python refuses to read numbers of thousands of digits."""

    regex = "[1-9][0-9]{0,8}"


register_url_convertor("version", _Version())
router = APIRouter(dependencies=[Depends(require_manager)], tags=["adapters"])


class RollbackRequest(Strict):
    """POST /adapters/{name}/rollback."""

    version: Version | None = Field(
        None, description="To which one; without it to the one before, or past a canary."
    )


@router.get("/adapters/{name:path}/versions")
async def list_versions(request: Request, name: str) -> dict[str, object]:
    """List an adapter's versions: the active one, a canary, and those that are kept."""
    return _versions(_catalog(request, name), name)


@router.delete("/adapters/{name:path}/versions/{version:version}")
async def forget_version(request: Request, name: str, version: int) -> dict[str, object]:
    """Let a kept version go: its files at once, its memory when running requests have ended."""
    catalog = _catalog(request, name)
    await catalog.forget_version(name, version)
    return _versions(catalog, name)


@router.post("/adapters/{name:path}/rollback", openapi_extra=body_of(RollbackRequest))
async def roll_back(request: Request, name: str) -> dict[str, object]:
    """Have the name mean an earlier version again, under its old id: new requests use it, running ones finish."""
    catalog = _catalog(request, name)
    body = await read_body_if_any(request, RollbackRequest)
    before = catalog.get(name).record.version
    await unless_gone(request, catalog.roll_back(name, body.version))
    _note_change(catalog, name, before)
    return _versions(catalog, name)


@router.post("/adapters/{name:path}/canary", openapi_extra=adapter_body(CanaryRequest))
async def try_canary(request: Request, name: str, wait: bool = True) -> JSONResponse:
    """Have a version answer a share of the requests for the name: 201 if it is new, else 200.

    With wait=false a new one is 202 at once, and GET /adapters/{name} says how far it is.
    """
    catalog = _catalog(request, name)
    async with asked_of(request, catalog, CanaryRequest, lambda body: _check_there(catalog, name)) as asked:
        body, offer = asked.body, asked.offer
        made = False
        if offer is not None:

            async def work(job: Registration | None) -> bool:
                return await catalog.try_source(name, offer, body.share, job)

            if not wait:
                return await begun(request, catalog, name, asked, work, share=body.share)
            made = await waited_for(request, work)
        elif body.version is not None:
            await unless_gone(request, catalog.try_version(name, body.version, body.share))
    told = _versions(catalog, name)
    note(canary=told["canary"])
    return JSONResponse(told, status_code=201 if made else 200)


@router.post("/adapters/{name:path}/canary/promote")
async def promote_canary(request: Request, name: str) -> dict[str, object]:
    """Have the name mean its canary: new requests use it, running ones finish."""
    catalog = _catalog(request, name)
    before = catalog.get(name).record.version
    await unless_gone(request, catalog.promote(name))
    _note_change(catalog, name, before)
    return _versions(catalog, name)


@router.delete("/adapters/{name:path}/canary")
async def abort_canary(request: Request, name: str) -> dict[str, object]:
    """End a canary: all requests for the name get its active version, and the canary is an old one.

    One that is only being registered is cancelled.
    """
    catalog = _catalog(request, name)
    ending = await trials_ended(catalog, name)
    if ending is None or catalog.get(name).canary is not None:
        await catalog.abort_canary(name)
    return _versions(catalog, name)


def _catalog(request: Request, name: str) -> AdapterCatalog:
    """Return the catalog as the caller may change it. Raises UnknownAdapter for a name that isn't the caller's."""
    catalog = managed_catalog(dependencies(request))
    check_own(catalog, name)
    return catalog


def _check_there(catalog: AdapterCatalog, name: str) -> None:
    """Raise UnknownAdapter before anything is taken for what isn't there."""
    catalog.get(name)


def _note_change(catalog: AdapterCatalog, name: str, before: int) -> None:
    after = catalog.get(name).record.version
    note(versions=f"{before} to {after}" if after != before else f"{after}, without a canary")


def _versions(catalog: AdapterCatalog, name: str) -> dict[str, object]:
    """Return what there is now of a name. Raises UnknownAdapter if that is nothing any more."""
    found = catalog.versions(name)
    told = [_describe(catalog, entry) for entry in found]
    active = next(each.record.version for each in found if each.record.state is AdapterState.ACTIVE)
    return {"object": "list", "name": name, "active": active, "canary": told[0]["canary"], "data": told}


def _describe(catalog: AdapterCatalog, entry: CatalogEntry) -> dict[str, object]:
    record = entry.record
    return {
        **shown(catalog, entry),
        "role": record.state.value,
        "share": record.share,
        "before": record.before,
    }
