"""The files of an export: those of the moment when it was asked for, whatever becomes of the adapter."""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manylora.server.exports.job import ExportedBase, ExportForm, ExportSource
from manylora.server.exports.jobs import ExportJobs


class FakeProcess:
    """Waits for ``go_on``, then reads the adapter's files as the real one would."""

    go_on = threading.Event()
    found: list[dict[str, bytes]]
    ended: asyncio.Semaphore

    def __init__(self, settings: str, niceness: int, complaints: Path) -> None:
        given = json.loads(settings)
        self.adapter, self.output = Path(given["adapter"]), Path(given["output"])

    def follow(self, hear: Callable[[str, float], None]) -> dict[str, Any] | str:
        self.go_on.wait(30)
        self.found.append({path.name: path.read_bytes() for path in self.adapter.iterdir()})
        self.output.mkdir(parents=True)
        return {}

    def stop(self) -> None:
        self.go_on.set()

    def __enter__(self) -> "FakeProcess":
        return self

    def __exit__(self, *_error: object) -> None:
        self.ended.release()


def source(name: str, digest: str) -> ExportSource:
    return ExportSource(name, 1, digest)


async def test_a_queued_export_keeps_the_files_of_an_adapter_that_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.server.exports.jobs.ExportProcess", FakeProcess)
    FakeProcess.go_on.clear()
    FakeProcess.found, FakeProcess.ended = [], asyncio.Semaphore(0)
    contents = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    store = tmp_path / "store"
    for digest in ("d1", "d2"):
        (store / digest).mkdir(parents=True)
        for name, content in contents.items():
            (store / digest / name).write_bytes(content + digest.encode())
    base = ExportedBase(tmp_path / "base", {})
    jobs = ExportJobs(tmp_path / "exports", base, lambda digest: store / digest)
    await jobs.open()
    form = ExportForm("merged", "16bit", "float32")
    await jobs.submit(source("running", "d1"), form)
    queued = await jobs.submit(source("queued", "d2"), form)
    shutil.rmtree(store)  # both adapters are deleted
    FakeProcess.go_on.set()
    async with asyncio.timeout(30):
        await FakeProcess.ended.acquire()
        await FakeProcess.ended.acquire()
    while not jobs.get("queued", queued.id).is_over:
        await asyncio.to_thread(int)
    assert jobs.get("queued", queued.id).status == "succeeded"
    expected = [{name: content + each for name, content in contents.items()} for each in (b"d1", b"d2")]
    assert FakeProcess.found == expected
    await jobs.close()
