"""Two fine-tunes of one model, in folders of one name, on one data directory: neither sees the other's adapters."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from manylora.assemble import Server, assemble
from manylora.banner import banner, warnings_at_start
from manylora.home import OWNER_FILE
from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter, write_base
from manylora.server.api.adapters import describe
from manylora.server.config import ServeSettings
from manylora.server.errors import ModelNotFound


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """first/model and second/model with one config.json, and two adapters below adapters/."""
    root = tmp_path_factory.mktemp("files")
    bases = [write_base(root / name / "model", seed=seed) for seed, name in enumerate(("first", "second"))]
    assert len({(base / "config.json").read_bytes() for base in bases}) == 1
    for seed, name in enumerate(("one", "two")):
        write_adapter(root / "adapters" / name, bases[0], AdapterShape(rank=4, seed=seed))
    return root


@asynccontextmanager
async def serving(files: Path, which: str, data: Path) -> AsyncIterator[tuple[Server, str]]:
    """Start as `manylora serve` does, on the model in ``which``; the server and what it says at start."""
    settings = ServeSettings(
        adapter_root=files / "adapters", data_dir=data, kv_cache_gib=0.01, arena_rows=64, dtype="float32"
    )
    server = assemble(settings, files / which / "model", "model", lambda done, total: None)
    server.engine.start()
    try:
        await server.catalog.restore()
        shown = banner(server, settings, "model", "http://here").values()
        yield server, "\n".join([*shown, *warnings_at_start(server, settings)])
    finally:
        await server.engine.stop()
        await server.catalog.close()


def notes(server: Server) -> dict[str, object]:
    return {entry.record.name: describe(entry)["note"] for entry in server.catalog.list()}


def make_as_before(data: Path, base: Path) -> None:
    """Turn the only home into one of when a base was known by its config.json alone."""
    (home,) = data.glob("model-*")
    (home / OWNER_FILE).unlink()
    config = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    home.rename(home.with_name(f"model-{config[:8]}"))


async def test_another_fine_tune_does_not_serve_what_was_registered_for_the_first(
    files: Path, tmp_path: Path
) -> None:
    async with serving(files, "first", tmp_path) as (server, said):
        await server.catalog.register("one", "one")
        assert "another base of this name" not in said
    async with serving(files, "second", tmp_path) as (server, said):
        assert notes(server) == {}
        assert "holds adapters of another base of this name" in said
        with pytest.raises(ModelNotFound):
            server.catalog.resolve("one")
        await server.catalog.register("two", "two")
    async with serving(files, "first", tmp_path) as (server, said):
        assert notes(server) == {"one": None}
        assert "another base of this name" not in said


async def test_a_data_directory_from_before_is_taken_over_and_its_adapters_say_so(
    files: Path, tmp_path: Path
) -> None:
    async with serving(files, "first", tmp_path) as (server, _):
        await server.catalog.register("gone", "two")
        await server.catalog.register("one", "one")
        await server.catalog.delete("gone")
    make_as_before(tmp_path, files / "first" / "model")
    for start in ("taken over", "found again"):
        async with serving(files, "first", tmp_path) as (server, said):
            if start == "taken over":
                await server.catalog.register("two", "two")
            found = notes(server)
            assert "perhaps for other weights" in str(found["one"])
            assert found["two"] is None
            assert "of 1 adapters (one) each was registered when a base was known by its config.json" in said
            assert "(1 perhaps for other weights than these)" in said
    async with serving(files, "second", tmp_path) as (server, _):
        assert notes(server) == {}
    async with serving(files, "first", tmp_path) as (server, _):
        await server.catalog.delete("one")
        await server.catalog.register("one", "one")
        assert notes(server) == {"one": None, "two": None}
