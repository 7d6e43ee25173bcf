"""`manylora keys`: on a data directory, in words and as JSON; what goes wrong is one line and status 2."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from manylora.adapters.registry import AdapterRegistry
from manylora.cli import app
from manylora.home import BaseIdentity, find_home


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of one base, as it was made."""
    place = tmp_path_factory.mktemp("new")
    write_home(place, "tiny", "a")
    return place


@pytest.fixture
def data(new: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(new, tmp_path / "data"))


def write_home(data: Path, name: str, weights: str) -> Path:
    home = find_home(data, BaseIdentity(name, "0" * 64, weights * 64)).directory
    AdapterRegistry(home / "registry.db").close()
    return home


def run(data: Path, *words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["keys", *words, "--data-dir", str(data)])
    return result.exit_code, result.stdout, result.stderr


def made(data: Path, *words: str) -> dict[str, Any]:
    status, out, err = run(data, "create", *words, "--json")
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_key_is_made_with_all_that_it_allows(data: Path) -> None:
    key = made(
        data,
        *("acme", "--model", "sql", "--model", "team-*@2", "--right", "infer", "--right", "manage"),
        *(
            "--requests-per-minute",
            "60",
            "--tokens-per-minute",
            "1000",
            "--parallel",
            "2",
            "--budget",
            "5000",
        ),
        *("--weight", "2.5", "--priority", "-1", "--adapter-bytes", "10", "--adapter-rows", "16"),
        *("--expires", "2999-01-31"),
    )
    assert key["key"].startswith("mlk_")
    told = {name: value for name, value in key.items() if name not in ("key", "id", "hint", "created")}
    assert told == {
        "object": "key",
        "tenant": "acme",
        "state": "active",
        "models": ["sql", "team-*@2"],
        "rights": ["infer", "manage"],
        "requests_per_minute": 60,
        "tokens_per_minute": 1000,
        "parallel": 2,
        "budget": 5000,
        "used": 0,
        "weight": 2.5,
        "priority": -1,
        "adapter_bytes": 10,
        "adapter_rows": 16,
        "expires": 32474736000,
        "revoked": None,
    }


def test_a_script_gets_the_secret_alone(data: Path) -> None:
    status, out, err = run(data, "create", "acme")
    assert status == 0
    assert out.startswith("mlk_")
    assert len(out.split()) == 1
    assert "acme" in err
    assert out.strip() not in err


def test_keys_are_listed_revoked_and_rotated(data: Path) -> None:
    first, second = made(data, "acme", "--budget", "5000"), made(data, "globex")
    status, out, _ = run(data, "revoke", second["id"])
    assert (status, second["id"] in out) == (0, True)
    status, out, _ = run(data, "rotate", first["id"], "--overlap", "60", "--json")
    rotated = json.loads(out)
    assert rotated["id"] == first["id"]
    assert rotated["key"] != first["key"]
    _, out, _ = run(data, "ls", "--json")
    listed = json.loads(out)["data"]
    assert [(each["id"], each["state"]) for each in listed] == [
        (first["id"], "active"),
        (second["id"], "revoked"),
    ]
    _, table, _ = run(data, "ls")
    for told in (out, table):
        assert not any(secret[8:] in told for secret in (first["key"], second["key"], rotated["key"]))
    lines = [json.loads(line) for line in (data / "audit.jsonl").read_text().splitlines()]
    assert [line["act"] for line in lines] == ["keys create", "keys create", "keys revoke", "keys rotate"]
    assert all(line["who"].startswith("command line") for line in lines)


def test_a_key_is_changed(data: Path) -> None:
    key = made(data, "acme", "--budget", "5000", "--parallel", "2", "--model", "sql", "--weight", "2")
    words = ("--requests-per-minute", "60", "--budget", "7000", "--unlimited", "parallel")
    status, out, _ = run(data, "set", key["id"], *words, "--expires", "2999-01-31", "--json")
    assert status == 0
    wanted = {**key, "requests_per_minute": 60, "budget": 7000, "parallel": None, "expires": 32474736000}
    assert json.loads(out) == {name: value for name, value in wanted.items() if name != "key"}
    status, out, _ = run(data, "set", key["id"], "--unlimited", "expires", "--model", "a", "--model", "b")
    assert (status, "budget 7,000" in out) == (0, True)
    _, out, _ = run(data, "ls", "--json")
    (found,) = json.loads(out)["data"]
    assert (found["models"], found["expires"], found["rights"], found["weight"]) == (
        ["a", "b"],
        None,
        ["infer"],
        2,
    )
    line = json.loads((data / "audit.jsonl").read_text().splitlines()[1])
    assert (line["act"], line["made"], line["tenant"]) == ("keys set", key["id"], "acme")
    assert line["changed"]["budget"] == 7000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("create", "a/b"), "tenant 'a/b'"),
        (("create", "acme", "--right", "root"), "no right 'root'"),
        (("create", "acme", "--model", "[x]"), "pattern '[x]'"),
        (("create", "acme", "--budget", "0"), "budget is 0"),
        (("create", "acme", "--expires", "soon"), "'soon' is no time"),
        (("create", "acme", "--expires", "2020-01-01"), "2020-01-01T00:00Z is over"),
        (("set", "key-1", "--expires", "2020-01-01"), "2020-01-01T00:00Z is over"),
        (("revoke", "key-1"), "no key 'key-1'"),
        (("rotate", "key-1"), "no key 'key-1'"),
        (("set", "key-1", "--budget", "5"), "no key 'key-1'"),
        (("set", "key-1"), "nothing is to be changed"),
        (("set", "key-1", "--unlimited", "weight"), "'weight' is no limit"),
        (("set", "key-1", "--right", "root"), "no right 'root'"),
        (("ls", "--base", "other"), "no base 'other'; bases: tiny"),
        (("ls", "--url", "http://127.0.0.1:9"), "no server answers"),
    ],
)
def test_what_is_wrong_is_one_line(data: Path, words: tuple[str, ...], said: str) -> None:
    status, out, err = run(data, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_the_base_is_named_where_there_are_several(data: Path, tmp_path: Path) -> None:
    status, _, err = run(tmp_path / "nothing", "ls")
    assert (status, "holds no registry" in err) == (2, True)
    write_home(data, "other", "b")
    status, _, err = run(data, "create", "acme")
    assert (status, "several bases" in err, "other" in err) == (2, True, True)
    made(data, "acme", "--base", "other")
    assert json.loads(run(data, "ls", "--base", "tiny", "--json")[1])["data"] == []
