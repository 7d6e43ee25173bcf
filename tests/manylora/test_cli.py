"""The command line's own words: its version, its commands, and words that it doesn't know."""

import sys
from importlib.metadata import version

import pytest

from manylora import cli


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["manylora", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("words", [("--version",), ("version",)])
def test_the_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert run(monkeypatch, *words) == 0
    assert capsys.readouterr().out.strip() == version("manylora")


@pytest.mark.parametrize(("words", "status"), [((), 2), (("--help",), 0)])
def test_every_command_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], status: int
) -> None:
    assert run(monkeypatch, *words) == status
    printed = "".join(capsys.readouterr())
    for name in ("serve", "train", "adapters", "merge", "plan", "bench", "data", "doctor", "version"):
        assert f"\n  {name} " in printed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("serve", "--prot", "3"),
            "No such option: --prot (Possible options: --adapter-root, --host, --port)",
        ),
        (("serve", "--port"), "requires an argument"),
        (("serve", "one", "two"), "unexpected extra argument(s) (two) (see manylora serve --help)"),
        (("srve",), "No such command 'srve'. Did you mean 'serve'? (see manylora --help)"),
        (("adapters", "add"), "Missing argument 'name' (see manylora adapters add --help)"),
        (("merge", "--jsn"), "No such option: --jsn"),
        (("bench", "serve", "--streams", "0"), "--streams"),
        (("plan",), "Missing"),
        (("data", "check"), "Missing"),
        (("serve", "--config", "gone.toml"), "no such file"),
    ],
)
def test_unknown_words_end_in_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert run(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert len(printed.err.strip().splitlines()) == 1
