"""Flags, environment and file say the same thing, in that order of strength."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import manylora
from manylora.cli import app
from manylora.server.config import ENV_PREFIX, ServeSettings
from manylora.server.config_sources import OTHER_VARIABLES, SettingsError, load_settings
from manylora.settings_options import table_row


@pytest.fixture(autouse=True)
def _nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that is taken by mistake fails its test, and doesn't serve until somebody stops it."""
    monkeypatch.setattr("manylora.serve.serve", lambda settings: pytest.fail(f"would serve {settings}"))


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


def test_each_value_is_known_by_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("block-size = 8\nmax_running = 3\nport = 1\n")
    monkeypatch.setenv("MANYLORA_MAX_RUNNING", "5")
    settings = load_settings({"port": "7"}, file)
    names = [settings.name_of(field) for field in ("port", "max_running", "block_size", "host")]
    assert names == ["--port", "MANYLORA_MAX_RUNNING", f"block_size in {file}", "--host"]


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("MANYLORA_PORT", "MANYLORA_PORT: Input should be a valid integer"),
        ("manylora_port", "manylora_port: Input should be a valid integer"),
        ("MANYLORA_PROT", "MANYLORA_PROT: unknown setting; did you mean MANYLORA_PORT?"),
        ("MANYLORA_ADMINKEY", "MANYLORA_ADMINKEY: unknown setting; did you mean MANYLORA_ADMIN_KEY?"),
        ("MANYLORA_XYZZY", "MANYLORA_XYZZY: unknown setting"),
        ("MANYLORA_PORT_8000", "unknown setting"),
        ("MANYLORA_SERVICE_HOSTNAME", "unknown setting"),
    ],
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, says: str) -> None:
    monkeypatch.setenv(variable, "many")
    with pytest.raises(SettingsError) as caught:
        load_settings({})
    assert str(caught.value).startswith(says) or says == "unknown setting" in str(caught.value)


def test_variables_of_other_commands_of_kubernetes_and_empty_ones_are_no_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("URL", "BENCH_API_KEY", "CONFIG", "SERVICE_HOST", "SERVICE_PORT_HTTP", "PORT_8000_TCP_ADDR"):
        monkeypatch.setenv(f"MANYLORA_{name}", "something")
    monkeypatch.setenv("MANYLORA_HOST", "")
    monkeypatch.setenv("OTHER_PORT", "x")
    assert load_settings({}) == ServeSettings()


def test_kubernetes_own_idea_of_a_port_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(SettingsError, match="enableServiceLinks: false"):
        load_settings({})


def test_a_key_is_never_in_a_message(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("admin_key: [not, a, text]\n")
    with pytest.raises(SettingsError) as caught:
        load_settings({}, file)
    assert str(caught.value) == f"admin_key in {file}: Input should be a valid string"


def test_every_variable_that_the_code_reads_is_known() -> None:
    root = Path(manylora.__file__).parents[1]
    known = {ENV_PREFIX + name.upper() for name in ServeSettings.model_fields} | OTHER_VARIABLES
    sources = [
        path
        for folder in ("manylora", "loadtest", "server", "training")
        for path in (root / folder).rglob("*.py")
    ]
    assert len(sources) > 100
    found = {
        variable
        for path in sources
        for variable in re.findall(r"envvar=\"(MANYLORA_\w+)|environ\S*\"(MANYLORA_\w+)", path.read_text())
    }
    assert {one or other for one, other in found} <= known
    assert ("MANYLORA_URL", "") in found


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("s.toml", "prt = 9", "prt in {file}: unknown setting; did you mean port?"),
        (
            "s.toml",
            "port = 99999",
            "port in {file}: Input should be less than or equal to 65535 (given: '99999')",
        ),
        ("s.toml", "port = ", "--config {file} is not TOML"),
        ("s.toml", "max_running = 1\nmax-running = 2", "max-running in {file}: given twice"),
        ("s.json", "[1]", "--config {file} holds list, not keys and their values"),
        ("s.json", "[]", "--config {file} holds list"),
        ("s.yaml", "0", "--config {file} holds int"),
        ("s.json", '{"port": 1, "port": 2}', "port is there twice"),
        ("s.json", "{", "--config {file} is not JSON"),
        ("s.json", "[" * 100_000, "--config {file} is not JSON"),
        ("s.yaml", "port: [", "--config {file} is not YAML"),
        ("s.yaml", "port: 1\nport: 2", "port is there twice"),
        ("s.yaml", "port: {a: 1}", "port in {file}: Input should be a valid integer"),
        ("s.yml", "just text", "--config {file} holds str"),
        ("s.ini", "port=1", "--config {file}: use a .toml, .yaml or .json file"),
        ("s.yaml", "\udcff", "--config {file} is not YAML"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    file = tmp_path / name
    file.write_text(text, errors="surrogateescape")
    result = CliRunner().invoke(app, ["serve", "--config", str(file)])
    assert result.exit_code == 2
    assert says.format(file=file) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_settings({}, tmp_path / "empty.yaml") == ServeSettings()
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(SettingsError, match="can't be read: Is a directory"):
        load_settings({}, tmp_path / "folder.toml")


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve"], env={"MANYLORA_CONFIG": str(tmp_path / "gone.toml")})
    assert (result.exit_code, "gone.toml: no such file" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "99999"], "--port"),
        (["--adapter", "sql"], "name=path"),
        (["--adapter", "a=x", "--adapter", "a=y"], "twice"),
        (["--quantization", "int3"], "--quantization"),
        (["--api-key", ""], "--api-key: a key is empty"),
        (["--admin-key", ""], "--admin-key: a key is empty"),
        (["--host", ""], "--host"),
        (["--served-model-name", ""], "--served-model-name"),
        (["--kv-cache-gib", "inf"], "--kv-cache-gib"),
        (["--drain-timeout", "nan"], "--drain-timeout"),
        (["--config", "missing.toml"], "no such file"),
        (["--config", "pyproject.ini"], "use a .toml"),
    ],
)
def test_bad_flags_end_in_one_line_and_status_2(flags: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["serve", *flags])
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("columns", [80, 120])
def test_help_tells_every_flag_with_its_default_variable_and_values(columns: int) -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"TERM": "dumb"}, terminal_width=columns).stdout
    assert max(len(line) for line in shown.splitlines()) <= columns
    text = " ".join(shown.split())
    for name, field in ServeSettings.model_fields.items():
        assert f"env: MANYLORA_{name.upper()}]" in text
        assert name == "base" or "--" + name.replace("_", "-") in text
        assert str(field.description) in text
    for words in (
        "--port INTEGER Port to listen on; 0 takes a free one. [default: 8000; 0 to 65535; env: MANYLORA_PORT]",
        "--device auto|cpu|cuda Where the model runs. [default: auto; env: MANYLORA_DEVICE]",
        "--data-dir PATH",
        "[default: 2; over 0; env: MANYLORA_HOST_CACHE_GIB]",
        "--double-quant / --no-double-quant Quantise NF4's scales too when quantising at load. [default: off;",
        "[default: none; env: MANYLORA_ADMIN_KEY]",
        "[default: 512; at least 16; env: MANYLORA_MAX_STEP_TOKENS]",
    ):
        assert words in text


def test_the_page_of_settings_has_every_setting_as_it_is() -> None:
    page = (Path(manylora.__file__).parents[1] / "docs" / "settings.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    expected = [table_row(name, field) for name, field in ServeSettings.model_fields.items()]
    assert rows == expected, "the rows of docs/settings.md are to be:\n" + "\n".join(expected)


def test_doctor_prints_what_it_found() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    for word in ("Python", "processor", "memory", "GPU", "torch", "bitsandbytes"):
        assert word in result.stdout


def test_doctor_tells_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.doctor.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert "pip install 'manylora[nf4]'" in result.stdout
