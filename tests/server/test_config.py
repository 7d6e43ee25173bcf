"""What settings mean once they are read: adapters' names and directories, and who can reach the server."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from manylora.server.config import ServeSettings
from manylora.server.named_arguments import AdapterArgument


def test_an_adapter_is_named_before_the_first_equals_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    (adapter,) = ServeSettings(adapter=("sql=~/runs/lr=1e-4/final",)).adapters
    assert adapter.adapter_name == "sql"
    assert adapter.path == Path("/home/someone/runs/lr=1e-4/final")


def test_an_adapters_directory_is_relative_to_where_the_server_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert AdapterArgument("a=here").path == tmp_path / "here"
    assert AdapterArgument("a=~nobody-here/b").path == tmp_path / "~nobody-here" / "b"


def test_lists_are_split_at_commas_and_blanks_are_no_part_of_them() -> None:
    settings = ServeSettings.model_validate({"api_key": "one, two ", "cors_origin": ["a,b", "c"]})
    assert settings.api_key == ("one", "two")
    assert settings.cors_origin == ("a,b", "c")


def test_settings_do_not_change() -> None:
    settings = ServeSettings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize("adapter", ["sql", "=path", "sql=", "="])
def test_an_adapter_that_is_not_name_and_path(adapter: str) -> None:
    with pytest.raises(ValidationError, match="is not name=path"):
        ServeSettings(adapter=(adapter,))


@pytest.mark.parametrize(
    ("host", "beyond"),
    [
        ("127.0.0.1", False),
        ("127.0.0.7", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.1.5", True),
        ("10.0.0.1", True),
        ("models.example", True),
    ],
)
def test_who_can_reach_the_server(host: str, beyond: bool) -> None:
    assert ServeSettings(host=host).listens_beyond_loopback is beyond


def test_weights_of_adapters_are_told_by_name() -> None:
    assert ServeSettings(adapter_weight=("sql=3", "tiny=0.5")).shares == {"sql": 3.0, "tiny": 0.5}
    assert ServeSettings.model_validate({"adapter_weight": "sql=3,b=1"}).shares == {"sql": 3.0, "b": 1.0}


@pytest.mark.parametrize("weight", ["sql", "sql=", "=2", "sql=much", "sql=0", "sql=-1", "sql=nan", "sql=1e9"])
def test_a_weight_that_is_none(weight: str) -> None:
    with pytest.raises(ValidationError, match="is not name=weight"):
        ServeSettings(adapter_weight=(weight,))


def test_a_name_has_one_weight() -> None:
    with pytest.raises(ValidationError, match="given twice"):
        ServeSettings(adapter_weight=("sql=1", "sql=2"))
