"""Routes that change which adapters and mixtures there are: our /adapters, and vLLM's two by its names and statuses."""

import contextlib

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from manylora.adapters.errors import AdapterNameTaken, AdapterNotFound, UnknownAdapter
from manylora.adapters.mixtures import spell
from manylora.adapters.names import LONGEST_ECHO, list_names
from manylora.adapters.records import AdapterRecord, MixtureRecord
from manylora.server.api.adapter_jobs import begun, describe_registration, ended, waited_for
from manylora.server.api.adapter_schemas import (
    AdapterRequest,
    AdapterUpdate,
    AdapterWords,
    LoadLoraRequest,
    UnloadLoraRequest,
)
from manylora.server.api.adapter_uploads import adapter_body, asked_of
from manylora.server.api.adapter_words import checked, say, words_of
from manylora.server.api.asked_models import describe_asked, describe_part, told_of
from manylora.server.api.auth import require_manager
from manylora.server.api.body import read_body
from manylora.server.api.calling import current_caller, managed_catalog
from manylora.server.api.dependencies import ApiSettings, dependencies
from manylora.server.api.disconnect import unless_gone
from manylora.server.api.openapi import body_of
from manylora.server.api.request_context import note
from manylora.server.catalog import AdapterCatalog, CatalogEntry, MixtureEntry, Used
from manylora.server.catalog.registrations import Registration
from manylora.server.errors import Forbidden, InvalidRequest, ModelNotFound

router = APIRouter(dependencies=[Depends(require_manager)], tags=["adapters"])


@router.post("/adapters", openapi_extra=adapter_body(AdapterRequest))
async def register(request: Request, wait: bool = True) -> JSONResponse:
    """Serve an adapter, or a mixture, under a new name: 201, or 200 if the name has these weights or parts already.

    With wait=false it is 202 at once, and GET /adapters/{name} says how far it is.
    """
    deps = dependencies(request)
    catalog = managed_catalog(deps)
    async with asked_of(
        request, catalog, AdapterRequest, lambda body: _check_new(body.name, pin=body.pin)
    ) as asked:
        body, offer = asked.body, asked.offer
        if offer is None:
            with told_of("mixture"):
                entry, made = await unless_gone(request, catalog.register_mixture(body.name, body.parts))
            note(mixture=spell(entry.record.parts))
            return JSONResponse(describe_mixture(entry), status_code=201 if made else 200)
        words = checked(body.words)

        async def work(job: Registration | None) -> tuple[AdapterRecord, bool]:
            done = await catalog.register(
                body.name, offer, preload=body.preload, pin=body.pin, registration=job
            )
            # It may have been deleted since: then nothing is to be said of it.
            with contextlib.suppress(UnknownAdapter):
                await say(deps, catalog, body.name, words)
            return done

        if not wait:
            return await begun(request, catalog, body.name, asked, work)
        record, created = await waited_for(request, work)
    return JSONResponse(_answer(catalog, record), status_code=201 if created else 200)


@router.get("/adapters")
async def list_adapters(request: Request) -> dict[str, object]:
    """List all adapters with their tier (device, host, disk), all mixtures with their parts, and what isn't served."""
    catalog, owns = managed_catalog(dependencies(request)), current_caller().owns
    adapters = [shown(catalog, each) for each in catalog.list() if owns(each.record.name)]
    mixtures = [describe_mixture(each) for each in catalog.mixtures() if owns(each.record.name)]
    coming = [
        describe_registration(each)
        for each in catalog.registrations.all()
        if owns(each.name) and catalog.kind_of(each.name) is None
    ]
    found = [*adapters, *mixtures, *coming]
    return {"object": "list", "data": sorted(found, key=lambda each: str(each["name"]))}


@router.get("/adapters/{name:path}")
async def get_adapter(request: Request, name: str) -> dict[str, object]:
    """Describe one adapter or mixture, or how far the registration of one is that isn't served yet."""
    deps = dependencies(request)
    catalog = managed_catalog(deps)
    check_own(catalog, name)
    mixture = catalog.get_mixture(name)
    if mixture is not None:
        return describe_mixture(mixture)
    coming = catalog.registrations.of(name)
    if coming is not None and catalog.kind_of(name) is None:
        return describe_registration(coming)
    entry = catalog.get(name)
    return {**shown(catalog, entry), "auto": words_of(deps, entry)}


@router.put("/adapters/{name:path}", openapi_extra=adapter_body(AdapterUpdate))
async def replace_adapter(request: Request, name: str, wait: bool = True) -> JSONResponse:
    """Serve other weights, or a mixture's other parts, under the name: new requests use it, running ones finish.

    With wait=false it is 202 at once, and GET /adapters/{name} says how far it is.
    """
    deps = dependencies(request)
    catalog = managed_catalog(deps)
    check_own(catalog, name)
    async with asked_of(request, catalog, AdapterUpdate, lambda body: _check_pin(body.pin)) as asked:
        body, offer = asked.body, asked.offer
        if offer is None:
            with told_of("mixture"):
                entry = await unless_gone(request, catalog.replace_mixture(name, body.parts))
            note(mixture=spell(entry.record.parts))
            return JSONResponse(describe_mixture(entry))
        words = checked(body.words)

        async def work(job: Registration | None) -> AdapterRecord:
            record = await catalog.replace(name, offer, preload=body.preload, pin=body.pin, registration=job)
            with contextlib.suppress(UnknownAdapter):  # as above
                await say(deps, catalog, name, words)
            return record

        if not wait:
            catalog.get(name)  # what isn't there can't be replaced, which is known at once
            return await begun(request, catalog, name, asked, work)
        return JSONResponse(_answer(catalog, await waited_for(request, work)))


@router.patch("/adapters/{name:path}", openapi_extra=body_of(AdapterWords))
async def describe_adapter(request: Request, name: str) -> dict[str, object]:
    """Say of an adapter what it is for and which prompts are its own; its weights stay as they are."""
    deps = dependencies(request)
    catalog = managed_catalog(deps)
    check_own(catalog, name)
    body = await read_body(request, AdapterWords)
    if not body.words:
        raise InvalidRequest(f"nothing is said: give one of {', '.join(AdapterWords.model_fields)}")
    entry = catalog.get(name)
    await say(deps, catalog, name, checked(body.words))
    return {**shown(catalog, entry), "auto": words_of(deps, entry)}


@router.delete("/adapters/{name:path}")
async def delete_adapter(request: Request, name: str, abort: bool = False) -> dict[str, object]:
    """Refuse new requests, let running ones finish (or abort them), free the memory, say how much.

    A mixture has no memory and no requests of its own: its name is free at once, running requests finish.
    """
    catalog = managed_catalog(dependencies(request))
    check_own(catalog, name)
    if catalog.kind_of(name) == "mixture":
        return await _delete_mixture(catalog, name, abort)
    ending = await ended(catalog, name)
    if ending is not None and catalog.kind_of(name) is None:
        return {**describe_registration(ending), "deleted": True}
    record, freed = await catalog.delete(name, abort=abort)
    return {
        **describe_record(record),
        "deleted": True,
        "freed": {
            "arena_rows": freed.rows,
            "device_bytes": freed.device_bytes,
            "host_bytes": freed.host_bytes,
            "aborted_sequences": freed.aborted,
        },
    }


async def _delete_mixture(catalog: AdapterCatalog, name: str, abort: bool) -> dict[str, object]:
    if abort:
        raise InvalidRequest(
            f"{name!r} is a mixture: the requests that use it are those of its adapters, and end when one of these is "
            "deleted with abort=true",
            param="abort",
        )
    record = await catalog.delete_mixture(name)
    return {**describe_mixture_record(record), "deleted": True}


@router.post("/v1/load_lora_adapter", openapi_extra=body_of(LoadLoraRequest))
async def load_lora_adapter(request: Request) -> Response:
    """Load an adapter; with load_inplace it may replace one. 404: no such path; 400: the name is in use."""
    deps = dependencies(request)
    catalog = managed_catalog(deps)
    body = await read_body(request, LoadLoraRequest)
    _check_base_model(deps.settings, body.base_model_name)
    _check_new(body.lora_name)
    _check_no_mixture(catalog, body.lora_name)
    taken = InvalidRequest(
        f"The lora adapter {body.lora_name!r} has already been loaded. Set load_inplace to replace it.",
        param="lora_name",
    )
    try:
        if body.load_inplace:
            await unless_gone(request, catalog.put(body.lora_name, body.lora_path))
        elif not (await unless_gone(request, catalog.register(body.lora_name, body.lora_path)))[1]:
            raise taken
    except AdapterNotFound as error:
        raise ModelNotFound(str(error), param="lora_path") from None
    except AdapterNameTaken:
        raise taken from None
    note(adapter_note=_note(catalog.notes_on(body.lora_name)))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


def _check_base_model(settings: ApiSettings, asked: str) -> None:
    """Raise InvalidRequest if an adapter is meant for another base; "" is any, as vLLM has it."""
    known = {settings.base_model, settings.base_source}
    if asked and asked not in known:
        raise InvalidRequest(
            f"base_model_name: {asked[:200]!r} is not served here, {settings.base_model!r} is",
            param="base_model_name",
        )


def _check_no_mixture(catalog: AdapterCatalog, name: str) -> None:
    """Raise InvalidRequest for a mixture's name: vLLM knows none, and would take it for an adapter."""
    if catalog.kind_of(name) == "mixture":
        raise InvalidRequest(
            f"{name!r} is a mixture, and this route is for single adapters: use PUT or DELETE /adapters/{name}",
            param="lora_name",
        )


@router.post("/v1/unload_lora_adapter", openapi_extra=body_of(UnloadLoraRequest))
async def unload_lora_adapter(request: Request) -> Response:
    """Delete an adapter: 404 for a name that isn't there."""
    catalog = managed_catalog(dependencies(request))
    body = await read_body(request, UnloadLoraRequest)
    try:
        check_own(catalog, body.lora_name)
        _check_no_mixture(catalog, body.lora_name)
        await catalog.delete(body.lora_name)
    except UnknownAdapter as error:
        # Routers look for these words.
        message = f"The lora adapter {body.lora_name[:200]!r} cannot be found: {error}"
        raise ModelNotFound(message, param="lora_name") from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _check_new(name: str, *, pin: bool | None = None) -> None:
    """Raise Forbidden unless the caller may give this name; whether anything has it makes no difference."""
    caller = current_caller()
    if not caller.owns(name):
        raise Forbidden(
            f"names that this key may give begin with {f'{caller.tenant}/'!r}; {name[:LONGEST_ECHO]!r} doesn't"
        )
    _check_pin(pin)


def _check_pin(pin: bool | None) -> None:
    if pin and not current_caller().sees_all:
        raise Forbidden("this key may not pin adapters: the device is shared, and who runs the server pins")


def check_own(catalog: AdapterCatalog, name: str) -> None:
    """Raise UnknownAdapter for what isn't the caller's own, as for what isn't there."""
    caller = current_caller()
    if not caller.owns(name):
        own = [each.record.name for each in catalog.list() if caller.owns(each.record.name)]
        raise UnknownAdapter(f"there is no adapter {name[:LONGEST_ECHO]!r}; adapters: {list_names(own)}")


def _answer(catalog: AdapterCatalog, record: AdapterRecord) -> dict[str, object]:
    """Return what is served now, with what its owner should know of it, which the log line says too."""
    told = _note(catalog.notes_on(record.name))
    note(adapter_note=told)
    return {**describe_record(record), "note": told}


def shown(catalog: AdapterCatalog, entry: CatalogEntry) -> dict[str, object]:
    """Return an adapter with the registration of its next version, if one is under way or failed not long ago."""
    coming = catalog.registrations.of(entry.record.name)
    return {**describe(entry), "registration": None if coming is None else describe_registration(coming)}


def _note(sentences: tuple[str, ...]) -> str | None:
    return "; ".join(sentences) or None


def describe(entry: CatalogEntry) -> dict[str, object]:
    """Return an adapter as the routes show it."""
    state = "unavailable" if entry.reason is not None else "available"
    return {
        **describe_record(entry.record),
        "state": state,
        "tier": entry.tier,
        "reason": entry.reason,
        "note": _note(entry.notes),
        "bytes": entry.nbytes,
        "alora_invocation_tokens": list(entry.invocation) or None,
        **_used(entry.used),
        "canary": None
        if entry.canary is None
        else {"version": entry.canary.version, "share": entry.canary.share},
        "versions": list(entry.versions),
    }


def _used(used: Used) -> dict[str, object]:
    return {"requests": used.requests, "last_used": used.last}


def describe_record(record: AdapterRecord) -> dict[str, object]:
    """Return what the registry knows."""
    return {
        "object": "adapter",
        "id": record.id,
        "name": record.name,
        "version": record.version,
        "digest": record.digest,
        "src": record.source,
        "rank": record.rank,
        "target_modules": list(record.targets),
        "preload": record.preload,
        "pin": record.pinned,
        "created": int(record.created_at.timestamp()),
    }


def describe_mixture(entry: MixtureEntry) -> dict[str, object]:
    """Return a mixture as the routes show it: its parts as they were given, and which adapters these are now."""
    return {
        **describe_mixture_record(entry.record),
        "adapters": [describe_part(part) for part in entry.parts],
        "state": "unavailable" if entry.reason is not None else "available",
        "reason": entry.reason,
        **_used(entry.used),
    }


def describe_mixture_record(record: MixtureRecord) -> dict[str, object]:
    """Return what the registry knows."""
    return {
        "object": "mixture",
        "id": record.id,
        "name": record.name,
        "version": record.version,
        "mixture": [describe_asked(part) for part in record.parts],
        "created": int(record.created_at.timestamp()),
    }
