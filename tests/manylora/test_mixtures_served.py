"""Mixtures from the command line: `--mixture` at start, there again after a restart, `manylora adapters mix`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from manylora.cli import app
from manylora.server.config_sources import SettingsError, load_settings
from tests.serving import answer, serving, write_two_adapters


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_adapters(tmp_path_factory.mktemp("files"))


def flags(files: Path, *more: str) -> tuple[str, ...]:
    adapters = files / "adapters"
    both = [word for name in ("one", "two") for word in ("--adapter", f"{name}={adapters / name}")]
    return (str(files / "base"), *both, "--kv-cache-gib", "0.05", *more)


def test_a_mixture_flag_serves_what_it_says_now(files: Path, tmp_path: Path) -> None:
    with serving(tmp_path, *flags(files, "--mixture", "both=one:0.5+two:-2")) as server:
        assert answer(server, "both") == answer(server, "one:0.5+two:-2") != answer(server, "base")
        said = server.log.read_text()
        assert '"mixtures": "both"' in said
        assert "from now on" not in said
        server.interrupt()
        assert server.process.wait(timeout=20) == 0
    with serving(tmp_path, *flags(files)) as server:
        found = httpx.get(f"{server.url}/adapters/both").json()
        assert (found["version"], found["state"]) == (1, "available")
        assert answer(server, "both") == answer(server, "one:0.5+two:-2")
    with serving(tmp_path, *flags(files, "--mixture", "both=two")) as server:
        assert httpx.get(f"{server.url}/adapters/both").json()["version"] == 2
        said = " ".join(server.log.read_text().split())
    assert (
        "mixture both is two:1 from now on (version 2); in --data-dir it was one:0.5+two:-2 (version 1)"
        in said
    )


def test_a_mixture_whose_part_is_gone_is_told_at_start(files: Path, tmp_path: Path) -> None:
    with serving(tmp_path, *flags(files, "--mixture", "both=one+two")) as server:
        httpx.delete(f"{server.url}/adapters/two").raise_for_status()
        server.end()
    with serving(tmp_path, *flags(files)[:3], "--kv-cache-gib", "0.05") as server:
        said = " ".join(server.log.read_text().split())
        assert "mixture both is unavailable: part 'two' does not exist" in said
        assert httpx.get(f"{server.url}/adapters/both").json()["state"] == "unavailable"


@pytest.mark.parametrize(
    ("mixture", "says"),
    [
        ("both=one+nobody", "--mixture both=one+nobody: part 'nobody' does not exist"),
        ("both=one+one", "'one' is in the mixture twice"),
        ("both=one:nan", "finite"),
        ("one=two", "'one' is an adapter"),
        ("base=two", "the base model"),
        ("both", "'both' is not name=parts, for example sailor-sql=sql:0.7+pirate:0.3"),
        ("both=", "is not name=parts"),
    ],
)
def test_a_mixture_that_makes_no_sense_ends_the_start_in_one_line(
    files: Path, tmp_path: Path, mixture: str, says: str
) -> None:
    given = [*flags(files, "--mixture", mixture), "--port", "0", "--data-dir", str(tmp_path)]
    ended = CliRunner().invoke(app, ["serve", *given])
    assert ended.exit_code == 2
    assert says in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("manylora: ")


def test_mixtures_are_a_setting_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_MIXTURE", "m=a:0.5+b, n=a")
    settings = load_settings({})
    assert [(each.mixture_name, each.spelled) for each in settings.mixtures] == [("m", "a:0.5+b"), ("n", "a")]
    with pytest.raises(SettingsError, match="the same mixture name is given twice"):
        load_settings({"mixture": ["m=a", "m=b"]})
    monkeypatch.delenv("MANYLORA_MIXTURE")
    file = tmp_path / "settings.toml"
    file.write_text('mixture = ["m=a+b"]\nmax-mixture-parts = 2\n')
    settings = load_settings({}, file)
    assert (settings.mixture, settings.max_mixture_parts) == (("m=a+b",), 2)


Adapters = Callable[..., Result]


@pytest.fixture(scope="module")
def adapters(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapters]:
    """`manylora adapters`, asking a server with one, two, and team/two:v2."""
    more = ("--admin-key", "secret", "--adapter", f"team/two:2={files / 'adapters' / 'two'}")
    with serving(tmp_path_factory.mktemp("served"), *flags(files, *more)) as server:

        def run(*arguments: str) -> Result:
            environment = {"MANYLORA_ADMIN_KEY": "secret", "COLUMNS": "200"}
            return CliRunner().invoke(app, ["adapters", *arguments, "--url", server.url], env=environment)

        yield run


def test_mixtures_are_made_changed_listed_and_removed_from_the_command_line(adapters: Adapters) -> None:
    assert (
        "serves both, version 1: one:0.7+two:-0.3 (id "
        in adapters("mix", "both", "one:0.7", "two:-0.3").stdout
    )
    assert adapters("mix", "both", "two:-0.3", "one:0.7").exit_code == 0, "it is the same"
    changed = adapters("mix", "both", "one", "two:1e-3", "--replace").stdout
    assert "serves both, version 2: one:1+two:0.001 (id " in changed
    [line] = [line for line in adapters("ls").stdout.splitlines() if "both" in line]
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == [
        *("both", "2", "", "", "mixture", "0", "never", "one:1+two:0.001"),
    ]
    assert adapters("rm", "both").stdout.strip() == "removed mixture both: one:1+two:0.001; its adapters stay"
    assert "both" not in adapters("ls").stdout


def test_a_name_with_a_colon_is_that_name_if_the_server_knows_it(adapters: Adapters) -> None:
    assert "team/two:2:1+one:2 " in adapters("mix", "named", "team/two:2", "one:2").stdout
    assert "team/two:2:0.5 " in adapters("mix", "named", "team/two:2:0.5", "--replace").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("mix", "x", "one", "nobody:2"), "part 'nobody"),
        (("mix", "x", "one:inf"), "finite"),
        (("mix", "x", "one+"), "no name"),
        (("mix", "x", "one", "one"), "twice"),
        (("mix", "x", "one", "--replace"), "there is no mixture 'x'"),
        (("mix", "one", "two"), "'one' is an adapter"),
    ],
)
def test_what_cannot_be_mixed_ends_in_one_line(
    adapters: Adapters, arguments: tuple[str, ...], says: str
) -> None:
    wrong = adapters(*arguments)
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("manylora: ")
    assert len(wrong.stderr.splitlines()) == 1
    assert says in wrong.stderr
