"""An adapter that was trained on another form of the base: the answer, the banner and `adapters show` say so."""

import json
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import torch
from typer.testing import CliRunner

from manylora.adapters.base_form import BaseForm
from manylora.assemble import Server, assemble
from manylora.banner import banner, warnings_at_start
from manylora.base import load_base as load_served
from manylora.cli import app
from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter, write_base
from manylora.quant.nf4 import DOUBLE_QUANT
from manylora.server.api.adapters import describe
from manylora.server.config import ServeSettings
from manylora.train_command import served_as_trained
from manylora.training.arguments import LoraArguments
from manylora.training.bases.load import load_base
from manylora.training.bases.servable import serve_command
from manylora.training.bases.types import BaseSettings
from manylora.training.memory.run_shape import RunShape
from manylora.training.register import register
from tests.serving import serving

WITH_NF4 = "start the server with --quantization none"
runner = CliRunner(env={"COLUMNS": "300"})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and below adapters/ one that says it was trained on 16 bits, one on NF4, and one that says nothing."""
    root = tmp_path_factory.mktemp("forms")
    base = write_base(root / "base")
    for seed, kind in enumerate(("dense", "nf4", "silent")):
        adapter = write_adapter(root / "adapters" / kind, base, AdapterShape(rank=4, seed=seed))
        if kind != "silent":
            held = {"kind": kind, "double_quant": False, "dtype": "bf16", "directory": str(base)}
            (adapter / "manylora_base.json").write_text(json.dumps(held))
    return root


@asynccontextmanager
async def server_of(files: Path, data: Path, **settings: object) -> AsyncIterator[tuple[Server, str]]:
    """The server in this process, and what it says at start."""
    small = {"data_dir": data, "kv_cache_gib": 0.01, "arena_rows": 64, "dtype": "float32"}
    given = ServeSettings(adapter_root=files / "adapters", **small, **settings)
    server = assemble(given, files / "base", "model", lambda done, total: None)
    server.engine.start()
    try:
        await server.catalog.restore()
        shown = banner(server, given, "model", "http://here").values()
        yield server, "\n".join([*shown, *warnings_at_start(server, given)])
    finally:
        await server.engine.stop()
        await server.catalog.close()


def notes(server: Server) -> dict[str, object]:
    return {entry.record.name: describe(entry)["note"] for entry in server.catalog.list()}


async def test_the_note_stands_until_the_base_is_served_as_in_training(files: Path, tmp_path: Path) -> None:
    async with server_of(files, tmp_path) as (server, _):
        for name in ("dense", "nf4", "silent"):
            await server.catalog.register(name, name)
        found = notes(server)
        assert (found["nf4"], found["silent"]) == (None, None)
        assert WITH_NF4 in str(found["dense"])
    async with server_of(files, tmp_path) as (server, said):
        assert notes(server) == found, "a restart knows it too"
        assert "(1 trained on another form of the base)" in said
        assert "of 1 adapters (dense) each was trained on the base in another form" in said
    async with server_of(files, tmp_path, quantization="none") as (server, said):
        found = notes(server)
        assert (found["dense"], found["silent"]) == (None, None)
        assert "without --quantization none" in str(found["nf4"])
        assert "of 1 adapters (nf4) each was trained on the base in another form" in said
    async with server_of(files, tmp_path, double_quant=True) as (server, _):
        assert "without --double-quant" in str(notes(server)["nf4"])


def test_the_answer_the_log_and_the_commands_say_so(files: Path, tmp_path: Path) -> None:
    flags = (str(files / "base"), "--adapter-root", str(files / "adapters"), "--kv-cache-gib", "0.05")
    with serving(tmp_path, *flags) as server:
        said = register(server.url, "mine", files / "adapters" / "dense")
        assert said.startswith(
            f"{server.url} serves mine, version 1; it was trained on the base in another form"
        )
        assert WITH_NF4 in said
        assert register(server.url, "other", files / "adapters" / "nf4").endswith("serves other, version 1")
        again = httpx.put(f"{server.url}/adapters/other", json={"src": "dense"}).json()
        assert WITH_NF4 in again["note"]
        for command in (["show", "mine"], ["list"], ["add", "third", "dense"], ["replace", "mine", "dense"]):
            result = runner.invoke(app, ["adapters", *command, "--url", server.url])
            assert result.exit_code == 0, result.output
            assert WITH_NF4 in result.stdout, command
        shown = runner.invoke(app, ["adapters", "show", "mine", "--url", server.url]).stdout
        for words in ("mine", "version", "rank", "upload", "available"):
            assert words in shown
        assert json.loads(
            runner.invoke(app, ["adapters", "show", "mine", "--json", "--url", server.url]).stdout
        )["note"]
        assert runner.invoke(app, ["adapters", "show", "nobody", "--url", server.url]).exit_code == 2
        lines = [line for line in server.log.read_text().splitlines() if "adapter_note" in line]
        assert any(WITH_NF4 in line for line in lines)


@pytest.mark.parametrize(
    ("held", "quantization", "flags"),
    [
        ({}, "none", ["--quantization", "none"]),
        ({"q_lora": True}, "nf4", []),
        ({"q_lora": True, "double_quant": True}, "nf4", ["--double-quant"]),
    ],
)
def test_answers_are_judged_on_the_form_that_is_trained_and_that_the_last_line_serves(
    files: Path, held: dict[str, bool], quantization: str, flags: list[str]
) -> None:
    base = load_base(BaseSettings(str(files / "base"), device=torch.device("cpu"), **held))  # type: ignore[arg-type]  # bools
    served = served_as_trained(base)
    assert (served.quantization, served.double_quant) == (quantization, "--double-quant" in flags)
    words = shlex.split(serve_command(base, {"mine": files / "my adapter"}, rank=4))
    adapter = f"mine={(files / 'my adapter').resolve()}"
    assert words == ["manylora", "serve", str(files / "base"), *flags, "--adapter", adapter]
    assert "--max-rank 300" in serve_command(base, {"mine": files}, rank=300)
    assert str(base.form) == str(_form_of(words[2:]))


def _form_of(words: list[str]) -> BaseForm:
    """What a server with these words holds, by the command's own parser and the loader's report."""
    given = dict(zip(words[1::2], words[2::2], strict=False)) if "--double-quant" not in words else {}
    settings = ServeSettings(
        quantization=given.get("--quantization", "auto"),
        double_quant="--double-quant" in words,
        dtype="float32",
    )
    return load_served(settings, Path(words[0]), lambda done, total: None).form


def test_training_serving_and_planning_double_quantise_alike_by_default() -> None:
    defaults = (
        ServeSettings().double_quant,
        BaseSettings("base").double_quant,
        LoraArguments().double_quant,
        RunShape().double_quant,
    )
    assert set(defaults) == {DOUBLE_QUANT}
