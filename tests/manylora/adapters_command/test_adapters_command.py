"""`manylora adapters` on a real server: tables, JSON, completion, exports, and one line for what goes wrong."""

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gguf import GGUFReader
from typer.testing import CliRunner, Result

from manylora.cli import app, main
from tests.serving import Served, answer, serving, write_two_adapters

KEY = "secret"
Adapters = Callable[..., Result]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_adapters(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def server(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    small = ("--kv-cache-gib", "0.05", "--threads", "1", "--kernels", "plain")
    flags = (str(files / "base"), "--adapter-root", str(files / "adapters"), "--admin-key", KEY, *small)
    with serving(tmp_path_factory.mktemp("served"), *flags) as server:
        yield server


@pytest.fixture
def adapters(server: Served) -> Adapters:
    def run(*words: str, url: str = server.url) -> Result:
        return CliRunner().invoke(
            app, ["adapters", *words], env={"MANYLORA_ADMIN_KEY": KEY, "MANYLORA_URL": url}
        )

    return run


@pytest.fixture(autouse=True)
def _nothing_is_left(adapters: Adapters, server: Served) -> Iterator[None]:
    yield
    for each in reversed(told(adapters("ls", "--json"))["data"]):
        assert adapters("rm", each["name"]).exit_code == 0


def told(done: Result) -> Any:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def row(done: Result, name: str) -> list[str]:
    rows = ([cell.strip() for cell in line.strip("│ ").split("│")] for line in done.stdout.splitlines())
    return next(cells for cells in rows if cells[0] == name)


def test_an_adapter_is_added_shown_and_removed(adapters: Adapters, server: Served, files: Path) -> None:
    one = files / "adapters" / "one"
    nbytes = sum(path.stat().st_size for path in one.iterdir())
    assert adapters("add", "first", "one").stdout.startswith("serves first, version 1, rank 4 (id ")
    name, version, rank, size, tier, requests, last, source = row(adapters("ls"), "first")
    assert (name, version, rank, requests, last) == ("first", "1", "4", "0", "never")
    assert size == f"{nbytes / 1000:.1f} kB"
    assert (tier, source) == ("host", "one")
    answer(server, "first")
    assert row(adapters("list"), "first")[5] == "1", "by the name that it had first"
    again = told(adapters("add", "first", "two", "--replace", "--pin", "--json"))
    assert (again["version"], again["rank"], again["pin"]) == (2, 8, True)
    shown = adapters("show", "first").stdout
    assert [line.split()[0] for line in shown.splitlines()][:4] == ["name", "version", "versions", "id"]
    assert told(adapters("show", "first", "--json"))["name"] == "first"
    assert adapters("rm", "first").stdout.startswith("removed first: ")
    assert adapters("show", "first").exit_code == 2


def test_a_directory_here_is_read_by_the_server_or_uploaded(
    adapters: Adapters, server: Served, files: Path, tmp_path: Path
) -> None:
    inside = told(adapters("add", "inside", str(files / "adapters" / "one"), "--json"))
    assert inside["src"] == str(files / "adapters" / "one")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(files / "adapters" / "two", elsewhere)
    token = ("--source-token", "for-other-sources")
    assert told(adapters("add", "inside", inside["src"], *token, "--json"))["id"] == inside["id"]
    sent = told(adapters("add", "sent", str(elsewhere), "--pin", "--json"))
    assert (sent["src"], sent["rank"], sent["pin"], sent["state"]) == ("upload", 8, True, "available")
    answer(server, "sent")
    replaced = adapters("add", "inside", str(elsewhere), "--replace")
    assert replaced.stdout.startswith("serves inside, version 2, rank 8 (id "), replaced.output
    begun = adapters("add", "later", "one", "--no-wait")
    assert (begun.exit_code, "later: " in begun.stdout) == (0, True)
    assert told(adapters("add", "later", "one", "--json"))["name"] == "later"
    (elsewhere / "adapter_model.safetensors").write_bytes(b"spoilt")
    wrong = adapters("add", "spoilt", str(elsewhere))
    assert (wrong.exit_code, wrong.stdout, len(wrong.stderr.splitlines())) == (2, "", 1)
    assert "adapter_model.safetensors" in wrong.stderr
    shutil.rmtree(elsewhere)
    elsewhere.mkdir()
    assert "no adapter_config.json" in adapters("add", "empty", str(elsewhere)).stderr
    assert adapters("rm", "spoilt").stdout.startswith("spoilt: failed: ")


def test_a_canary_is_read_by_the_server_or_uploaded(adapters: Adapters, files: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(files / "adapters" / "two", elsewhere)
    assert adapters("add", "tune", "one").exit_code == 0
    trial = ("canary", "tune", "--share", "0.25", "--src")
    sent = told(adapters(*trial, str(elsewhere), "--source-token", "for-other-sources", "--json"))
    tried = sent["data"][0]
    assert (sent["canary"], tried["src"]) == ({"version": 2, "share": 0.25}, "upload")
    inside = told(adapters(*trial, str(files / "adapters" / "two"), "--json"))
    assert inside["canary"] == sent["canary"], "the same weights are the same version"
    (elsewhere / "adapter_model.safetensors").write_bytes(b"spoilt")
    wrong = adapters(*trial, str(elsewhere))
    assert (wrong.exit_code, wrong.stdout, len(wrong.stderr.splitlines())) == (2, "", 1)
    assert "adapter_model.safetensors" in wrong.stderr
    failed = next(line for line in adapters("show", "tune").stdout.splitlines() if "registration" in line)
    assert failed.rstrip().endswith(", from upload, for 25 %")
    begun = adapters(*trial, "two", "--no-wait")
    assert (begun.exit_code, "tune: " in begun.stdout) == (0, True), begun.output
    assert told(adapters("canary", "tune", "--end", "--json"))["canary"] is None


def test_versions_are_shown_tried_promoted_and_gone_back_to(adapters: Adapters, server: Served) -> None:
    assert adapters("add", "sql", "one").exit_code == 0
    tried = adapters("canary", "sql", "--src", "two", "--share", "0.25")
    assert row(tried, "2")[:3] == ["2", "canary, 25 %", "8"]
    assert row(adapters("ls"), "sql")[1] == "1, 2 for 25 %"
    assert "version 2 for 25 %" in adapters("show", "sql").stdout
    assert told(adapters("show", "sql@2", "--json"))["role"] == "canary"
    assert "has no version '7'; versions: 2, 1" in adapters("show", "sql@7").stderr
    assert told(adapters("canary", "sql", "--promote", "--json"))["active"] == 2
    answer(server, "sql")
    assert [row(adapters("versions", "sql"), each)[1::5] for each in "21"] == [
        ["active", "now"],
        ["kept", "never"],
    ]
    back = adapters("rollback", "sql")
    assert back.stdout.startswith("sql answers by version 1\n"), back.output
    assert "is the active one" in adapters("rollback", "sql", "1").stderr
    assert told(adapters("rollback", "sql", "2", "--json"))["active"] == 2
    assert adapters("canary", "sql", "--end").exit_code == 2, "there is none"
    assert "--abort goes with a whole name" in adapters("rm", "sql@1", "--abort").stderr
    refused = adapters("canary", "sql", "--src", "one", "--share", "0.5", "--source-token", "t")
    assert "token" in refused.stderr, "it is sent along, and nothing here asks for one"
    assert adapters("rm", "sql@1").stdout == "removed version 1 of sql\n"
    assert [each["version"] for each in told(adapters("versions", "sql", "--json"))["data"]] == [2]


def test_an_adapter_and_a_mixture_are_exported_to_files(
    adapters: Adapters, server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        assert adapters("add", f"team/{name}", name).exit_code == 0
    assert adapters("export", "team/one").stdout.startswith("team_one.tar.gz: team/one as peft, ")
    with tarfile.open("team_one.tar.gz") as archive:
        assert "team_one/adapter_model.safetensors" in archive.getnames()
    made = told(
        adapters("export", "team/one:0.5+team/two", "--format", "gguf-lora", "-o", "both.gguf", "--json")
    )
    assert (made["status"], made["output"], made["manifest"]["combine"]) == ("succeeded", "both.gguf", "cat")
    alpha = GGUFReader(tmp_path / "both.gguf").get_field("adapter.lora.alpha")
    assert alpha is not None
    assert alpha.contents() == 12, "ranks 4 and 8 side by side, at a scale of 1"
    again = adapters("export", "team/one")
    assert (again.exit_code, again.stderr) == (2, again.stderr)
    assert "team_one.tar.gz exists" in again.stderr
    headers = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{server.url}/exports", headers=headers).json()["data"] == [], "nothing is left there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.gguf", "team_one.tar.gz"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("show", "nobody"), "there is no adapter 'nobody'"),
        (("rm", "nobody"), "there is no adapter 'nobody'"),
        (("add", "x", "nowhere"), "nowhere"),
        (("add", "a b", "one"), "a b"),
        (("add", "x", "one", "--replace"), "there is no adapter 'x'"),
        (("rm", "x@y"), "'y' is no version"),
        (("canary", "x", "--promote", "--end"), "one at a time"),
        (("canary", "x", "--share", "0.5"), "a trial needs"),
        (("export", "nobody", "-o", "out.tar.gz"), "'nobody' does not exist"),
        (("export", "nobody", "--format", "zip"), "format"),
        (("ls", "--admin-key", "wrong"), "key"),
        (("ls", "--admin-key", "schlüssel"), "--admin-key"),
        (("ls", "--url", "http://127.0.0.1:1"), "no server answers at http://127.0.0.1:1"),
        (("ls", "--url", "ftp://host"), "no server answers"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_what_goes_wrong_is_said_in_one_line(
    adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = adapters(*words)
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert says in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_shell_is_told_names_from_the_server(
    adapters: Adapters, server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("north/one", "north/two", "south"):
        assert adapters("add", name, "one").exit_code == 0
    assert adapters("mix", "northern", "north/one").exit_code == 0
    monkeypatch.setenv("_MANYLORA_COMPLETE", "complete_bash")
    monkeypatch.setenv("MANYLORA_ADMIN_KEY", KEY)

    def completed(line: str, url: str = server.url) -> list[str]:
        monkeypatch.setenv("MANYLORA_URL", url)
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().out.split()

    assert completed("manylora adapters show no") == ["north/one", "north/two", "northern"]
    assert completed("manylora adapters canary no") == ["north/one", "north/two"]
    assert completed("manylora adapters show no", "http://127.0.0.1:1") == []
    assert completed("manylora adapters fs") == ["fsck"]
    assert completed("manylora be") == ["bench"]


def test_a_data_directory_is_checked_once_its_server_is_gone(
    adapters: Adapters, server: Served, files: Path, tmp_path: Path
) -> None:
    assert adapters("add", "kept", "one").exit_code == 0
    words = ("fsck", "--data-dir", str(server.data_dir))
    busy = adapters(*words)
    assert (busy.exit_code, busy.stdout) == (2, "")
    assert f"process {server.process.pid}" in busy.stderr
    with serving(tmp_path, str(files / "base"), "--adapter", f"kept={files / 'adapters' / 'one'}") as other:
        other.end()
    words = ("fsck", "--data-dir", str(other.data_dir))
    said = adapters(*words)
    assert said.exit_code == 0, said.output
    assert ": 1 adapters in 1 versions, 0 mixtures, 1 sets of files, " in said.stdout
    assert said.stdout.rstrip().endswith(": all sound")
    [weights] = other.data_dir.glob("*/adapters/*/adapter_model.safetensors")
    (weights.parents[1] / ".staging" / "half").mkdir()
    weights.write_bytes(b"")
    found = adapters(*words, "--repair", "--json")
    assert found.exit_code == 1
    [base] = json.loads(found.stdout)["bases"]
    assert [(each["kind"], each["repaired"]) for each in base["findings"]] == [
        ("staging", True),
        ("files", False),
    ]
    assert adapters("fsck", "--data-dir", str(tmp_path / "nowhere")).exit_code == 2
    assert adapters(*words, "--base", "other").exit_code == 2
