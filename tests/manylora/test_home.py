"""Whose adapters are in which folder of the data directory, and how a folder from before is taken over."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from manylora.home import OWNER_FILE, BaseIdentity, Home, claim, find_home

BASE = BaseIdentity("org/model", "c" * 64, "1" * 64)
TWIN = replace(BASE, weights="2" * 64)
"""Another fine-tune: the same name and config, other weights."""


def with_registry(home: Home) -> Home:
    (home.directory / "registry.db").write_bytes(b"rows")
    return home


def old_home(data_dir: Path) -> Path:
    """A folder as it was made when bases were known by config.json alone."""
    directory = data_dir / "org-model-cccccccc"
    directory.mkdir(parents=True)
    (directory / "registry.db").write_bytes(b"rows")
    return directory


def test_a_base_finds_its_home_again(tmp_path: Path) -> None:
    first = find_home(tmp_path / "new" / "data", BASE)
    assert first.directory == tmp_path / "new" / "data" / "org-model-11111111"
    assert first == find_home(tmp_path / "new" / "data", BASE)
    assert (first.inherited_up_to, first.others) == (0, ())


def test_other_weights_have_another_home_and_are_told_of_the_first(tmp_path: Path) -> None:
    mine = with_registry(find_home(tmp_path, BASE))
    theirs = find_home(tmp_path, TWIN)
    assert theirs.directory != mine.directory
    assert theirs.others == (mine.directory,)
    assert find_home(tmp_path, TWIN).others == ()
    assert find_home(tmp_path, replace(BASE, name="another", weights="3" * 64)).others == ()


def test_the_first_base_whose_config_fits_takes_an_old_home_over(tmp_path: Path) -> None:
    old = old_home(tmp_path)
    found = find_home(tmp_path, BASE)
    assert found == Home(old, None)
    claim(old, BASE, inherited_up_to=7)
    assert find_home(tmp_path, BASE) == Home(old, 7)
    other = find_home(tmp_path, TWIN)
    assert other.directory.name == "org-model-22222222"
    assert other.others == (old,)


def test_a_base_that_has_a_home_takes_over_no_other(tmp_path: Path) -> None:
    mine = find_home(tmp_path, BASE)
    old_home(tmp_path)
    assert find_home(tmp_path, BASE) == mine


def test_an_old_home_of_another_config_is_left_alone(tmp_path: Path) -> None:
    old = old_home(tmp_path)
    found = find_home(tmp_path, replace(BASE, config="d" * 64))
    assert found.directory.name == "org-model-11111111"
    assert found.others == (old,)
    assert not (old / OWNER_FILE).exists()


def test_an_old_home_without_its_registry_is_not_passed_over(tmp_path: Path) -> None:
    """Its files are there: who opens it says that the registry is lost."""
    old = old_home(tmp_path)
    (old / "registry.db").unlink()
    assert find_home(tmp_path, BASE) == Home(old, None)


def test_a_claim_that_was_cut_short_is_none(tmp_path: Path) -> None:
    old = old_home(tmp_path)
    (old / f".{OWNER_FILE}.partial").write_text('{"name"')
    assert find_home(tmp_path, BASE) == Home(old, None)
    claim(old, BASE, inherited_up_to=1)
    assert sorted(path.name for path in old.iterdir()) == [OWNER_FILE, "registry.db"]


def test_a_home_that_was_made_and_not_claimed_is_its_bases(tmp_path: Path) -> None:
    home = tmp_path / "org-model-11111111"
    home.mkdir()
    (home / "registry.db").write_bytes(b"rows")
    assert find_home(tmp_path, BASE) == Home(home, 0, others=())


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": "x"}'])
def test_an_owner_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    home = find_home(tmp_path, BASE)
    (home.directory / OWNER_FILE).write_text(text)
    with pytest.raises(ValueError, match=OWNER_FILE):
        find_home(tmp_path, BASE)


def test_a_home_of_the_same_eight_digits_is_not_shared(tmp_path: Path) -> None:
    home = find_home(tmp_path, BASE)
    owner = json.loads((home.directory / OWNER_FILE).read_text())
    (home.directory / OWNER_FILE).write_text(json.dumps({**owner, "weights": "1" * 63 + "f"}))
    with pytest.raises(ValueError, match="another base's"):
        find_home(tmp_path, BASE)
