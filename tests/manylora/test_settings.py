"""Flags, environment and file say the same thing, in that order of strength."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from manylora.cli import app
from manylora.server.config import ServeSettings, load_settings
from manylora.settings_options import one_line


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServeSettings.model_fields:
        monkeypatch.delenv(f"MANYLORA_{name.upper()}", raising=False)


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".toml", 'port = 9\nmax-running = 3\nadapter = ["a=b"]\n'),
        (".yaml", "port: 9\nmax_running: 3\nadapter: [a=b]\n"),
        (".json", '{"port": 9, "max_running": 3, "adapter": ["a=b"]}'),
    ],
)
def test_flag_beats_environment_beats_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, text: str
) -> None:
    file = tmp_path / f"settings{suffix}"
    file.write_text(text)
    monkeypatch.setenv("MANYLORA_MAX_RUNNING", "5")
    monkeypatch.setenv("MANYLORA_API_KEY", "one, two")
    settings = load_settings({"port": "7"}, file)
    assert (settings.port, settings.max_running, settings.api_key) == (7, 5, ("one", "two"))
    assert settings.adapters[0].adapter_name == "a"
    assert settings.adapters[0].path == Path("b").absolute()


def test_unknown_key_in_a_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("prt = 9\n")
    with pytest.raises(ValidationError) as caught:
        load_settings({}, file)
    assert one_line(caught.value) == "--prt: unknown setting"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "99999"], "--port"),
        (["--adapter", "sql"], "name=path"),
        (["--adapter", "a=x", "--adapter", "a=y"], "twice"),
        (["--quantization", "int3"], "--quantization"),
        (["--api-key", ""], "empty"),
        (["--config", "missing.toml"], "no such file"),
        (["--config", "pyproject.ini"], "no such file"),
    ],
)
def test_bad_flags_end_in_one_line_and_status_2(flags: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["serve", *flags])
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_every_setting_is_a_flag() -> None:
    # A wide terminal, so that no flag is cut.
    text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    for name in ServeSettings.model_fields.keys() - {"base"}:
        assert "--" + name.replace("_", "-") in text


def test_doctor_prints_what_it_found() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    for word in ("Python", "processor", "memory", "GPU", "torch", "bitsandbytes"):
        assert word in result.stdout


def test_doctor_tells_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.doctor.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert "pip install 'manylora[nf4]'" in result.stdout
