"""Sample rows in the usual shapes; the loss on them stands in the manifest."""

import json
from pathlib import Path

import pytest

from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.export.export import export
from manylora.adapters.export.samples import MOST_ROWS, MOST_TOKENS, PROMPTS, built_in_rows, sample_rows
from manylora.loadtest.material.checkpoints import TINY, AdapterShape, write_adapter
from tests.adapters.export.making import make_base, settings

VOCAB = TINY.vocab_size
CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hi"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_the_answer_is_what_the_loss_is_of(tmp_path: Path, base: Path) -> None:
    conversation = [{"from": "human", "value": "hello there"}, {"from": "gpt", "value": "hi"}]
    path = write(
        tmp_path / "rows.jsonl",
        {"text": "hello there"},
        {"prompt": "hello", "completion": " there"},
        {"messages": CHAT},
        {"conversations": conversation},
    )
    text, pair, chat, turns = sample_rows(path, base, VOCAB)
    assert text.answer == 1
    assert text.tokens == pair.tokens
    assert 0 < pair.answer < len(pair.tokens)
    assert chat == turns
    assert 0 < chat.answer < len(chat.tokens)
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps([{"messages": CHAT}]))
    assert sample_rows(listed, base, VOCAB) == (chat,)
    lines = tmp_path / "rows.txt"
    lines.write_text("hello there\n\n")
    assert sample_rows(lines, base, VOCAB) == (text,)


def test_few_and_short_rows_are_taken(tmp_path: Path, base: Path) -> None:
    rows = sample_rows(write(tmp_path / "rows.jsonl", *[{"text": "a b c " * 200}] * 40), base, VOCAB)
    assert len(rows) == MOST_ROWS
    assert all(len(row.tokens) == MOST_TOKENS for row in rows)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"text": "a b"}\n{"question": "?"}', ":2: expected text"),
        ('{"text": "a b"}\nnot json', ":2 is not JSON"),
        ("[1, 2", "is not JSON"),
        ("[1]", ":1: expected text"),
        ('{"messages": []}', ":1: expected text"),
        ("", "holds no sample row"),
    ],
)
def test_bad_rows_are_named_by_their_line(tmp_path: Path, base: Path, text: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ExportRefused) as caught:
        sample_rows(path, base, VOCAB)
    assert says in str(caught.value)


def test_without_a_tokenizer_there_are_prompts_but_no_samples(tmp_path: Path) -> None:
    rows = built_in_rows(tmp_path, 50)
    assert len(rows) == len(PROMPTS)
    assert rows == built_in_rows(tmp_path, 50)
    with pytest.raises(ExportRefused):
        sample_rows(write(tmp_path / "rows.jsonl", {"text": "a b"}), tmp_path, 50)


def test_losses_of_base_adapter_and_merged_are_measured(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, AdapterShape(rank=4))
    samples = write(tmp_path / "rows.jsonl", {"messages": CHAT}, {"text": "some more text of the usual kind"})
    report = export(settings(base, adapter, tmp_path / "out", samples=samples))
    loss = report.manifest["loss"]
    assert isinstance(loss, dict)
    assert loss["merged"] == pytest.approx(loss["adapter"], abs=0.01)
    assert loss["base"] != pytest.approx(loss["adapter"], abs=0.01)
