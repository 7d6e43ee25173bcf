"""The cleaned file: what is left out, what is repaired, and that nothing is ever overwritten."""

import json
import os
import stat
from pathlib import Path

import pytest

from manylora.training.check.check import CheckSettings, check_data
from manylora.training.check.fix import fix
from manylora.training.errors import InvalidArgument
from tests.training.check.making import chat, good, write

QUESTION = "What does the harbour master keep in the third drawer?"
ANSWER = "He keeps the tide tables there, beside a spare key and a box of chalk."


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_bad_rows_go_and_good_ones_keep_their_fields(tmp_path: Path) -> None:
    kept = {"id": 7, **good(1), "note": "é"}
    rows = [kept, "{broken", good(1), chat("Why?", ""), good(2), {**good(2), "id": 1}]
    report = check_data(CheckSettings((write(tmp_path / "data.jsonl", rows),)))
    done = fix(report, tmp_path / "clean.jsonl", ["exact-duplicate"])
    assert read(tmp_path / "clean.jsonl") == [kept, good(2)]
    lines = {kind: [source.line for source in sources] for kind, sources in done.removed.items()}
    assert lines == {"broken": [2], "exact-duplicate": [3, 6], "empty": [4]}
    assert done.sentences()[0] == f"2 rows written to {tmp_path / 'clean.jsonl'}"
    assert not check_data(CheckSettings((str(tmp_path / "clean.jsonl"),))).findings


def test_wrong_encodings_are_undone(tmp_path: Path) -> None:
    rows = [
        chat("Où ?", "Le cafÃ© est fermÃ©."),
        chat("谁？", "你好世界".encode().decode("gb18030")),
        chat("Who?", "It\x00 is me."),
    ]
    report = check_data(CheckSettings((write(tmp_path / "data.jsonl", rows),)))
    done = fix(report, tmp_path / "clean.jsonl")
    assert read(tmp_path / "clean.jsonl") == [
        chat("Où ?", "Le café est fermé."),
        chat("谁？", "你好世界"),
        chat("Who?", "It is me."),
    ]
    assert {kind: len(sources) for kind, sources in done.repaired.items()} == {"mojibake": 2, "control": 1}
    assert not done.kept


def test_a_warning_takes_no_row_out(tmp_path: Path) -> None:
    rows = [
        good(1),
        good(1),
        chat(QUESTION, ANSWER),
        chat(f"{QUESTION} Please.", ANSWER),
        chat("Why?", "yes"),
        chat("Why?", "no"),
        chat("How?", "It is so. " + "And then it is done. " * 6),
        chat("Where?", "M\ufffdller."),
    ]
    held_out = write(tmp_path / "eval.jsonl", [good(1)])
    report = check_data(CheckSettings((write(tmp_path / "data.jsonl", rows),), (held_out,), max_length=30))
    done = fix(report, tmp_path / "clean.jsonl")
    assert read(tmp_path / "clean.jsonl") == rows
    assert not done.removed
    expected = {
        "overlong": 5,
        "repeats": 1,
        "mojibake": 1,
        "exact-duplicate": 1,
        "near-duplicate": 1,
        "inconsistent": 2,
        "overlap": 2,
    }
    assert done.kept == expected
    assert done.sentences()[-1].startswith("kept, with warnings: ")
    assert done.sentences()[-1].endswith("; --remove KIND leaves out those of a kind")
    for kind, count in expected.items():
        out = tmp_path / f"{kind}.jsonl"
        assert [*fix(report, out, [kind]).removed] == [kind]
        assert len(read(out)) == len(rows) - count, kind
    with pytest.raises(InvalidArgument, match="no kind of finding 'twice'"):
        fix(report, tmp_path / "none.jsonl", ["twice"])
    assert not (tmp_path / "none.jsonl").exists()


def test_rows_of_one_line_are_named_by_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([good(1), chat("Why?", ""), good(2)]))
    done = fix(check_data(CheckSettings((str(path),))), tmp_path / "clean.json")
    assert done.sentences()[1] == f"left out 1 (empty): {path}:1 (row 2)"


def test_what_cannot_be_repaired_goes_if_that_is_asked_for(tmp_path: Path) -> None:
    report = check_data(
        CheckSettings((write(tmp_path / "data.jsonl", [chat("Who?", "M\ufffdller."), good(1)]),))
    )
    done = fix(report, tmp_path / "clean.jsonl", ["mojibake"])
    assert read(tmp_path / "clean.jsonl") == [good(1)]
    assert list(done.removed) == ["mojibake"]


def test_the_answer_that_most_rows_give_stays(tmp_path: Path) -> None:
    rows = [chat("Sort this.", answer) for answer in ("good", "bad", "Good")] + [
        chat("Sort that.", "a"),
        chat("Sort that.", "b"),
    ]
    report = check_data(CheckSettings((write(tmp_path / "data.jsonl", rows),)))
    done = fix(report, tmp_path / "clean.jsonl", ["inconsistent", "near-duplicate"])
    assert read(tmp_path / "clean.jsonl") == [chat("Sort this.", "good")]
    assert not done.kept


def test_evaluation_data_stays_as_it_is(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.jsonl", [good(1), good(2)]), write(tmp_path / "b.jsonl", [good(2)])
    fix(check_data(CheckSettings((train,), (held_out,))), tmp_path / "clean.jsonl", ["overlap"])
    assert read(tmp_path / "clean.jsonl") == [good(1)]


def test_json_arrays_and_several_files(tmp_path: Path) -> None:
    paths = write(tmp_path / "a.jsonl", [good(1), good(2)]), write(tmp_path / "b.jsonl", [good(2), good(3)])
    fix(check_data(CheckSettings(paths[:1])), tmp_path / "clean.json")
    assert json.loads((tmp_path / "clean.json").read_text()) == [good(1), good(2)]
    fix(check_data(CheckSettings(paths)), tmp_path / "clean", ["exact-duplicate"])
    assert read(tmp_path / "clean" / "a.jsonl") == [good(1), good(2)]
    assert read(tmp_path / "clean" / "b.jsonl") == [good(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "clean", "clean.json"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    report = check_data(CheckSettings((write(tmp_path / "data.jsonl", [good(1)]),)))
    before = (tmp_path / "data.jsonl").read_bytes()
    with pytest.raises(InvalidArgument, match="is there already"):
        fix(report, tmp_path / "data.jsonl")
    with pytest.raises(InvalidArgument, match="a cleaned file is JSON"):
        fix(report, tmp_path / "clean.csv")
    assert (tmp_path / "data.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o027, 0o750), (0o077, 0o700)])
def test_a_directory_of_cleaned_files_has_the_mode_that_umask_gives(
    tmp_path: Path, mask: int, mode: int
) -> None:
    paths = tuple(write(tmp_path / name, [good(1)]) for name in ("a.jsonl", "b.jsonl"))
    report = check_data(CheckSettings(paths))
    before = os.umask(mask)
    try:
        fix(report, tmp_path / "clean")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "clean").stat().st_mode) == mode
    assert sorted(path.name for path in (tmp_path / "clean").iterdir()) == ["a.jsonl", "b.jsonl"]
    assert not list(tmp_path.glob(".*"))
