"""What is said of adapters by name: over their files' words, kept, and gone with the name."""

from pathlib import Path

from manylora.adapters.manifest import NONE, AdapterManifest
from manylora.server.catalog.said import Said

OWN, OTHER = AdapterManifest("from the files", ("one",)), AdapterManifest("said", ("two",), 0.5)


def test_what_is_said_counts_over_the_files_and_after_a_restart(tmp_path: Path) -> None:
    said = Said(tmp_path / "there")
    assert said.of("a", OWN) == OWN
    said.say("a", OTHER)
    said.say("a/b", NONE)
    again = Said(tmp_path / "there")
    again.load({"a", "a/b"})
    for each in (said, again):
        assert each.of("a", OWN) == OTHER
        assert each.of("a/b", OWN) == NONE
        assert each.of("b", OWN) == OWN


def test_it_goes_with_the_name(tmp_path: Path) -> None:
    said = Said(tmp_path)
    for name in ("a", "b", "c"):
        said.say(name, OTHER)
    said.forget("a")
    said.forget("never said")
    assert said.of("a", OWN) == OWN
    again = Said(tmp_path)
    again.load({"a", "c"})
    assert [again.of(name, OWN) for name in "abc"] == [OWN, OWN, OTHER]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_file_takes_nothing_else_along(tmp_path: Path) -> None:
    said = Said(tmp_path)
    said.say("a", OTHER)
    for number, text in enumerate(
        ("{", "[]", '{"name": 5, "manifest": {}}', '{"name": "b", "manifest": {"x": 1}}')
    ):
        (tmp_path / f"said-{number}.json").write_text(text)
    again = Said(tmp_path)
    again.load({"a", "b"})
    assert again.of("a", OWN) == OTHER
    assert again.of("b", OWN) == OWN


def test_without_a_place_it_counts_as_long_as_the_process() -> None:
    said = Said(None)
    said.load({"a"})
    said.say("a", OTHER)
    assert said.of("a", OWN) == OTHER
    said.forget("a")
    assert said.of("a", OWN) == OWN
