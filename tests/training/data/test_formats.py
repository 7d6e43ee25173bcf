"""Every format is recognised by its fields and read into the same shape."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manylora.training.data.example import Example, Source
from manylora.training.data.files import read_rows
from manylora.training.data.formats import FORMATS, format_named, recognise
from manylora.training.errors import InvalidArgument, InvalidData

HERE = Source("a.jsonl", 3)


def turns(*pairs: str) -> list[dict[str, str]]:
    """from/value turns, each written "who: what"."""
    return [dict(zip(("from", "value"), pair.split(": "), strict=True)) for pair in pairs]


def messages(*pairs: str) -> list[dict[str, Any]]:
    return [dict(zip(("role", "content"), pair.split(": "), strict=True)) for pair in pairs]


def said(example: Example) -> list[str]:
    """Messages as "role: content", trained ones marked with a star."""
    return [
        f"{'*' if trained else ''}{message['role']}: {message['content']}"
        for message, trained in zip(example.messages, example.trained, strict=True)
    ]


CASES: Sequence[tuple[str, Mapping[str, Any], list[str]]] = [
    (
        "qwen",
        {"id": "identity_0", "conversations": turns("user: a", "assistant: b", "user: c", "assistant: d")},
        ["user: a", "*assistant: b", "user: c", "*assistant: d"],
    ),
    (
        "qwen",
        {"conversations": turns("assistant: x", "user: a", "assistant: b")},
        ["user: a", "*assistant: b"],
    ),
    (
        "qwen",
        {"conversations": turns("system: s", "assistant: x", "user: a", "assistant: b")},
        ["system: s", "user: a", "*assistant: b"],
    ),
    ("sharegpt", {"conversations": turns("human: a", "gpt: b")}, ["user: a", "*assistant: b"]),
    (
        "sharegpt",
        {"system": "s", "conversations": turns("human: a", "gpt: b")},
        ["system: s", "user: a", "*assistant: b"],
    ),
    (
        "sharegpt",
        {
            "conversations": [
                *turns("human: a"),
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                *turns("observation: o", "gpt: b"),
            ],
            "tools": '[{"name": "f"}]',
        },
        ["user: a", "*assistant: ", "tool: o", "*assistant: b"],
    ),
    ("messages", {"messages": messages("user: a", "assistant: b")}, ["user: a", "*assistant: b"]),
    ("messages", {"conversations": messages("user: a", "assistant: b")}, ["user: a", "*assistant: b"]),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
            ]
        },
        ["user: ab", "*assistant: c"],
    ),
    (
        "messages",
        {
            "messages": [
                *messages("user: a"),
                {"role": "assistant", "content": "c", "weight": 0},
                {"role": "user", "content": "d"},
                {"role": "assistant", "content": "e", "weight": 1},
            ]
        },
        ["user: a", "assistant: c", "user: d", "*assistant: e"],
    ),
    (
        "sharegpt",
        {"conversations": json.dumps(turns("human: a", "gpt: b")), "system": "s"},
        ["system: s", "user: a", "*assistant: b"],
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": '[["q", "r"]]'},
        ["user: q", "*assistant: r", "user: a", "*assistant: b"],
    ),
    (
        "messages",
        {"prompt": "of the messages", "messages": messages("user: a", "assistant: b")},
        ["user: a", "*assistant: b"],
    ),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, ["user: a", "*assistant: b"]),
    (
        "alpaca",
        {"instruction": "a", "input": "i", "output": "b", "system": "s", "history": [["q", "r"]]},
        ["system: s", "user: q", "*assistant: r", "user: a\ni", "*assistant: b"],
    ),
    ("prompt-completion", {"prompt": "a", "completion": "b"}, ["user: a", "*assistant: b"]),
    (
        "prompt-completion",
        {
            "prompt": messages("user: a", "assistant: x", "user: b"),
            "completion": messages("assistant: c"),
        },
        ["user: a", "assistant: x", "user: b", "*assistant: c"],
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_a_row(tmp_path: Path, name: str, row: Mapping[str, Any], expected: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    found = recognise(path)
    assert found.name == name
    assert said(found.example(row, HERE)) == expected


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_a_row_of_parquet_where_absent_fields_are_null(
    tmp_path: Path, name: str, row: Mapping[str, Any], expected: list[str]
) -> None:
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([{**row, "unused": None, "weight": None}])
    pq.write_table(table, path)
    [only] = read_rows(path)
    assert only.value is not None
    assert recognise(path).name == name
    assert said(format_named(name).example(only.value, HERE)) == expected


def test_plain_text() -> None:
    example = format_named("text").example({"text": "abc"}, HERE)
    assert example == Example((), (), (), "abc", HERE)
    assert Example.from_json(example.to_json(), HERE) == example


def test_calls_and_tools_have_one_shape() -> None:
    call = {"name": "f", "arguments": '{"x": 1}'}
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": call}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "o"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": None, "function_call": call},
                {"role": "function", "name": "f", "content": "o"},
            ],
            "functions": [{"name": "f"}],
        },
    ]
    for row in rows:
        example = format_named("messages").example(row, HERE)
        assert said(example) == ["user: a", "*assistant: ", "tool: o"]
        [made] = example.messages[1]["tool_calls"]
        assert made["function"] == {"name": "f", "arguments": {"x": 1}}
        assert made["type"] == "function"
        assert example.tools == ({"type": "function", "function": {"name": "f"}},)
        assert Example.from_json(example.to_json(), HERE) == example


def test_arguments_that_are_no_json_stay_text() -> None:
    row = {
        "messages": [
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x=1"}}]},
        ]
    }
    example = format_named("messages").example(row, HERE)
    assert example.messages[0]["tool_calls"][0]["function"]["arguments"] == "x=1"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": messages("user: a", "robot: b")},
            r"messages\[2\] has the role 'robot'; expected assistant",
        ),
        ({"messages": [{"role": "user", "content": {}}]}, r"messages\[1\] holds dict; expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text can be trained on"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "it is 0 or 1"),
        ({"messages": [*messages("user: a"), "b"]}, r"messages\[2\] is str; expected an object"),
        ({"messages": messages("user: a"), "tools": "nonsense"}, "tools is text that isn't JSON"),
        ({"conversations": turns("human: a", "robot: b")}, r"conversations\[2\] is from 'robot'"),
        ({"conversations": turns("human: a", "function_call: b")}, "is a function call but isn't JSON"),
        ({"instruction": "a", "output": [5]}, "output holds list"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history isn't a list of"),
    ],
)
def test_rows_that_break_their_format_are_errors_with_their_line(
    row: Mapping[str, Any], expected: str
) -> None:
    [matching] = [one for one in FORMATS if one.matches(row)][:1]
    with pytest.raises(InvalidData, match=rf"a\.jsonl:3: .*{expected}"):
        matching.example(row, HERE)


def test_a_row_of_another_format_says_what_was_found_and_expected() -> None:
    with pytest.raises(
        InvalidData, match=r"a\.jsonl:3: isn't in the format alpaca: found 'text'; expected instruction"
    ):
        format_named("alpaca").example({"text": "a"}, HERE)


def test_unknown_fields_are_an_error_that_lists_the_formats(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(
        InvalidData, match=r"a\.jsonl:1: no known format .* 'question', 'answer'; accepted are qwen"
    ):
        recognise(path)
    with pytest.raises(InvalidArgument, match="there is no data format 'csv'; there are qwen, sharegpt"):
        format_named("csv")


def test_a_file_in_two_formats_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InvalidData, match="line 1 is in the format text, line 3 in prompt-completion"):
        recognise(path)


def test_speakers_of_qwen_and_sharegpt_may_be_mixed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [turns("user: a", "assistant: b"), turns("human: a", "gpt: b"), turns("user: a", "assistant: b")]
    path.write_text(json.dumps([{"conversations": row} for row in rows]))
    assert recognise(path).name == "sharegpt"
    for row in rows:
        assert said(format_named("qwen").example({"conversations": row}, HERE)) == [
            "user: a",
            "*assistant: b",
        ]


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("", "[]", " \n"):
        path.write_text(text)
        with pytest.raises(InvalidData, match="there is no row in it"):
            recognise(path)
    path.write_text("nonsense")
    with pytest.raises(InvalidData, match=r"a\.json:1: isn't JSON"):
        recognise(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": {"day": 1}, "completion": "b"}, "prompt holds dict, and text belongs there"),
        ({"prompt": "a", "completion": {"x": 1}}, "completion holds dict, and text belongs there"),
        ({"prompt": "a", "completion": []}, "completion is an empty list"),
        ({"text": {"a": 1}}, "text holds dict, and text belongs there"),
        ({"conversations": []}, "conversations is an empty list"),
        ({"conversations": "[]"}, "conversations is an empty list"),
        ({"messages": {"role": "user"}}, "messages holds dict, and a list of turns belongs there"),
    ],
)
def test_a_field_of_the_right_name_that_holds_something_else_is_named(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InvalidData, match=rf"a\.jsonl:1: {said}$"):
        recognise(path)
    known = next(one for one in FORMATS if next(iter(row)) in one.fields)
    with pytest.raises(InvalidData, match=f"isn't in the format {known.name}: {said}; expected"):
        known.example(row, HERE)


def test_a_date_where_text_belongs_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [date(2020, 1, 1)], "completion": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidData, match="prompt holds date, and text belongs there"):
        recognise(tmp_path / "a.parquet")
