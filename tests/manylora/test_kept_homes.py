"""Data directories of earlier versions, served: the same names, versions, pins and answers. A newer one is refused."""

import contextlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from manylora.cli import app
from tests.adapters.kept.homes import BASE, KEPT, copy_of, told
from tests.adapters.kept.make import KEY, NAME, PROMPT, TOKENS, said
from tests.server.api.running import Files, running


@pytest.fixture
def files(tmp_path: Path) -> Files:
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "adapters").mkdir()
    return Files(tmp_path)


def check_said(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["adapters"] == expected["adapters"]
    assert found["answers"].keys() == expected["answers"].keys()
    for model, answer in expected["answers"].items():
        tokens, logprobs = zip(*answer, strict=True)
        now, logprobs_now = zip(*found["answers"][model], strict=True)
        assert now == tokens
        assert logprobs_now == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("schema", KEPT)
def test_an_earlier_data_directory_is_served(schema: str, files: Files, tmp_path: Path) -> None:
    data = tmp_path / "data"
    copy_of(schema, data)
    for _ in range(2):  # the second start finds what the first one made of it
        with running(files, data, api_key=KEY) as server:
            check_said(said(server), told(schema))
            registered = httpx.get(f"{server.url}/adapters/pinned").json()
            assert (registered["pin"], registered["tier"]) == (True, "device")


def test_an_earlier_mixture_is_served(files: Files, tmp_path: Path) -> None:
    copy_of("3", tmp_path / "data")
    with running(files, tmp_path / "data") as server:

        def ask(model: str) -> httpx.Response:
            body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
            return httpx.post(f"{server.url}/v1/completions", json=body)

        named, spelt = ask("mixed"), ask("plain:0.5+team/loaded:v1:-0.25")
        assert (named.status_code, spelt.status_code) == (200, 200), named.text + spelt.text
        assert named.json()["choices"] == spelt.json()["choices"]
        missing = ask("mixed-again")
        assert missing.status_code == 503
        assert "'gone'" in missing.json()["error"]["message"]
        assert ask("mixed-no-more").status_code == 404


@pytest.mark.usefixtures("logging_as_it_was")
def test_a_newer_data_directory_ends_a_start_in_one_line(tmp_path: Path) -> None:
    home = copy_of("3", tmp_path / "data")
    with contextlib.closing(sqlite3.connect(home / "registry.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '6'")
        connection.commit()
    before = (home / "registry.db").read_bytes()
    flags = ["--served-model-name", NAME, "--port", "0", "--kv-cache-gib", "0.02", "--arena-rows", "64"]
    ended = CliRunner().invoke(app, ["serve", str(BASE), *flags, "--data-dir", str(tmp_path / "data")])
    assert ended.exit_code == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("manylora: --data-dir")
    assert "a newer version of manylora wrote the adapter registry" in last
    assert "Traceback" not in ended.stderr
    assert (home / "registry.db").read_bytes() == before
    assert not list(home.glob("registry.db?*"))
