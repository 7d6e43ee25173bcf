"""Without the extra `train` its commands say so in one line."""

import pytest
from typer.testing import CliRunner

from manylora.cli import app


@pytest.mark.parametrize("words", [["train", "--use_lora"], ["train", "--help"]])
def test_a_command_whose_packages_are_missing_names_the_extra(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("manylora.extras.find_spec", lambda name: None if name == "peft" else object())
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "pip install 'manylora[train]'" in " ".join((done.output + capfd.readouterr().err).split())
