"""What a trained adapter says of itself: prompts of the data if asked for, few, unlike, and always the same."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manylora.adapters.files import MANIFEST_FILE
from manylora.adapters.manifest import MAX_EXAMPLE, NONE, AdapterManifest, read_manifest
from manylora.training import output
from manylora.training.data.dataset import DataSettings, TrainingData, load_data
from manylora.training.manifest import diverse, manifest_of
from manylora.training.parsing import parse_arguments
from tests.training.data.families import tokenizer_of

TOKENIZER = tokenizer_of("chatml")
ROWS = [f"What is {number} and {word}?" for number in range(20) for word in ("tea", "sugar")]


def row(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}


def data_of(path: Path, rows: Sequence[dict[str, Any]]) -> TrainingData:
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_data(DataSettings((str(path),), 20_000), TOKENIZER)


def asked(data: TrainingData, *words: str) -> AdapterManifest:
    said: list[str] = []
    flags = ["--data_path", "d", "--output_dir", "o", "--use_lora", *words]
    found = manifest_of(parse_arguments(flags), data, said.append)
    assert said == []
    return found


def test_none_are_written_unless_they_are_asked_for(tmp_path: Path) -> None:
    data = data_of(tmp_path / "d.jsonl", [row(text, "so") for text in ROWS])
    assert asked(data) == NONE
    assert asked(data, "--description", "Of tea.") == AdapterManifest("Of tea.")


def test_they_are_prompts_of_the_data_and_the_same_whatever_its_order(tmp_path: Path) -> None:
    rows = [row(text, "so") for text in ROWS]
    found = asked(data_of(tmp_path / "d.jsonl", rows), "--route_examples", "8").examples
    assert len(set(found)) == 8
    assert set(found) <= set(ROWS)
    assert (
        asked(data_of(tmp_path / "e.jsonl", [*rows[::-1], *rows]), "--route_examples", "8").examples == found
    )


def test_of_a_conversation_it_is_the_last_users_turn_and_a_long_one_is_cut(tmp_path: Path) -> None:
    long = "tea " * MAX_EXAMPLE
    data = data_of(
        tmp_path / "d.jsonl", [row("first", "so", "second", "so"), row(long, "so"), row(" ", "so")]
    )
    found = asked(data, "--route_examples", "5").examples
    assert sorted(found) == ["second", long[:MAX_EXAMPLE]]


def test_data_without_turns_is_said_to_have_none(tmp_path: Path) -> None:
    data = data_of(tmp_path / "d.jsonl", [{"text": "tea and sugar"}])
    said: list[str] = []
    flags = "--data_path d --output_dir o --use_lora --route_examples 4"
    assert manifest_of(parse_arguments(flags.split()), data, said.append) == NONE
    assert said == ["--route_examples: no example has a user's turn, so none are written"]


def test_what_is_unlike_is_taken_before_what_was_said_already() -> None:
    texts = ("the price of tea", "the price of teas", "ship ahoy", "the price of tea!", "{}[]<>")
    assert set(diverse(texts, 3)) == {"the price of tea", "ship ahoy", "{}[]<>"}
    assert diverse(texts, 3) == diverse(texts, 5)[:3]
    assert diverse((), 3) == ()


def test_an_earlier_runs_is_removed_with_its_adapter(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text('{"description": "an older one"}')
    output.clear(tmp_path)
    assert read_manifest(tmp_path) == NONE
