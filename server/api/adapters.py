"""Routes that change which adapters are served: our /adapters, and vLLM's two by its names and statuses."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from manylora.adapters.errors import AdapterNameTaken, AdapterNotFound, UnknownAdapter
from manylora.adapters.records import AdapterRecord
from manylora.server.api.auth import require_admin
from manylora.server.api.body import read_body
from manylora.server.api.dependencies import ApiSettings, dependencies
from manylora.server.api.disconnect import unless_gone
from manylora.server.api.openapi import body_of
from manylora.server.api.schemas import AdapterRequest, AdapterUpdate, LoadLoraRequest, UnloadLoraRequest
from manylora.server.catalog import CatalogEntry
from manylora.server.errors import InvalidRequest, ModelNotFound

router = APIRouter(dependencies=[Depends(require_admin)], tags=["adapters"])


@router.post("/adapters", openapi_extra=body_of(AdapterRequest))
async def register(request: Request) -> JSONResponse:
    """Serve an adapter under a new name: 201, or 200 if these weights have that name already."""
    catalog = dependencies(request).catalog
    body = await read_body(request, AdapterRequest)
    registered = catalog.register(body.name, body.src, preload=body.preload, pin=body.pin)
    record, created = await unless_gone(request, registered)
    return JSONResponse(describe_record(record), status_code=201 if created else 200)


@router.get("/adapters")
async def list_adapters(request: Request) -> dict[str, object]:
    """List all adapters with their tier: device, host, disk, or why they can't be served."""
    entries = dependencies(request).catalog.list()
    return {"object": "list", "data": [describe(entry) for entry in entries]}


@router.get("/adapters/{name:path}")
async def get_adapter(request: Request, name: str) -> dict[str, object]:
    """Describe one adapter."""
    return describe(dependencies(request).catalog.get(name))


@router.put("/adapters/{name:path}", openapi_extra=body_of(AdapterUpdate))
async def replace_adapter(request: Request, name: str) -> dict[str, object]:
    """Serve other weights under the name: new requests use them, running ones finish on the old version."""
    body = await read_body(request, AdapterUpdate)
    replaced = dependencies(request).catalog.replace(name, body.src, preload=body.preload, pin=body.pin)
    return describe_record(await unless_gone(request, replaced))


@router.delete("/adapters/{name:path}")
async def delete_adapter(request: Request, name: str, abort: bool = False) -> dict[str, object]:
    """Refuse new requests, let running ones finish (or abort them), free the memory, say how much."""
    deps = dependencies(request)
    record, freed = await deps.catalog.delete(name, abort=abort)
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


@router.post("/v1/load_lora_adapter", openapi_extra=body_of(LoadLoraRequest))
async def load_lora_adapter(request: Request) -> Response:
    """Load an adapter; with load_inplace it may replace one. 404: no such path; 400: the name is in use."""
    deps = dependencies(request)
    body = await read_body(request, LoadLoraRequest)
    _check_base_model(deps.settings, body.base_model_name)
    taken = InvalidRequest(
        f"The lora adapter {body.lora_name!r} has already been loaded. Set load_inplace to replace it.",
        param="lora_name",
    )
    try:
        if body.load_inplace:
            await unless_gone(request, deps.catalog.put(body.lora_name, body.lora_path))
        elif not (await unless_gone(request, deps.catalog.register(body.lora_name, body.lora_path)))[1]:
            raise taken
    except AdapterNotFound as error:
        raise ModelNotFound(str(error), param="lora_path") from None
    except AdapterNameTaken:
        raise taken from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


def _check_base_model(settings: ApiSettings, asked: str) -> None:
    """Raise InvalidRequest if an adapter is meant for another base; "" is any, as vLLM has it."""
    known = {settings.base_model, settings.base_source}
    if asked and asked not in known:
        raise InvalidRequest(
            f"base_model_name: {asked[:200]!r} is not served here, {settings.base_model!r} is",
            param="base_model_name",
        )


@router.post("/v1/unload_lora_adapter", openapi_extra=body_of(UnloadLoraRequest))
async def unload_lora_adapter(request: Request) -> Response:
    """Delete an adapter: 404 for a name that isn't there."""
    deps = dependencies(request)
    body = await read_body(request, UnloadLoraRequest)
    try:
        await deps.catalog.delete(body.lora_name)
    except UnknownAdapter as error:
        # Routers look for these words.
        message = f"The lora adapter {body.lora_name[:200]!r} cannot be found: {error}"
        raise ModelNotFound(message, param="lora_name") from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def describe(entry: CatalogEntry) -> dict[str, object]:
    """Return an adapter as the routes show it."""
    state = "unavailable" if entry.reason is not None else "available"
    return {
        **describe_record(entry.record),
        "state": state,
        "tier": entry.tier,
        "reason": entry.reason,
        "note": entry.note,
    }


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
