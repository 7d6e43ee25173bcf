"""Exports of mixtures through HTTP: by text, by parts, by name; the versions of the moment; what is refused."""

import io
import json
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch
from safetensors.torch import load, load_file

from manylora.adapters.errors import AdapterError, AdapterNotFound
from manylora.adapters.export.export import export
from manylora.adapters.export.settings import ExportSettings
from tests.adapters.making import pool
from tests.server.api.running import BASE, Files, Running, running

SECONDS = 60.0
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def _at_full_priority(monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
    """On a busy machine nice processes take minutes."""
    assert server.server.deps.exports is not None
    monkeypatch.setattr(server.server.deps.exports, "niceness", 0)
    monkeypatch.setattr("manylora.server.exports.jobs.NICENESS", 0)


class InThisProcess:
    """Makes the export itself, here: a process of its own takes seconds to start."""

    def __init__(self, settings: str, niceness: int, complaints: Path) -> None:
        self._settings = ExportSettings.from_json(json.loads(settings))

    def follow(self, hear: Callable[[str, float], None]) -> dict[str, Any] | str:
        try:
            found: dict[str, Any] = json.loads(json.dumps(dict(export(self._settings, hear).manifest)))
        except AdapterError as error:
            return str(error)
        return found

    def stop(self) -> None:
        """Let it end by itself."""

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_error: object) -> None:
        """Nothing is left."""


@pytest.fixture(autouse=True)
def _in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "own_process" not in request.fixturenames:
        monkeypatch.setattr("manylora.server.exports.jobs.ExportProcess", InThisProcess)


@pytest.fixture
def own_process() -> None:
    """For a test whose exports are made as the server makes them."""


@pytest.fixture(autouse=True)
def _leave_nothing(http: httpx.Client) -> Iterator[None]:
    yield
    for job in http.get("/exports").json()["data"]:
        for _ in range(2):  # cancel, then forget
            http.delete(f"/exports/{job['id']}")
    assert http.get("/exports").json()["data"] == []
    for name in ("mixed", "mine"):
        http.delete(f"/adapters/{name}")


def ask(http: httpx.Client, **body: object) -> Any:
    response = http.post("/exports", json=body)
    assert response.status_code == 202, response.text
    job = response.json()
    assert response.headers["location"] == f"/exports/{job['id']}"
    return job


def wait(http: httpx.Client, job: Any, until: Callable[[Any], bool] = lambda job: job["finished"]) -> Any:
    deadline = time.monotonic() + SECONDS
    while True:
        found = http.get(f"/exports/{job['id']}").json()
        if until(found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def unpacked(http: httpx.Client, job: Any) -> dict[str, bytes]:
    """The result's files by their names, without the directory."""
    response = http.get(f"/exports/{job['id']}/download")
    response.raise_for_status()
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        found = {}
        for name in tar.getnames():
            file = tar.extractfile(name)
            assert file is not None
            found[name.split("/", 1)[1]] = file.read()
    return found


def sums(files: Files, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """Σ w s B A by module, from the adapters' files."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        tensors = load_file(files.adapters / name / WEIGHTS)
        config = json.loads((files.adapters / name / CONFIG).read_text())
        for key, a in tensors.items():
            if key.endswith(".lora_A.weight"):
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = tensors[key.replace("lora_A", "lora_B")]
                change = weight * config["lora_alpha"] / config["r"] * (b.float() @ a.float())
                found[path] = found.get(path, torch.zeros(())) + change
    return found


@pytest.mark.usefixtures("own_process")
def test_a_mixture_by_its_text_becomes_a_model_that_is_the_sum(http: httpx.Client, files: Files) -> None:
    job = ask(http, model="a:0.7+b:-0.3", base="16bit", dtype="float32")
    assert (job["object"], job["status"], job["adapter"], job["version"]) == (
        "export",
        "queued",
        "a:0.7+b:-0.3",
        None,
    )
    parts = [(part["adapter"], part["version"], part["weight"]) for part in job["parts"]]
    assert parts == [("a", 1, 0.7), ("b", 1, -0.3)]
    done = wait(http, job)
    assert done["status"] == "succeeded", done
    assert [part["name"] for part in done["manifest"]["adapter"]["parts"]] == ["a", "b"]
    assert done in http.get("/exports", params={"adapter": "a:0.7+b:-0.3"}).json()["data"]
    merged = load(unpacked(http, done)["model.safetensors"])
    wanted = sums(files, {"a": 0.7, "b": -0.3})
    for name, weight in load_file(files.base / "model.safetensors").items():
        expected = weight.float() + wanted.get(name.removesuffix(".weight"), 0)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)
    home = Path(done["path"]).parent
    assert not (home / "parts").exists()
    assert http.delete(f"/exports/{done['id']}").json()["deleted"] is True
    assert not home.exists()


@pytest.mark.parametrize("combine", ["cat", "svd"])
def test_a_mixture_by_its_parts_becomes_one_adapter(http: httpx.Client, files: Files, combine: str) -> None:
    parts = [{"adapter": "a", "weight": 0.5}, {"adapter": "c"}]
    more = {"combine": "svd", "rank": 3} if combine == "svd" else {}
    done = wait(http, ask(http, mixture=parts, format="peft", **more))
    assert done["status"] == "succeeded", done
    assert done["adapter"] == "a:0.5+c:1"
    found = unpacked(http, done)
    tensors, config = load(found[WEIGHTS]), json.loads(found[CONFIG])
    assert config["lora_alpha"] == config["r"]
    assert set(config["target_modules"]) >= {"o_proj", "q_proj"}
    off = size = 0.0
    for path, wanted in sums(files, {"a": 0.5, "c": 1.0}).items():
        a, b = (tensors[f"base_model.model.{path}.lora_{half}.weight"] for half in "AB")
        off, size = off + (b @ a - wanted).square().sum().item(), size + wanted.square().sum().item()
        assert combine == "cat" or len(a) == 3
    assert done["manifest"]["error"]["overall"] == pytest.approx((off / size) ** 0.5, rel=1e-3, abs=1e-6)
    assert (done["manifest"]["error"]["overall"] < 1e-6) == (combine == "cat")


@pytest.mark.parametrize(("model", "name"), [("a", "a"), ("a:0.5+c", "a:0.5+c:1")])
def test_an_adapter_and_a_mixture_become_a_file_for_llama_cpp(
    http: httpx.Client, model: str, name: str
) -> None:
    done = wait(http, ask(http, model=model, format="gguf-lora", dtype="float16"))
    assert done["status"] == "succeeded", done
    assert done["manifest"]["architecture"] == "qwen2"
    file = http.get(f"/exports/{done['id']}/download")
    assert file.headers["content-type"] == "application/octet-stream"
    assert f"filename*=utf-8''{quote(name)}.gguf" in file.headers["content-disposition"] or (
        f'filename="{name}.gguf"' in file.headers["content-disposition"]
    )
    assert (file.content[:4], len(file.content)) == (b"GGUF", done["bytes"])
    refused = http.post("/exports", json={"model": model, "format": "gguf-lora", "combine": "svd"})
    assert refused.json()["error"]["param"] == "rank"


def test_a_named_mixture_is_exported_with_its_version(http: httpx.Client) -> None:
    mixture = [{"adapter": "a", "weight": 0.5}, {"adapter": "b", "weight": 2}]
    http.post("/adapters", json={"name": "mixed", "mixture": mixture}).raise_for_status()
    version = http.get("/adapters/mixed").json()["version"]
    for path, body in (("/exports", {"model": "mixed"}), ("/adapters/mixed/export", {})):
        response = http.post(path, json={**body, "format": "peft"})
        assert response.status_code == 202, response.text
        job = wait(http, response.json())
        assert (job["status"], job["adapter"], job["version"]) == ("succeeded", "mixed", version)
        assert [part["weight"] for part in job["parts"]] == [0.5, 2]
        assert http.get(f"/adapters/mixed/export/{job['id']}").json() == job
    assert Path(job["path"]).name == "mixed.tar.gz"


def test_an_adapter_is_exported_by_its_name_and_made_smaller_by_svd(http: httpx.Client, files: Files) -> None:
    plain = wait(http, ask(http, model="b", format="peft"))
    assert (plain["version"], plain["parts"]) == (1, [])
    assert unpacked(http, plain)[WEIGHTS] == (files.adapters / "b" / WEIGHTS).read_bytes()
    small = wait(http, ask(http, model="b", format="peft", combine="svd", rank=2))
    assert small["status"] == "succeeded", small
    assert small["manifest"]["rank"] == 2
    assert len(small["digest"]) == 64


def test_the_versions_of_the_moment_are_exported_whatever_comes_after(
    http: httpx.Client, server: Running, files: Files
) -> None:
    """Files are linked when the job is asked for; the parts are deleted, and gone from the store, before its turn."""
    http.post("/adapters", json={"name": "mine", "src": "templated"}).raise_for_status()
    registered = http.get("/adapters/mine").json()
    digest, version = registered["digest"], registered["version"]
    jobs = server.server.deps.exports
    assert jobs is not None
    go_on, run = threading.Event(), jobs._run

    async def held(job: Any) -> None:
        import asyncio

        await asyncio.to_thread(go_on.wait, SECONDS)
        await run(job)

    jobs._run = held  # type: ignore[method-assign]  # for this test
    try:
        job = ask(http, model="mine:0.5", format="peft")
        http.delete("/adapters/mine").raise_for_status()
        with pytest.raises(AdapterNotFound):
            server.server.catalog._store.path_of(digest)
        go_on.set()
        done = wait(http, job)
    finally:
        go_on.set()
        del jobs._run
    assert done["status"] == "succeeded", done
    assert done["parts"] == [{"adapter": "mine", "version": version, "digest": digest, "weight": 0.5}]
    assert (
        unpacked(http, done)["chat_template.jinja"]
        == (files.adapters / "templated" / "chat_template.jinja").read_bytes()
    )


def test_parts_that_go_before_they_are_linked_leave_nothing(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = server.server.deps.exports
    assert jobs is not None
    files_of = jobs._files_of
    digest = http.get("/adapters/b").json()["digest"]

    def without_b(wanted: str) -> Path:
        if wanted == digest:
            raise AdapterNotFound("it is gone")
        return files_of(wanted)

    monkeypatch.setattr(jobs, "_files_of", without_b)
    refused = http.post("/exports", json={"model": "a:1+b:1"})
    assert refused.status_code == 400
    assert "gone" in refused.json()["error"]["message"]
    assert http.get("/exports").json()["data"] == []
    assert not jobs.directory.exists() or list(jobs.directory.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({}, 400, None, "give either model"),
        ({"model": "a", "mixture": [{"adapter": "b"}]}, 400, None, "give either model"),
        ({"model": "nope"}, 404, "model", "nope"),
        ({"model": "a:1+nope:1"}, 404, "model", "nope"),
        ({"mixture": [{"adapter": "a"}, {"adapter": "nope"}]}, 404, "mixture", "nope"),
        ({"model": BASE}, 400, "model", "is the base"),
        ({"mixture": [{"adapter": BASE}]}, 400, "mixture", BASE),
        ({"model": "a:0+b:0"}, 400, "model", "every weight is 0"),
        ({"mixture": [{"adapter": "a", "weight": 0}]}, 400, "mixture", "every weight is 0"),
        ({"model": "a:1+a:2"}, 400, "model", "twice"),
        ({"model": "a:nan"}, 400, "model", "finite"),
        ({"mixture": [{"name": "a"}]}, 400, "mixture.0.name", "adapter"),
        (
            {"model": "a:1+b:1", "combine": "ties", "format": "peft"},
            400,
            "combine",
            "manylora merge --combine ties",
        ),
        ({"model": "a", "combine": "dare_linear", "format": "peft"}, 400, "combine", "manylora merge"),
        ({"model": "a:1+b:1", "combine": "mean", "format": "peft"}, 400, "combine", "cat"),
        ({"model": "a:1+b:1", "combine": "svd", "format": "peft"}, 400, "rank", "wanted rank"),
        ({"model": "a:1+b:1", "rank": 4, "format": "peft"}, 400, "rank", "svd"),
        ({"model": "a:1+b:1", "combine": "cat", "rank": 4, "format": "peft"}, 400, "rank", "svd"),
        ({"model": "a:1+b:1", "combine": "cat"}, 400, "combine", "format peft"),
        ({"model": "a", "density": 0.5}, 400, "density", "density"),
    ],
)
def test_what_can_t_be_had_is_refused_with_its_field(
    http: httpx.Client, body: dict[str, object], status: int, param: str | None, says: str
) -> None:
    response = http.post("/exports", json=body)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert says in error["message"]
    assert param is None or error["param"] == param
    assert http.get("/exports").json()["data"] == []


def test_parts_whose_templates_differ_are_refused(http: httpx.Client) -> None:
    http.post("/adapters", json={"name": "mine", "src": "templated"}).raise_for_status()
    response = http.post("/exports", json={"model": "a:1+mine:1"})
    assert response.status_code == 400
    assert "template" in response.json()["error"]["message"]


def test_parts_whose_tokenizers_differ_are_refused_before_there_is_a_job(
    http: httpx.Client, files: Files
) -> None:
    own = files.adapters / "lower"
    shutil.copytree(files.adapters / "b", own)
    content = json.loads((files.base / "tokenizer.json").read_text())
    (own / "tokenizer.json").write_text(json.dumps({**content, "normalizer": {"type": "Lowercase"}}))
    try:
        http.post("/adapters", json={"name": "mine", "src": "lower"}).raise_for_status()
        response = http.post("/exports", json={"mixture": [{"adapter": "a"}, {"adapter": "mine"}]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "mixture")
        assert "token" in response.json()["error"]["message"]
        assert http.get("/exports").json()["data"] == []
    finally:
        http.delete("/adapters/mine")
        shutil.rmtree(own)


def test_parts_that_pool_texts_in_different_ways_are_refused(http: httpx.Client, files: Files) -> None:
    """One that says nothing has no say."""
    try:
        for name, way in (("first", "mean"), ("second", "lasttoken")):
            shutil.copytree(files.adapters / "b", files.adapters / name)
            pool(files.adapters / name, way)
            http.post("/adapters", json={"name": name, "src": name}).raise_for_status()
        response = http.post("/exports", json={"model": "first:1+second:1"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
        assert "pool texts in different ways" in response.json()["error"]["message"]
        assert http.get("/exports").json()["data"] == []
        done = wait(http, ask(http, model="a:1+second:1"))
        assert json.loads(unpacked(http, done)["1_Pooling/config.json"]) == {"pooling_mode": "lasttoken"}
    finally:
        for name in ("first", "second"):
            http.delete(f"/adapters/{name}")
            shutil.rmtree(files.adapters / name, ignore_errors=True)


def test_an_unavailable_mixture_is_503_with_the_part(http: httpx.Client) -> None:
    http.post("/adapters", json={"name": "mine", "src": "b"}).raise_for_status()
    mixture = [{"adapter": "a"}, {"adapter": "mine"}]
    http.post("/adapters", json={"name": "mixed", "mixture": mixture}).raise_for_status()
    http.delete("/adapters/mine").raise_for_status()
    for path, body in (("/exports", {"model": "mixed"}), ("/adapters/mixed/export", {})):
        response = http.post(path, json=body)
        assert response.status_code == 503
        assert "mine" in response.json()["error"]["message"]


def test_an_unknown_job_is_404_with_those_there_are(http: httpx.Client) -> None:
    job = ask(http, model="a:1+b:1", format="peft")
    unknown = "/exports/export-0123456789abcdef"
    assert job["id"] in http.get(unknown).json()["error"]["message"]
    for method, path in (("GET", unknown), ("GET", f"{unknown}/download"), ("DELETE", unknown)):
        assert http.request(method, path).status_code == 404


def test_a_job_is_cancelled_by_its_id_alone(http: httpx.Client) -> None:
    job = ask(http, model="a:1+b:1")
    assert http.delete(f"/exports/{job['id']}").json()["status"] == "cancelled"
    assert http.get(f"/exports/{job['id']}/download").status_code == 400


def test_a_long_name_is_downloaded_whole(http: httpx.Client) -> None:
    """Over 100 bytes a tar's entry takes entries of its own, and an archive's file name has 255 at most."""
    names = ["n" * 128, "m" * 128]
    for name in names:
        http.post("/adapters", json={"name": name, "src": "b"}).raise_for_status()
    mixture = "+".join(names)
    try:
        for body in ({"model": names[0]}, {"model": mixture}, {"model": mixture, "format": "peft"}):
            done = wait(http, ask(http, **body))
            assert done["status"] == "succeeded", done
            assert len(unpacked(http, done)) >= 3
    finally:
        for name in names:
            http.delete(f"/adapters/{name}")


def test_the_routes_ask_for_the_admin_key(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path, admin_key="secret") as server:
        job = "/exports/export-0123456789abcdef"
        for method, path in (("POST", "/exports"), ("GET", job), ("GET", f"{job}/download"), ("DELETE", job)):
            assert httpx.request(method, server.url + path).status_code == 401


def test_a_restart_finds_the_results_of_mixtures(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        for name in ("a", "b"):
            http.post("/adapters", json={"name": name, "src": name}).raise_for_status()
        done = wait(http, ask(http, model="a:0.5+b", format="peft"))
        assert done["status"] == "succeeded", done
        record = Path(done["path"]).parent.parent / "job.json"
        values = json.loads(record.read_text())
        older = {key: values[key] for key in values if key not in ("parts", "combine", "rank")}
    with running(files, tmp_path) as server:
        assert httpx.get(f"{server.url}/exports").json()["data"] == [done]
    record.write_text(json.dumps(older))  # as it was written before there were mixtures
    with running(files, tmp_path) as server:
        assert httpx.get(f"{server.url}/exports").json()["data"] == [{**done, "parts": []}]
