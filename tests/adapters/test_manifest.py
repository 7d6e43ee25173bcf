"""What an adapter says of itself: read, bounded, part of its digest, and refused by name where it says too much."""

import json
from pathlib import Path

import pytest

from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.files import MANIFEST_FILE, digest_of
from manylora.adapters.manifest import (
    MAX_EXAMPLE,
    MAX_EXAMPLES,
    NONE,
    AdapterManifest,
    read_manifest,
    write_manifest,
)
from manylora.adapters.reader import inspect_adapter
from tests.adapters.making import MODULES, write

LIMIT = 1 << 30
SAID = AdapterManifest("Writes queries.", ("Which SQL finds it?", "Ünïcode 🦜"), 0.25)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_manifest(tmp_path, SAID)
    assert read_manifest(tmp_path) == SAID


def test_who_says_nothing_has_no_file(tmp_path: Path) -> None:
    write_manifest(tmp_path, NONE)
    assert list(tmp_path.iterdir()) == []
    assert read_manifest(tmp_path) == NONE


def test_an_adapter_is_read_with_it_and_is_another_one_by_it(tmp_path: Path) -> None:
    directory = write(tmp_path)
    before = digest_of(directory, LIMIT)
    write_manifest(directory, SAID)
    assert inspect_adapter(directory, MODULES, max_rank=8).text.manifest == SAID
    assert digest_of(directory, LIMIT) != before
    (directory / MANIFEST_FILE).unlink()
    assert digest_of(directory, LIMIT) == before


def test_the_largest_manifest_is_a_file_that_is_taken(tmp_path: Path) -> None:
    directory = write(tmp_path)
    largest = ["🦜" * (MAX_EXAMPLE - 2) + f"{number:02}" for number in range(MAX_EXAMPLES)]
    (directory / MANIFEST_FILE).write_text(json.dumps({"examples": largest}))  # each as a pair of escapes
    assert len(inspect_adapter(directory, MODULES, max_rank=8).text.manifest.examples) == MAX_EXAMPLES


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("[]", "not a JSON object"),
        ('{"examples": "one"}', "examples is a text, expected a list"),
        ('{"examples": ["a", 1]}', r"examples\[1\] is a number"),
        ('{"examples": [["a"]]}', r"examples\[0\] is a list"),
        ('{"examples": ["a", " \\n"]}', r"examples\[1\] is empty"),
        (
            json.dumps({"examples": ["x" * (MAX_EXAMPLE + 1)]}),
            r"examples\[0\] has 2001 characters, at most 2000",
        ),
        (json.dumps({"examples": [str(n) for n in range(33)]}), "examples has 33 texts, at most 32"),
        ('{"description": 5}', "description is a number"),
        (json.dumps({"description": "x" * 1001}), "description has 1001 characters, at most 1000"),
        ('{"threshold": 2}', "threshold is 2, expected a number from -1 to 1"),
        ('{"threshold": true}', "threshold is True"),
        ('{"threshold": NaN}', "threshold is nan"),
        ('{"exmaples": []}', "'exmaples' is no field of a manifest"),
        ('{"examples": ["\\ud800"]}', "surrogate"),
        ("{", "not JSON"),
    ],
)
def test_what_makes_no_sense_refuses_the_adapter_and_is_named(tmp_path: Path, told: str, said: str) -> None:
    directory = write(tmp_path)
    (directory / MANIFEST_FILE).write_text(told)
    with pytest.raises(InvalidAdapter, match=said) as refused:
        inspect_adapter(directory, MODULES, max_rank=8)
    assert refused.value.file == MANIFEST_FILE


def test_a_million_examples_are_refused_before_they_are_read(tmp_path: Path) -> None:
    directory = write(tmp_path)
    (directory / MANIFEST_FILE).write_text(json.dumps({"examples": ["x"] * 1_000_000}))
    with pytest.raises(InvalidAdapter, match="bytes; at most"):
        inspect_adapter(directory, MODULES, max_rank=8)
