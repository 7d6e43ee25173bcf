"""/health (alive), /ready (can serve) and /metrics. Open to all: probes carry no keys."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from manylora.server.api.auth import watcher
from manylora.server.api.dependencies import dependencies

router = APIRouter(tags=["operation"])


@router.get("/health")
async def health() -> dict[str, str]:
    """Say that the process is alive."""
    return {"status": "alive"}


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Say whether requests can be served, and if not, why."""
    deps = dependencies(request)
    if not deps.engine.ready:
        return JSONResponse({"status": "not ready", "reason": deps.engine.unready_reason}, status_code=503)
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return all metrics in Prometheus' text format; on a server with keys, of adapters those of the key's tenant."""
    caller = await watcher(request)
    owns = (
        None
        if caller is not None and caller.sees_all
        else lambda name: caller is not None and caller.owns(name)
    )
    return Response(dependencies(request).metrics.exposition(owns), media_type=CONTENT_TYPE_LATEST)
