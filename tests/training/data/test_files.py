"""Rows come with their lines, broken ones too, and files of any size are read piece by piece."""

import gzip
import hashlib
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.training.data import json_stream
from manylora.training.data.columns import Columns, parse_columns
from manylora.training.data.files import DataPath, data_fingerprint, parse_data_path, read_rows
from manylora.training.data.formats import check_columns, recognise
from manylora.training.data.json_stream import read_json_values
from manylora.training.errors import InvalidArgument, InvalidData

ROWS = [{"text": 'one\n"two" ü'}, {"text": "three", "more": [1, {"a": None}]}, {"text": ""}]


def lines_of(path: Path) -> list[int]:
    return [row.line for row in read_rows(path)]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=indent))
    assert [row.value for row in read_rows(path)] == ROWS
    assert lines_of(path) == ([1, 1, 1] if indent is None else [2, 5, 14])


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_json_lines_whatever_the_file_is_called(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    assert [row.value for row in read_rows(path)] == ROWS
    assert lines_of(path) == [1, 3, 5]


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode()))
    assert [row.value for row in read_rows(path)] == ROWS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InvalidData, match="can't be read"):
        list(read_rows(path))


def test_broken_lines_are_rows_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": 1}\n{"text": \n["list"]\n{"text": "\xff"}\n{"text": 2}\n')
    rows = list(read_rows(path))
    assert [row.line for row in rows if row.value is not None] == [1, 5]
    errors = {row.line: row.error for row in rows if row.error}
    assert errors[2] is not None
    assert errors[2].startswith("isn't JSON: Expecting value")
    assert errors[3] == "is a list; expected an object"
    assert errors[4] is not None
    assert errors[4].startswith("isn't UTF-8 at byte 11: as Windows-1252 it reads '")


ARRAY = '[\n{"a": 1},\n{"a": "lost quote\n},\n{"a": 2},\n 5,\n{"a" 3},\n{"a": 4}\n{"a": 5}\n]'


@pytest.mark.parametrize("characters", [1, 3, 1000])
def test_reading_goes_on_behind_a_broken_element(characters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_CHARACTERS", characters)
    rows = list(read_json_values(io.StringIO(ARRAY)))
    assert [row.value["a"] for row in rows if row.value is not None] == [1, 2, 4, 5]
    assert [row.line for row in rows if row.error] == [3, 6, 7, 9]


def test_an_array_that_ends_too_early_says_so() -> None:
    *_, last = read_json_values(io.StringIO('[{"a": 1}, {"a": 2},'))
    assert last.error == "isn't JSON: the file ends inside the array"
    *_, last = read_json_values(io.StringIO('[{"a": 1}]\n]'))
    assert last.error is not None
    assert last.line == 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=8), st.integers(1, 50))
def test_what_is_read_in_pieces_is_what_was_written(rows: list[dict[str, Any]], characters: int) -> None:
    before = json_stream.CHUNK_CHARACTERS
    json_stream.CHUNK_CHARACTERS = characters
    try:
        for text in (json.dumps(rows), json.dumps(rows, indent=1, ensure_ascii=False)):
            found = list(read_json_values(io.StringIO(text)))
            assert [row.value for row in found] == rows
    finally:
        json_stream.CHUNK_CHARACTERS = before


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('instruction,output\n"two\nlines",x\n\ny,z,too many\n"a ""b""",c\n')
    rows = list(read_rows(path))
    assert [row.value for row in rows] == [
        {"instruction": "two\nlines", "output": "x"},
        None,
        {"instruction": 'a "b"', "output": "c"},
    ]
    assert [row.line for row in rows] == [2, 5, 6]
    assert rows[1].error == "has 3 fields where the header has 2"
    tabs = tmp_path / "a.tsv"
    tabs.write_text("prompt\tcompletion\na, b\tc\n")
    assert next(read_rows(tabs)).value == {"prompt": "a, b", "completion": "c"}


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}] * 300), path)
    rows = list(read_rows(path))
    assert rows[299].value == {"messages": messages}
    assert rows[299].line == 300
    path.write_bytes(b"PAR1 no")
    with pytest.raises(InvalidData, match="isn't Parquet"):
        list(read_rows(path))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("prompt,prompt,completion\na,b,c\n")
    with pytest.raises(InvalidData, match="2 columns are called 'prompt'"):
        list(read_rows(table))
    parquet = tmp_path / "table.parquet"
    column = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([column] * 3, names=["prompt", "prompt", "completion"]), parquet)
    with pytest.raises(InvalidData, match="2 columns are called 'prompt'"):
        list(read_rows(parquet))
    table.write_text("prompt,completion,,\na,b,,\n")
    assert len(list(read_rows(table))) == 1


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one \n\n  two\r\n")
    assert [(row.line, row.value) for row in read_rows(path)] == [
        (1, {"text": "one "}),
        (3, {"text": "  two"}),
    ]


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.doc").touch()
    for path, said in [
        (tmp_path / "none.json", "there is no such file"),
        (tmp_path, "is a directory"),
        (tmp_path / "a.doc", "unknown kind of file; accepted are .json, .jsonl"),
    ]:
        with pytest.raises(InvalidData, match=said):
            list(read_rows(path))


def test_memory_stays_flat(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    row = json.dumps({"text": "x" * 1000})
    with path.open("w") as file:
        file.write("[" + row + f",\n{row}" * 20000 + "]")
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path)) == 20001
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_shares(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.touch()
    assert parse_data_path(str(path)) == DataPath(str(path), 1.0)
    assert parse_data_path(f"{path}:0.25") == DataPath(str(path), 0.25)
    odd = tmp_path / "b:2"
    odd.touch()
    assert parse_data_path(str(odd)) == DataPath(str(odd), 1.0)
    for share in ("0", "-1", "nan", "inf", "1e12", "half"):
        with pytest.raises(InvalidData, match="share"):
            parse_data_path(f"{path}:{share}")


def test_fingerprints_are_those_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    assert data_fingerprint([f"{path}:0.5"]) == {str(path): hashlib.sha256(b"one").hexdigest()}
    with pytest.raises(InvalidData, match="can't be read"):
        data_fingerprint([str(tmp_path / "none")])


def test_rows_of_one_line_have_numbers_and_rows_on_lines_of_their_own_do_not(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS))
    assert [(row.line, row.number) for row in read_rows(path)] == [(1, 1), (1, 2), (1, 3)]
    path.write_text("".join(map(json.dumps, ROWS)))
    assert [(row.line, row.number) for row in read_rows(path)] == [(1, None), (1, 2), (1, 3)]
    for text in (json.dumps(ROWS, indent=2), "\n".join(map(json.dumps, ROWS))):
        path.write_text(text)
        assert [row.number for row in read_rows(path)] == [None] * 3
    path.write_text('[{"a": 1}, 5, {"a" 3}]')
    found = [(row.number, row.error is None) for row in read_rows(path)]
    assert found[:3] == [(1, True), (2, False), (3, False)]


def test_rows_behind_a_broken_one_on_lines_of_their_own_have_no_numbers() -> None:
    assert [row.number for row in read_json_values(io.StringIO(ARRAY))] == [None] * 8


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_number_of_too_many_digits_is_a_broken_row(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(f'{{"text": 1}}\n{{"text": {"9" * 5000}}}\n{{"text": 2}}\n')
    rows = list(read_rows(path))
    assert [row.value for row in rows] == [{"text": 1}, None, {"text": 2}]
    assert rows[1].error == "isn't JSON that can be read: a number has too many digits"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "ticket;label\nhi, you;x\n", "separated by semicolons, where commas are expected"),
        ("a.csv", "ticket|label\nhi|x\n", "separated by bars"),
        ("a.csv", "ticket\tlabel\nhi\tx\n", "separated by tabs.*: name it .tsv"),
        ("a.tsv", "ticket,label\nhi,x\n", "separated by commas.*: name it .csv"),
    ],
)
def test_a_table_with_other_separators_says_so(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidData, match=rf"{name}: its columns are {said}"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_a_file_in_windows_encoding_says_so(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes('[{"text": "größer für 5 €"}]'.encode("cp1252"))
    with pytest.raises(
        InvalidData, match=r"isn't UTF-8: as Windows-1252 it reads '.*größer für.*'.*iconv -f cp1252"
    ):
        list(read_rows(path))
    path.write_text('[{"text": "größer"}]', encoding="utf-16")
    with pytest.raises(InvalidData, match="isn't UTF-8: it is UTF-16"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_in_windows_encoding_says_so(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes('{"text": "a"}\n{"text": "größer"}\n'.encode("cp1252"))
    first, second = read_rows(path)
    assert first.error is None
    assert second.error is not None
    assert second.error.startswith("isn't UTF-8 at byte 13: as Windows-1252 it reads '")
    assert "größer" in second.error


def test_columns_are_read_under_our_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ticket,label,id\nhi,x,1\n")
    columns = parse_columns("prompt=ticket, completion = label")
    assert columns == parse_columns('{"prompt": "ticket", "completion": "label"}')
    assert next(read_rows(path, columns)).value == {"id": "1", "prompt": "hi", "completion": "x"}
    assert recognise(path, columns).name == "prompt-completion"
    other = tmp_path / "b.jsonl"
    other.write_text('{"text": "a"}')
    check_columns(columns, [str(path), str(other)])
    assert next(read_rows(other, columns)).value == {"text": "a"}
    # Two names may change places, and one column may stand for two fields.
    assert next(read_rows(path, Columns({"ticket": "label", "label": "ticket"}))).value == {
        "ticket": "x",
        "label": "hi",
        "id": "1",
    }
    assert next(read_rows(path, Columns({"prompt": "id", "completion": "id"}))).value == {
        "ticket": "hi",
        "label": "x",
        "prompt": "1",
        "completion": "1",
    }


def test_columns_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ticket,label\nhi,x\n")
    with pytest.raises(InvalidArgument, match=r"no column 'lable' in .*; there are 'ticket', 'label'"):
        check_columns(parse_columns("prompt=ticket,completion=lable"), [str(path)])
    with pytest.raises(InvalidData, match="--columns prompt=ticket,completion=label"):
        recognise(path)
    for text, said in (
        ("prompt", "expected FIELD=COLUMN"),
        ("prompt=", "expected FIELD=COLUMN"),
        ("question=ticket", "'question' is no field; there are prompt, completion"),
        ("prompt=a,prompt=b", "prompt is given twice"),
        ("{", "isn't JSON"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            parse_columns(text)


TWICE = '{"a": 1}\n{"a": 2, "b": {"c": [{"d": 1, "d": 2}]}}\n{"a": 3, "a": 3}\n{"a": 4}\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", TWICE), ("a.json", TWICE), ("b.json", f"[{TWICE.strip().replace(chr(10), ', ')}]")],
)
def test_a_key_with_two_values_is_a_broken_row(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    rows = list(read_rows(tmp_path / name))
    assert [row.value and row.value["a"] for row in rows] == [1, None, 3, 4]
    assert rows[1].error == "gives 'd' two values in one object; keep one of them"
    assert (rows[1].number or rows[1].line) == 2
