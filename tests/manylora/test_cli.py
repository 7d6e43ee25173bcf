"""The command line's own words: its version, its commands, and words that it doesn't know."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

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


def test_the_hundredth_line_of_a_file_is_not_an_emoji(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """rich prints ``:100:`` as an emoji, and every finding has a file and a line before a colon."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 99 + "no\n")
    words = ["train", "--model_name_or_path", "demo/base", "--use_lora", "--data_check", "off"]
    assert run(monkeypatch, *words, "--data_path", str(data), "--output_dir", str(tmp_path / "out")) == 2
    assert "rows.jsonl:100: isn't JSON" in capsys.readouterr().err


def test_no_console_of_a_command_makes_emojis_of_what_stands_between_colons() -> None:
    root = Path(cli.__file__).resolve().parents[1]
    for path in (
        path
        for room in ("manylora", "training", "adapters", "server")
        for path in root.glob(f"{room}/**/*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console":
                assert any(each.arg == "emoji" for each in node.keywords), f"{path}:{node.lineno}"


def test_an_output_directory_without_a_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model_name_or_path", "demo/base", "--use_lora", "--data_path", "a.jsonl"]
    assert run(monkeypatch, *words, "--output_dir", "") == 2
    assert "--output_dir is empty" in capsys.readouterr().err


def test_words_to_a_server_do_not_wait_for_torch() -> None:
    """Loading it takes seconds, at each TAB of the shell's completion too."""
    code = "import sys, manylora.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
