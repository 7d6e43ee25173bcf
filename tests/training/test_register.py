"""Handing adapters to a server: a real one takes them under a name, then as its next version."""

import shutil
from functools import partial
from pathlib import Path

import httpx
import pytest

from manylora.training.errors import InvalidArgument, TrainingError
from manylora.training.parsing import parse_arguments
from manylora.training.register import can_register, register
from manylora.training.run import Surroundings, train
from tests.serving import serving
from tests.training.test_continuing import nobody

SQL = Path(__file__).resolve().parents[2] / "demo" / "adapters" / "sql"


def test_a_server_takes_an_adapter_and_then_its_next_version(tmp_path: Path) -> None:
    """It may be anywhere: nothing of what is sent lies below the server's adapter root."""
    root, broken = tmp_path / "root", tmp_path / "broken"
    root.mkdir()
    first, second = SQL, SQL.parent / "json"
    shutil.copytree(SQL, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"cut")
    with serving(tmp_path / "server", "--adapter-root", str(root), "--admin-key", "key") as server:
        assert register(server.url, "mine", first, "key").endswith("serves mine, version 1")
        assert register(server.url, "mine", second, "key").endswith("serves mine, version 2")
        names = [each["id"] for each in httpx.get(f"{server.url}/v1/models").json()["data"]]
        assert "mine" in names
        with pytest.raises(TrainingError, match="ready to be registered by hand"):
            register(server.url, "mine", first)
        with pytest.raises(TrainingError, match=r"adapter_model\.safetensors"):
            register(server.url, "other", broken, "key")
        # What is asked before a run, when there is no adapter yet.
        ask = partial(can_register, server.url)
        assert ask("new", "key").endswith("new will be a new adapter there")
        assert ask("mine", "key").endswith("mine will be given its next version there")
        boss = {"authorization": "Bearer key"}
        mixture = {"name": "both", "mixture": [{"adapter": "mine"}]}
        httpx.post(f"{server.url}/adapters", json=mixture, headers=boss).raise_for_status()
        with pytest.raises(TrainingError, match="'both' is a mixture there: choose another --adapter_name"):
            ask("both", "key")
        with pytest.raises(TrainingError, match="key"):
            ask("new", "another")
        with pytest.raises(TrainingError, match="--register"):
            ask("new")
        with pytest.raises(InvalidArgument, match="letters, digits"):
            ask("a name", "key")
        listed = httpx.get(f"{server.url}/adapters", headers={"authorization": "Bearer key"}).json()["data"]
        assert {each["name"]: each.get("version") for each in listed}["mine"] == 2
        assert "new" not in [each["name"] for each in listed]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense"])
def test_no_server_is_one_sentence_and_the_adapter_stays(tmp_path: Path, url: str) -> None:
    with pytest.raises(TrainingError, match="no manylora server answers") as refused:
        register(url, "mine", tmp_path)
    assert str(tmp_path) in str(refused.value)
    with pytest.raises(TrainingError, match="no manylora server answers"):
        can_register(url, "mine")


def test_a_server_that_is_not_there_ends_a_run_before_it_begins(tmp_path: Path) -> None:
    words = f"--data_path {tmp_path}/none.json --output_dir {tmp_path}/out --use_lora --register http://127.0.0.1:9"

    with pytest.raises(TrainingError, match=r"127\.0\.0\.1:9: no manylora server"):
        train(parse_arguments(words.split()), Surroundings(lambda _: None, nobody))
    plan = tmp_path / "tasks.yaml"
    plan.write_text("tasks: {a: {data_path: none.json}}")
    words = f"--tasks {plan} --output_dir {tmp_path}/out --register http://127.0.0.1:9"
    with pytest.raises(TrainingError, match="no manylora server"):
        train(parse_arguments(words.split()), Surroundings(lambda _: None, nobody))
