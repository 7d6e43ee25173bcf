"""Adapters of other kinds than LoRA through HTTP: registered, mixed and deleted as any other."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from manylora.adapters.files import digest_of
from manylora.loadtest.material.checkpoints import ALL_LINEAR, AdapterShape, write_adapter
from tests.server.api.running import BASE, Files, Running
from tests.server.api.test_adapters import answer, directory  # noqa: F401 - a fixture

MODELS = (BASE, "a", "b", "scaled", "scaled:0.5+a:0.5", "scaled")


@pytest.fixture
def scaled(http: httpx.Client, files: Files, directory: Path) -> Iterator[dict[str, object]]:  # noqa: F811
    shape = AdapterShape(rank=6, targets=ALL_LINEAR, seed=11, dora=True)
    write_adapter(directory / "scaled", files.base, shape)
    made = http.post("/adapters", json={"name": "scaled", "src": "made/scaled"})
    assert made.status_code == 201, made.text
    yield made.json()
    http.delete("/adapters/scaled?abort=true")


def derived(files: Files) -> list[Path]:
    """What the server's store, beside the test's files, has computed of the adapter."""
    digest = digest_of(files.adapters / "made" / "scaled", 1 << 30)
    return list(files.root.parent.rglob(f".derived/{digest}*"))


def test_dora_is_served_beside_others_and_in_mixtures(
    http: httpx.Client, server: Running, files: Files, scaled: dict[str, object]
) -> None:
    assert (scaled["rank"], scaled["version"]) == (6, 1)
    alone = [answer(http, model) for model in MODELS]
    assert len(set(alone)) == len(MODELS) - 1, "the last is asked twice"
    with ThreadPoolExecutor(len(MODELS)) as pool:
        assert list(pool.map(lambda model: answer(http, model), MODELS)) == alone
    assert http.get("/adapters/scaled").json()["tier"] == "device"
    [norms] = derived(files)
    written = norms.stat().st_mtime_ns
    # The same weights under another name: what was computed of them is used again.
    http.post("/adapters", json={"name": "again", "src": "made/scaled"}).raise_for_status()
    assert answer(http, "again") == alone[3]
    assert [path.stat().st_mtime_ns for path in derived(files)] == [written]
    http.delete("/adapters/again").raise_for_status()
    gone = http.delete("/adapters/scaled").json()
    assert gone["freed"]["arena_rows"] == 7 * len(ALL_LINEAR), gone
    assert not derived(files)
    assert [answer(http, model) for model in MODELS[:3]] == alone[:3]
