"""Handing adapters to a server: a real one takes them under a name, then as its next version."""

import shutil
from pathlib import Path

import httpx
import pytest

from manylora.training.errors import TrainingError
from manylora.training.register import register
from tests.serving import serving

SQL = Path(__file__).resolve().parents[2] / "demo" / "adapters" / "sql"


def test_a_server_takes_an_adapter_and_then_its_next_version(tmp_path: Path) -> None:
    root = tmp_path / "root"
    first, second, outside = root / "first", root / "second", tmp_path / "outside"
    shutil.copytree(SQL, first)
    shutil.copytree(SQL.parent / "json", second)
    shutil.copytree(SQL, outside)
    with serving(tmp_path / "server", "--adapter-root", str(root), "--admin-key", "key") as server:
        assert register(server.url, "mine", first, "key").endswith("serves mine, version 1")
        assert register(server.url, "mine", second, "key").endswith("serves mine, version 2")
        names = [each["id"] for each in httpx.get(f"{server.url}/v1/models").json()["data"]]
        assert "mine" in names
        with pytest.raises(TrainingError, match="ready to be registered by hand"):
            register(server.url, "mine", first)
        with pytest.raises(TrainingError, match="leads out of"):
            register(server.url, "other", outside, "key")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense"])
def test_no_server_is_one_sentence_and_the_adapter_stays(tmp_path: Path, url: str) -> None:
    with pytest.raises(TrainingError, match="no manylora server answers") as refused:
        register(url, "mine", tmp_path)
    assert str(tmp_path) in str(refused.value)
