"""Routes that export adapters and mixtures: ask for a merged model or an archive, follow it, cancel it, download it."""

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.convertors import StringConvertor, register_url_convertor

from manylora.adapters.mixtures import shortest
from manylora.server.api.asked_models import told_of
from manylora.server.api.auth import require_exporter
from manylora.server.api.body import read_body
from manylora.server.api.dependencies import ApiDependencies, dependencies
from manylora.server.api.export_schemas import ExportRequest, MixtureExportRequest
from manylora.server.api.openapi import PATTERNS, body_of
from manylora.server.errors import InvalidRequest, ShuttingDown
from manylora.server.exports.job import ExportJob, ExportSource
from manylora.server.exports.jobs import ExportJobs
from manylora.server.exports.sources import source_of_model, source_of_name


class _ExportId(StringConvertor):
    """An export's id in a path. Nothing else is one, so that adapters may be called team/export/1."""

    regex = PATTERNS["job"]


register_url_convertor("export", _ExportId())
router = APIRouter(dependencies=[Depends(require_exporter)], tags=["exports"])
_PIECE = 1 << 20
LONGEST_TOP = 40
"""Characters of a name in that of a download's directory."""


@router.post("/adapters/{name:path}/export", openapi_extra=body_of(ExportRequest), status_code=202)
async def export_adapter(request: Request, name: str) -> JSONResponse:
    """Begin to export the adapter's version of this moment: 202 and the job."""
    body = await read_body(request, ExportRequest)
    source = source_of_name(dependencies(request).catalog, name, body.combine)
    job = await _jobs(request).submit(source, body.form)
    where = {"location": f"/adapters/{quote(job.adapter)}/export/{job.id}"}
    return JSONResponse(describe(job), status_code=202, headers=where)


@router.post("/exports", openapi_extra=body_of(MixtureExportRequest), status_code=202)
async def export_mixture(request: Request) -> JSONResponse:
    """Begin to export an adapter or a mixture, its parts' versions of this moment: 202 and the job."""
    body = await read_body(request, MixtureExportRequest)
    jobs = _jobs(request)
    job = await jobs.submit(await _source_of(dependencies(request), body), body.form)
    return JSONResponse(describe(job), status_code=202, headers={"location": f"/exports/{job.id}"})


@router.get("/exports")
async def list_exports(request: Request, adapter: str | None = None) -> dict[str, object]:
    """List all exports, or those of one adapter or mixture, oldest first."""
    return {"object": "list", "data": [describe(job) for job in _jobs(request).list(adapter)]}


@router.get("/exports/{job:export}")
async def get_export_by_id(request: Request, job: str) -> dict[str, object]:
    """Tell how far an export is, as /adapters/{name}/export/{job} does."""
    return describe(_jobs(request).find(job))


@router.get("/exports/{job:export}/download")
def download_export_by_id(request: Request, job: str) -> Response:
    """Send the result, as /adapters/{name}/export/{job}/download does."""
    return _download(request, _jobs(request).find(job))


@router.delete("/exports/{job:export}")
async def delete_export_by_id(request: Request, job: str) -> dict[str, object]:
    """Cancel an export or delete its result, as /adapters/{name}/export/{job} does."""
    jobs = _jobs(request)
    return await _delete(jobs, jobs.find(job))


@router.get("/adapters/{name:path}/export/{job:export}")
async def get_export(request: Request, name: str, job: str) -> dict[str, object]:
    """Tell how far an export is; once it has succeeded, where its result is and what was measured."""
    return describe(_jobs(request).get(name, job))


@router.get("/adapters/{name:path}/export/{job:export}/download")
def download_export(request: Request, name: str, job: str) -> Response:
    """Send the result: a model as a tar of its directory, an adapter as its .tar.gz or .gguf."""
    return _download(request, _jobs(request).get(name, job))


def _download(request: Request, found: ExportJob) -> Response:
    if found.status != "succeeded" or found.path is None:
        raise InvalidRequest(f"the export is {found.status}; there is a result once it has succeeded")
    path = Path(found.path)
    if path.is_file():
        media_type = "application/gzip" if found.format == "peft" else "application/octet-stream"
        return FileResponse(path, media_type=media_type, filename=path.name)
    # Under the 100 bytes that a plain entry's name may have: a longer one takes entries that aren't counted.
    top = f"{found.file_name[:LONGEST_TOP]}-{found.format}"
    files = {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}
    headers = {
        "content-disposition": f'attachment; filename="{top}.tar"',
        "content-length": str(_tar_bytes(files.values())),
    }
    if request.method == "HEAD":  # gigabytes would be read for nobody
        return Response(headers=headers, media_type="application/x-tar")
    return StreamingResponse(_tar(files, top), media_type="application/x-tar", headers=headers)


@router.delete("/adapters/{name:path}/export/{job:export}")
async def delete_export(request: Request, name: str, job: str) -> dict[str, object]:
    """Cancel an export that isn't over; of one that is, delete the result and forget it."""
    jobs = _jobs(request)
    return await _delete(jobs, jobs.get(name, job))


async def _delete(jobs: ExportJobs, job: ExportJob) -> dict[str, object]:
    if job.is_over:
        return {**describe(await jobs.delete(job.adapter, job.id)), "deleted": True}
    return describe(await jobs.cancel(job.adapter, job.id))


async def _source_of(deps: ApiDependencies, body: MixtureExportRequest) -> ExportSource:
    """Return what a body asks for. Raises what AdapterCatalog.resolve and ModelTexts.of raise, naming the field."""
    parts = tuple(part.part for part in body.mixture)
    with told_of("model" if body.model is not None else "mixture"):
        found = deps.catalog.resolve(body.model or deps.settings.base_model, parts)
        source = source_of_model(deps.catalog, found, body.combine)
        if found.part_texts:  # parts with tokenizers of their own, which must be one and the same
            await deps.texts.of(found.text, found.digest, found.part_texts)
    return source


def describe(job: ExportJob) -> dict[str, object]:
    """Return a job as the routes show it."""
    parts = [{**asdict(part), "weight": shortest(part.weight)} for part in job.parts]
    return {"object": "export", **asdict(job), "parts": parts}


def _jobs(request: Request) -> ExportJobs:
    jobs = dependencies(request).exports
    if jobs is None:
        raise ShuttingDown("this server makes no exports")
    return jobs


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _tar_bytes(files: Iterable[Path]) -> int:
    sizes = [path.stat().st_size for path in files]
    return sum(tarfile.BLOCKSIZE + size + _padding(size) for size in sizes) + 2 * tarfile.BLOCKSIZE


def _tar(files: Mapping[str, Path], top: str) -> Iterator[bytes]:
    """Yield a tar archive of plain files by their names, a header's or a piece's bytes at a time."""
    for name, path in files.items():
        info = tarfile.TarInfo(f"{top}/{name}")
        info.size = path.stat().st_size
        info.mode = 0o644
        yield info.tobuf(tarfile.GNU_FORMAT)
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
        yield b"\0" * _padding(info.size)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)
