"""Exports through HTTP: a job for each, its progress, its result, its end; and what a crash leaves."""

import asyncio
import io
import json
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch
from safetensors.torch import load, load_file

from manylora.adapters.errors import AdapterNotFound
from manylora.server.exports.job import ExportJob
from manylora.server.exports.jobs import MOST_QUEUED
from tests.adapters.making import pool
from tests.server.api.running import BASE, Files, Running, running

SECONDS = 60.0


@pytest.fixture(autouse=True)
def _at_full_priority(monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
    """On a busy machine nice processes take minutes."""
    assert server.server.deps.exports is not None
    monkeypatch.setattr(server.server.deps.exports, "niceness", 0)
    monkeypatch.setattr("manylora.server.exports.jobs.NICENESS", 0)


@pytest.fixture(autouse=True)
def _leave_nothing(http: httpx.Client) -> Iterator[None]:
    yield
    for job in http.get("/exports").json()["data"]:
        for _ in range(2):  # cancel, then forget
            http.delete(f"/adapters/{job['adapter']}/export/{job['id']}")
    assert http.get("/exports").json()["data"] == []


def ask(http: httpx.Client, name: str, **body: object) -> Any:
    response = http.post(f"/adapters/{name}/export", json=body)
    assert response.status_code == 202, response.text
    return response.json()


def wait(http: httpx.Client, job: Any, until: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + SECONDS
    while True:
        found = http.get(f"/adapters/{job['adapter']}/export/{job['id']}").json()
        if until(found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def is_over(job: Any) -> bool:
    return job["status"] in ("succeeded", "failed", "cancelled")


def home_of(job: Any) -> Path:
    """The directory of a job whose result is a directory in it."""
    return Path(job["path"]).parent


def test_a_merged_model_is_made_followed_downloaded_and_deleted(http: httpx.Client) -> None:
    job = ask(http, "a", base="dequantized", dtype="float32")
    assert (job["object"], job["status"], job["adapter"], job["version"]) == ("export", "queued", "a", 1)
    done = wait(http, job, is_over)
    assert done["status"] == "succeeded", done
    assert (done["progress"], done["stage"], done["error"]) == (1.0, "done", None)
    assert done["manifest"]["into"] == "dequantized"
    # This server holds its base as it is.
    assert done["manifest"]["served"]["nearer"] == "16bit"
    assert done in http.get("/exports", params={"adapter": "a"}).json()["data"]
    files = {path.name for path in Path(done["path"]).iterdir()}
    assert files >= {"model.safetensors", "config.json", "tokenizer.json", "manylora_export.json"}
    response = http.get(f"/adapters/a/export/{job['id']}/download")
    head = http.head(f"/adapters/a/export/{job['id']}/download")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == response.headers["content-length"] == str(len(response.content))
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        assert {name.removeprefix("a-merged/") for name in tar.getnames()} == files
        config = tar.extractfile("a-merged/config.json")
        assert config is not None
        assert json.load(config)["dtype"] == "float32"
    home = home_of(done)
    gone = http.delete(f"/adapters/a/export/{job['id']}").json()
    assert gone["deleted"] is True
    assert not home.exists()
    assert http.get(f"/adapters/a/export/{job['id']}").status_code == 404


def test_what_lies_in_a_folder_of_the_result_is_downloaded_and_counted(
    http: httpx.Client, files: Files
) -> None:
    own = files.adapters / "pooled"
    shutil.copytree(files.adapters / "b", own)
    pool(own, "mean")
    try:
        http.post("/adapters", json={"name": "mine", "src": "pooled"}).raise_for_status()
        done = wait(http, ask(http, "mine", dtype="float32"), is_over)
        assert done["status"] == "succeeded", done
        response = http.get(f"/adapters/mine/export/{done['id']}/download")
        assert response.headers["content-length"] == str(len(response.content))
        with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
            told = tar.extractfile("mine-merged/1_Pooling/config.json")
            assert told is not None
            assert told.read() == (own / "1_Pooling" / "config.json").read_bytes()
            assert done["bytes"] == sum(member.size for member in tar.getmembers())
    finally:
        http.delete("/adapters/mine")
        shutil.rmtree(own)


def test_an_archive_holds_the_adapter(http: httpx.Client, files: Files) -> None:
    job = wait(http, ask(http, "b", format="peft"), is_over)
    response = http.get(f"/adapters/b/export/{job['id']}/download")
    with tarfile.open(fileobj=io.BytesIO(response.content), mode="r:gz") as tar:
        weights = tar.extractfile("b/adapter_model.safetensors")
        assert weights is not None
        assert weights.read() == (files.adapters / "b" / "adapter_model.safetensors").read_bytes()


def test_the_version_of_the_moment_is_exported_whatever_comes_after(http: httpx.Client) -> None:
    http.post("/adapters", json={"name": "mine", "src": "b"}).raise_for_status()
    job = ask(http, "mine", format="peft")
    digest = http.get("/adapters/mine").json()["digest"]
    http.delete("/adapters/mine").raise_for_status()
    done = wait(http, job, is_over)
    assert (done["status"], done["digest"]) == ("succeeded", digest)


def test_a_queued_export_keeps_the_files_of_an_adapter_that_is_deleted(
    http: httpx.Client, server: Running
) -> None:
    http.post("/adapters", json={"name": "mine", "src": "templated"}).raise_for_status()
    digest = http.get("/adapters/mine").json()["digest"]
    with before_the_next_process(server) as go_on:
        first = ask(http, "a", format="peft")
        job = ask(http, "mine", format="peft")
        http.delete("/adapters/mine").raise_for_status()
        with pytest.raises(AdapterNotFound):
            server.server.catalog._store.path_of(digest)
        assert http.get(f"/adapters/mine/export/{job['id']}").json()["status"] == "queued"
        go_on.set()
    assert wait(http, first, is_over)["status"] == "succeeded"
    assert wait(http, job, is_over)["status"] == "succeeded"


@contextmanager
def before_the_next_process(server: Running) -> Iterator[threading.Event]:
    """Hold the queue of exports until the event is set."""
    jobs = server.server.deps.exports
    assert jobs is not None
    go_on, run = threading.Event(), jobs._run

    async def held(job: ExportJob) -> None:
        await asyncio.to_thread(go_on.wait, SECONDS)
        await run(job)

    jobs._run = held  # type: ignore[method-assign]  # for this test
    try:
        yield go_on
    finally:
        go_on.set()
        del jobs._run


def test_the_merged_weights_are_the_bases_and_the_adapters(http: httpx.Client, files: Files) -> None:
    """W + α/r · B A, as the client gets it."""
    job = wait(http, ask(http, "c", base="16bit", dtype="float32"), is_over)
    content = http.get(f"/adapters/c/export/{job['id']}/download").content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        weights = tar.extractfile("c-merged/model.safetensors")
        assert weights is not None
        merged = load(weights.read())
    base = load_file(files.base / "model.safetensors")
    adapter = load_file(files.adapters / "c" / "adapter_model.safetensors")
    config = json.loads((files.adapters / "c" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    changed = 0
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight.float()
        if f"{key}.lora_A.weight" in adapter:
            change = adapter[f"{key}.lora_B.weight"].float() @ adapter[f"{key}.lora_A.weight"].float()
            expected, changed = expected + scale * change, changed + 1
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)
    assert changed == len(adapter) // 2


def test_a_job_can_be_cancelled_and_leaves_nothing(http: httpx.Client, server: Running) -> None:
    first, second = ask(http, "a"), ask(http, "b")
    wait(http, first, lambda job: job["status"] == "running")
    assert http.get(f"/adapters/b/export/{second['id']}").json()["status"] == "queued"
    for job in (second, first):
        cancelled = http.delete(f"/adapters/{job['adapter']}/export/{job['id']}").json()
        assert cancelled["status"] == "cancelled"
        assert "deleted" not in cancelled
    exports = server.server.deps.exports
    assert exports is not None
    server.wait_until("empty", lambda: not any(path.is_dir() for path in exports.directory.iterdir()))
    refused = http.get(f"/adapters/a/export/{first['id']}/download")
    assert refused.status_code == 400
    assert "cancelled" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/adapters/nope/export", {}, 404, "adapters: a, b, c"),
        (f"/adapters/{BASE}/export", {}, 404, "adapters: a, b, c"),
        ("/adapters/a/export", {"format": "gguf"}, 400, "format"),
        ("/adapters/a/export", {"base": "8bit"}, 400, "base"),
        ("/adapters/a/export", {"dtype": "int8"}, 400, "dtype"),
        ("/adapters/a/export", {"output": "/etc"}, 400, "output"),
    ],
)
def test_what_is_not_there_is_refused(
    http: httpx.Client, path: str, body: dict[str, str], status: int, says: str
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


def test_an_unknown_job_is_404_with_those_there_are(http: httpx.Client) -> None:
    job = ask(http, "a", format="peft")
    unknown = "/adapters/a/export/export-0123456789abcdef"
    for path in ("/adapters/a/export/other", unknown, f"/adapters/b/export/{job['id']}"):
        assert http.get(path).status_code == 404
        assert http.get(f"{path}/download").status_code == 404
        assert http.delete(path).status_code == 404
    assert job["id"] in http.get(unknown).json()["error"]["message"]


def test_the_routes_ask_for_the_admin_key(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path, admin_key="secret") as server:
        for method, path in (
            ("POST", "/adapters/a/export"),
            ("GET", "/exports"),
            ("DELETE", "/adapters/a/export/x"),
            ("DELETE", "/adapters/a/export/export-0123456789abcdef"),
        ):
            assert httpx.request(method, server.url + path).status_code == 401


def test_a_restart_finds_results_and_sweeps_what_is_unfinished(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        http.post("/adapters", json={"name": "a", "src": "a"}).raise_for_status()
        done = wait(http, ask(http, "a", format="peft"), is_over)
        unfinished = ask(http, "a")
        wait(http, unfinished, lambda job: job["status"] == "running")
        exports = home_of(done).parent.parent
        # What a crash would have left: the server below ends in order.
        (exports / "export-dead" / ".partial-result-0").mkdir(parents=True)
    assert sorted(path.name for path in exports.iterdir()) == sorted([done["id"], "export-dead"])
    with running(files, tmp_path) as server:
        jobs = httpx.get(f"{server.url}/exports").json()["data"]
        assert jobs == [done]
        assert [path.name for path in exports.iterdir()] == [done["id"]]


def test_a_failing_export_says_why_and_leaves_nothing(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        http.post("/adapters", json={"name": "a", "src": "a"}).raise_for_status()
        exports = server.server.deps.exports
        assert exports is not None
        exports.base.settings["base_16bit"] = str(tmp_path / "gone")
        job = wait(http, ask(http, "a"), is_over)
        assert job["status"] == "failed"
        assert "gone/config.json can't be read" in job["error"]
        assert list(exports.directory.iterdir()) == []


def test_no_more_exports_wait_than_may_however_they_arrive(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are asked for while the first one's files are still being linked."""
    jobs = server.server.deps.exports
    assert jobs is not None
    first = ask(http, "a")
    wait(http, first, lambda job: job["status"] == "running")
    go_on = threading.Event()
    files_of = jobs._files_of

    def slowly(digest: str) -> Path:
        go_on.wait(SECONDS)
        return files_of(digest)

    monkeypatch.setattr(jobs, "_files_of", slowly)
    with ThreadPoolExecutor(MOST_QUEUED + 4) as pool:
        asked = [pool.submit(http.post, "/adapters/b/export", json={}) for _ in range(MOST_QUEUED + 4)]
        refused = [each.result().status_code for each in islice(as_completed(asked), 4)]
        go_on.set()
    assert refused == [429] * 4
    assert [each.result().status_code for each in asked].count(202) == MOST_QUEUED


def test_an_export_cancelled_while_its_files_are_linked_leaves_nothing(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = server.server.deps.exports
    assert jobs is not None
    files_of = jobs._files_of
    linking, go_on = threading.Event(), threading.Event()

    def slowly(digest: str) -> Path:
        linking.set()
        go_on.wait(SECONDS)
        return files_of(digest)

    monkeypatch.setattr(jobs, "_files_of", slowly)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(http.post, "/adapters/b/export", json={})
        assert linking.wait(SECONDS)
        [job] = http.get("/exports").json()["data"]
        assert http.delete(f"/adapters/b/export/{job['id']}").json()["status"] == "cancelled"
        go_on.set()
        assert asked.result().json()["status"] == "cancelled"
    assert not (jobs.directory / job["id"]).exists()


def test_adapters_may_be_called_like_paths_of_exports(http: httpx.Client) -> None:
    names = ["team/export/1", "x/export/y/download", "x/export", "export/export", "a/export/export-1"]
    for name in names:
        assert http.post("/adapters", json={"name": name, "src": "b"}).status_code == 201
        for path in (name, quote(name, safe="")):
            assert http.get(f"/adapters/{path}").json()["name"] == name
            assert http.get(f"/v1/models/{path}").json()["id"] == name
        assert http.put(f"/adapters/{name}", json={"src": "b"}).json()["name"] == name
        job = ask(http, name, format="peft")
        assert http.get(f"/adapters/{name}/export/{job['id']}").json()["adapter"] == name
        assert http.delete(f"/adapters/{quote(name, safe='')}").json()["deleted"] is True


@pytest.mark.parametrize("end", ["", "/download"])
def test_no_adapter_is_called_like_an_export(http: httpx.Client, end: str) -> None:
    name = f"a/export/export-0123456789abcdef{end}"
    refused = http.post("/adapters", json={"name": name, "src": "b"})
    assert refused.status_code == 400
    assert "export" in refused.json()["error"]["message"]


def test_the_page_shows_the_routes(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert "post" in paths["/adapters/{name}/export"]
    assert {"get", "delete"} <= paths["/adapters/{name}/export/{job}"].keys()
    body = paths["/adapters/{name}/export"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"format", "base", "dtype", "combine", "rank"}
    assert ExportJob.__doc__


def test_an_export_of_one_version_is_found_where_its_answer_says(http: httpx.Client) -> None:
    version = http.get("/adapters/a").json()["version"]
    begun = http.post(f"/adapters/a@{version}/export", json={"dtype": "float32"})
    found = http.get(begun.headers["location"])
    assert (found.status_code, found.json()["id"]) == (200, begun.json()["id"])
