"""What a trainer gets from files: items, their report, splits; and nothing left behind."""

import gc
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from manylora.training.data.dataset import DataSettings, TrainingData, load_data, load_split
from manylora.training.data.render import IGNORED, Renderer
from manylora.training.errors import InvalidArgument, InvalidData
from tests.training.data.families import tokenizer_of

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = tokenizer_of("chatml")


def row(question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return {"conversations": turns}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(one) for one in rows))
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    rng = random.Random(0)
    return write(
        tmp_path / "a.jsonl", [row(f"What is {n}?", "well " * rng.randint(1, 9) + str(n)) for n in range(50)]
    )


def items_of(data: TrainingData) -> list[dict[str, list[int]]]:
    return [data.dataset[number] for number in range(len(data.dataset))]


def test_items_are_the_rendered_examples_in_order(path: str) -> None:
    data = load_data(DataSettings((path,), 200), TOKENIZER)
    renderer = Renderer(TOKENIZER, 200)
    assert len(data.dataset) == data.report.examples == 50
    for number, item in enumerate(items_of(data)):
        example = data.example(number)
        assert str(example.source) == f"{path}:{number + 1}"
        assert example.messages[0]["content"] == f"What is {number}?"
        rendered = renderer.render(example)
        assert item == {"input_ids": rendered.input_ids, "labels": rendered.labels}
        assert data.lengths[number] == len(item["input_ids"])
    assert data.report.tokens == sum(data.lengths)
    assert data.report.trained_tokens == sum(
        label != IGNORED for item in items_of(data) for label in item["labels"]
    )


def test_packed_rows_hold_every_examples_tokens(path: str) -> None:
    plain = load_data(DataSettings((path,), 100), TOKENIZER)
    packed = load_data(DataSettings((path,), 100, packing=True), TOKENIZER)
    found: Counter[tuple[int, ...]] = Counter()
    for number, item in enumerate(items_of(packed)):
        length = packed.lengths[number]
        assert len(item["input_ids"]) == len(item["labels"]) == len(item["position_ids"]) == length <= 100
        starts = [at for at, position in enumerate(item["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            assert item["position_ids"][start:end] == list(range(end - start))
            assert item["labels"][start] == IGNORED
            found[(*item["input_ids"][start:end], *item["labels"][start:end])] += 1
    assert found == Counter((*item["input_ids"], *item["labels"]) for item in items_of(plain))
    assert packed.report.packed_rows == len(packed.dataset) < 30
    assert "Packed into" in " ".join(packed.report.sentences())


def test_shares_are_portions_and_repeats(path: str, tmp_path: Path) -> None:
    other = write(tmp_path / "b.jsonl", [{"text": f"Hello {n}"} for n in range(4)])
    data = load_data(DataSettings((f"{path}:0.1", f"{other}:2.5"), 100), TOKENIZER)
    sources = Counter(str(data.example(number).source) for number in range(data.report.examples))
    assert sum(count for source, count in sources.items() if source.startswith(path)) == 5
    assert sorted(count for source, count in sources.items() if source.startswith(other)) == [2, 2, 3, 3]
    again = load_data(DataSettings((f"{path}:0.1", f"{other}:2.5"), 100), TOKENIZER)
    assert items_of(again) == items_of(data)
    third = load_data(DataSettings((f"{path}:0.1", f"{other}:2.5"), 100, seed=1), TOKENIZER)
    assert items_of(third) != items_of(data)
    assert [file.format for file in data.report.files] == ["qwen", "text"]
    assert data.report.sentences()[:2] == [
        f"{path}: format qwen, 50 rows, share 0.1: 5 examples.",
        f"{other}: format text, 4 rows, share 2.5: 10 examples.",
    ]


def test_train_and_eval_have_no_example_in_common(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(f"What is {n % 40}?", f"well {n % 40}") for n in range(100)])
    train, evaluation = load_split(DataSettings((path,), 100), TOKENIZER, 0.1)
    seen = [{data.example(n).to_json() for n in range(data.report.examples)} for data in (train, evaluation)]
    assert not seen[0] & seen[1]
    assert train.report.examples + evaluation.report.examples == 100
    assert 10 <= evaluation.report.examples <= 12  # equal ones are taken together
    again = load_split(DataSettings((path,), 100), TOKENIZER, 0.1)[1]
    assert items_of(again) == items_of(evaluation)
    other = load_split(DataSettings((path,), 100, seed=7), TOKENIZER, 0.1)[1]
    assert items_of(other) != items_of(evaluation)
    for share in (0, 1, -0.5):
        with pytest.raises(InvalidArgument, match="between 0 and 1"):
            load_split(DataSettings((path,), 100), TOKENIZER, share)
    same = write(tmp_path / "b.jsonl", [row("What?", "well")] * 9)
    with pytest.raises(InvalidData, match="too few different examples"):
        load_split(DataSettings((same,), 100), TOKENIZER, 0.5)


def test_truncation_is_counted_and_what_has_no_answer_left_is_left_out(tmp_path: Path) -> None:
    rows = [row("What?", "Hello"), row("What?", "Hello " * 30), row("What " * 40, "Hello")]
    path = write(tmp_path / "a.jsonl", rows)
    data = load_data(DataSettings((path,), 60), TOKENIZER)
    assert data.report.examples == len(data.dataset) == 2
    assert data.report.truncated.count == 2
    assert data.report.truncated.first == [f"{path}:2", f"{path}:3"]
    assert data.report.dropped.first == [f"{path}:3"]
    assert data.report.truncated_tokens > 30
    assert data.report.without_stop.count == 0  # the cut ones are told already
    assert data.report.lengths["longest"] == 60
    told = " ".join(data.report.sentences())
    assert f"2 examples ({path}:2, {path}:3) cut to 60 tokens" in told
    assert f"1 example ({path}:3) left out" in told
    json.dumps(asdict(data.report))
    with pytest.raises(InvalidData, match="no example has an answer left in its first 3 tokens"):
        load_data(DataSettings((path,), 3), TOKENIZER)


def test_answers_without_a_stop_are_reported(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    path = write(tmp_path / "a.jsonl", [row("What?", "Hello")] * 7)
    report = load_data(DataSettings((path,), 60), tokenizer).report
    assert report.without_stop.count == 7
    assert report.without_stop.first == [f"{path}:{line}" for line in range(1, 6)]
    assert f"{path}:5, …; 5 of 7 shown)" in report.sentences()[-1]
    assert "the model may not learn to stop" in report.sentences()[-1]


def test_a_system_text_is_added_where_there_is_none(path: str) -> None:
    data = load_data(DataSettings((path,), 100, system="Be how you are"), TOKENIZER)
    text = TOKENIZER.decode(data.dataset[0]["input_ids"])
    assert text.startswith("<|im_start|>system\nBe how you are<|im_end|>\n<|im_start|>user\nWhat is 0?")
    gemma = load_data(DataSettings((path,), 100, system="Be how you are"), tokenizer_of("gemma"))
    text = tokenizer_of("gemma").decode(gemma.dataset[0]["input_ids"])
    assert text.startswith("<bos><start_of_turn>user\nBe how you are\n\nWhat is 0?")
    assert any("takes no system turn" in sentence for sentence in gemma.report.sentences())


def test_bad_rows_stop_loading_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(row("What?", "Hello"))
    for bad, said in [
        ('{"conversations"', "isn't JSON"),
        ('{"text": "other"}', "isn't in the format qwen"),
        ('{"conversations": [{"from": "user", "value": "a"}]}', "no message of the assistant"),
    ]:
        # Further down than what the format is recognised by.
        path.write_text("\n".join([good] * 150 + [bad, good]))
        with pytest.raises(InvalidData, match=rf"a\.jsonl:151: .*{said}"):
            load_data(DataSettings((str(path),), 60), TOKENIZER)


def test_settings_that_do_not_go_together(path: str) -> None:
    with pytest.raises(InvalidArgument, match="no data file"):
        load_data(DataSettings((), 60), TOKENIZER)
    with pytest.raises(InvalidArgument, match="no data format"):
        load_data(DataSettings((path,), 60, format="nonsense"), TOKENIZER)
    with pytest.raises(InvalidData, match="isn't in the format alpaca"):
        load_data(DataSettings((path,), 60, format="alpaca"), TOKENIZER)


def test_files_are_read_anew_each_time(path: str) -> None:
    before = items_of(load_data(DataSettings((path,), 60), TOKENIZER))
    state = os.stat(path)
    Path(path).write_text(Path(path).read_text().replace("What", "Whet"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert items_of(load_data(DataSettings((path,), 60), TOKENIZER)) != before


def test_temporary_files_go_with_the_data(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    data = load_data(DataSettings((path,), 60), TOKENIZER)
    assert len(list(place.iterdir())) == 1
    item = data.dataset[3]
    del data
    gc.collect()
    assert not list(place.iterdir())
    assert item["input_ids"]
    data = load_data(DataSettings((path,), 60, packing=True), TOKENIZER)
    assert pickle.loads(pickle.dumps(data.dataset))[0] == data.dataset[0]  # as data loaders' processes get it
    with pytest.raises(InvalidData):
        load_data(DataSettings((path,), 3), TOKENIZER)
    del data
    gc.collect()
    assert not list(place.iterdir())


def test_temporary_files_go_with_the_program(tmp_path: Path) -> None:
    code = (
        "from manylora.training.data.store import Directory\n"
        "directory = Directory()\n"
        "(directory.path / 'tokens.arrow').touch()\n"
        "raise SystemExit(directory.path.parent.name)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], check=False, env=environment, cwd=ROOT, capture_output=True
    )
    assert run.stderr.decode().strip() == tmp_path.name
    assert not list(tmp_path.iterdir())


def test_what_a_killed_program_left_goes_with_the_next(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    living = load_data(DataSettings((path,), 60), TOKENIZER)
    [used] = place.iterdir()
    left, fresh, others = (place / f"manylora-data-{name}" for name in ("left", "fresh", "others"))
    for directory in (left, fresh, others):
        directory.mkdir()
        (directory / "tokens.arrow").touch()
        if directory is not others:
            (directory / "lock").touch()
    for directory in (left, others, used):
        os.utime(directory, (0, 0))
    next_one = load_data(DataSettings((path,), 60), TOKENIZER)
    assert not left.exists()
    assert fresh.exists()
    assert others.exists()
    assert used.exists()
    assert len(living.dataset) == len(next_one.dataset)
