"""Finding a checkpoint: a directory, or a name of the hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from manylora.quant.errors import CheckpointMissing
from manylora.quant.hub import CODE, FILES, find_checkpoint


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert find_checkpoint(str(tmp_path)) == tmp_path


def test_a_directory_may_be_named_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert find_checkpoint("~/model") == tmp_path / "model"


def test_a_file_is_no_directory_nor_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").write_text("")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "owner" / "model"), "owner/model"):
        with pytest.raises(CheckpointMissing, match=f"^{name} is a file; a model is a directory"):
            find_checkpoint(name)


@pytest.mark.parametrize(
    "name", ["/nowhere/model", "./model", "~/nowhere", "~nobody-here/model", "model", "a/b/c"]
)
def test_what_can_only_be_a_missing_directory(name: str) -> None:
    with pytest.raises(CheckpointMissing, match="no such directory"):
        find_checkpoint(name)


@pytest.mark.parametrize("with_code", [False, True])
def test_the_hub_is_asked_for_what_is_needed(
    with_code: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint("owner/model", revision="v2", cache_dir="/c", with_code=with_code) == tmp_path
    assert asked == {
        "name": "owner/model",
        "revision": "v2",
        "cache_dir": "/c",
        "allow_patterns": [*FILES, CODE] if with_code else list(FILES),
    }


def test_a_hub_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointMissing, match=r"^owner/model can't be had from the hub \(no connection\)"):
        find_checkpoint("owner/model")
