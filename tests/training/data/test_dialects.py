"""What other trainers' files say beside the words: marks of what is trained, system columns, numbers, half emoji."""

import json
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manylora.training.data.dataset import DataSettings, TrainingData, load_data
from manylora.training.data.example import Source
from manylora.training.data.files import read_rows
from manylora.training.data.formats import FORMATS, recognise
from manylora.training.data.render import IGNORED
from manylora.training.errors import InvalidData
from tests.training.data.families import tokenizer_of
from tests.training.data.test_formats import messages, said, turns

HERE = Source("a.jsonl", 3)
NO: Mapping[str, Any] = {
    "weight": 0,
    "loss": False,
    "loss_scale": 0.0,
    "train": False,
    "training": False,
    "masked": True,
}
YES: Mapping[str, Any] = {
    "weight": 1.0,
    "loss": True,
    "loss_scale": 1,
    "train": True,
    "training": 1,
    "masked": False,
}


def read(row: Mapping[str, Any]) -> list[str]:
    [matching] = [one for one in FORMATS if one.matches(row)][:1]
    return said(matching.example(row, HERE))


def unread(row: Mapping[str, Any]) -> tuple[str, ...]:
    [matching] = [one for one in FORMATS if one.matches(row)][:1]
    return matching.example(row, HERE).unread


def load(path: Path, rows: list[Any], tokenizer: str = "chatml") -> TrainingData:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return load_data(DataSettings((str(path),), 400), tokenizer_of(tokenizer))


@pytest.mark.parametrize("name", NO)
def test_a_message_that_is_marked_as_untrained_is_not_trained(tmp_path: Path, name: str) -> None:
    marks = [NO[name], YES[name]]
    openai = messages("user: what", "assistant: Hello", "user: and", "assistant: Paris")
    sharegpt = turns("human: what", "gpt: Hello", "human: and", "gpt: Paris")
    for conversation in (openai, sharegpt):
        for turn, mark in zip(conversation[1::2], marks, strict=True):
            turn[name] = mark
    expected = ["user: what", "assistant: Hello", "user: and", "*assistant: Paris"]
    assert read({"messages": openai}) == expected
    assert read({"conversations": sharegpt}) == expected
    # The mark is not for the chat template.
    data = load(tmp_path / "a.jsonl", [{"messages": openai}])
    assert all(message.keys() == {"role", "content"} for message in data.example(0).messages)
    [item] = data.dataset
    trained = [token for token in item["labels"] if token != IGNORED]
    assert tokenizer_of("chatml").decode(trained) == "Paris<|im_end|>"
    completion = [{"role": "assistant", "content": "b", name: NO[name]}, *messages("assistant: c")]
    assert read({"prompt": messages("user: a"), "completion": completion})[1:] == [
        "assistant: b",
        "*assistant: c",
    ]


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"weight": 0.5}, "has the weight 0.5; it is 0 or 1"),
        ({"loss": "no"}, "has the loss 'no'; it is 0 or 1, or true or false"),
        ({"train": True, "loss": False}, "marks that contradict each other: loss, train"),
        ({"train": True, "masked": True}, "contradict"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "trained as a whole"),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(marks: Mapping[str, Any], expected: str) -> None:
    for row in (
        {"messages": [*messages("user: a"), {"role": "assistant", "content": "b", **marks}]},
        {"conversations": [*turns("human: a"), {"from": "gpt", "value": "b", **marks}]},
    ):
        with pytest.raises(InvalidData, match=rf"a\.jsonl:3: .*{expected}"):
            read(row)


def test_a_mark_that_asks_to_train_the_user_is_said() -> None:
    asked = {"messages": [{"role": "user", "content": "a", "train": True}, *messages("assistant: b")]}
    assert read(asked) == ["user: a", "*assistant: b"]
    assert unread(asked) == ("messages[].train of user",)
    asked["messages"][0]["train"] = False
    assert unread(asked) == ()


SYSTEMLESS: list[Mapping[str, Any]] = [
    {"messages": messages("user: a", "assistant: b")},
    {"conversations": messages("user: a", "assistant: b")},
    {"conversations": turns("user: a", "assistant: b")},
    {"conversations": turns("human: a", "gpt: b")},
    {"prompt": "a", "completion": "b"},
    {"prompt": messages("user: a"), "completion": messages("assistant: b")},
    {"instruction": "a", "output": "b"},
]


@pytest.mark.parametrize("row", SYSTEMLESS)
def test_a_system_column_is_read_beside_every_kind_of_conversation(row: Mapping[str, Any]) -> None:
    assert read({**row, "system": "s"}) == ["system: s", "user: a", "*assistant: b"]
    assert unread({**row, "system": "s"}) == ()
    assert read({**row, "system": ""}) == ["user: a", "*assistant: b"]
    with pytest.raises(InvalidData, match="system holds dict; expected text"):
        read({**row, "system": {"text": "s"}})


@pytest.mark.parametrize("row", SYSTEMLESS)
def test_tools_are_read_beside_every_kind_of_conversation(row: Mapping[str, Any]) -> None:
    [matching] = [one for one in FORMATS if one.matches(row)][:1]
    for name in ("tools", "functions"):
        example = matching.example({**row, name: [{"name": "f"}]}, HERE)
        assert example.tools == ({"type": "function", "function": {"name": "f"}},)
        assert example.unread == ()


def test_a_system_turn_comes_before_the_column_and_that_is_said() -> None:
    row = {"messages": messages("system: own", "user: a", "assistant: b")}
    assert read({**row, "system": "s"})[0] == "system: own"
    assert unread({**row, "system": "s"}) == ("system (there is a system turn)",)
    assert unread({**row, "system": "own"}) == ()


def test_fields_that_were_not_read_are_in_the_report(tmp_path: Path) -> None:
    row = {"messages": messages("user: what", "assistant: Hello"), "prompt": "of it", "empty": "", "n": None}
    rows = [{**row, "id": number} for number in range(120)] + [{**row, "source": {"page": 3}}]
    report = load(tmp_path / "a.jsonl", rows).report
    assert report.files[0].unread == {"prompt": 121, "id": 120, "source": 1}
    told = "fields that were not read: prompt (121 rows), id (120 rows), source (1 row)."
    assert f"{tmp_path / 'a.jsonl'}: {told}" in report.sentences()
    assert not load(tmp_path / "b.jsonl", [{"text": "Hello"}]).report.files[0].unread
    many = load(tmp_path / "c.jsonl", [{"text": "Hello", **{f"n{at}": 1 for at in range(30)}}]).report
    assert many.sentences()[1].endswith("n18 (1 row), n19 (1 row), …; 20 of 30 shown.")
    left_out = {"conversations": turns("gpt: x", "human: a", "gpt: b")}
    assert unread(left_out) == ("conversations[] of the assistant before the user's first",)
    assert unread({"conversations": [{**turns("human: a")[0], "ms": 5}, *turns("gpt: b")]}) == (
        "conversations[].ms",
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": 3, "completion": 4},
        {"instruction": 3, "output": 4},
        {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": 4}]},
        {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": 4}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": 3}]},
                *messages("assistant: 4"),
            ]
        },
    ],
)
def test_a_number_is_text_where_text_is_expected(row: Mapping[str, Any]) -> None:
    assert read(row) == ["user: 3", "*assistant: 4"]


@pytest.mark.parametrize(
    ("number", "text"), [(4.5, "4.5"), (-0.0, "-0.0"), (10**30, "1" + "0" * 30), (Decimal("1.20"), "1.20")]
)
def test_a_number_is_written_as_json_writes_it(number: Any, text: str) -> None:
    assert read({"prompt": "a", "completion": number}) == ["user: a", f"*assistant: {text}"]
    assert read({"instruction": "a", "output": "b", "history": [["q", number]]})[1] == f"*assistant: {text}"


@pytest.mark.parametrize("value", [True, float("nan"), float("inf")])
def test_what_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(InvalidData, match=r"a\.jsonl:3: completion\[1\] holds .*; expected text"):
        read({"prompt": "a", "completion": value})
    with pytest.raises(InvalidData, match=r"a\.jsonl:3: text holds .*; expected text"):
        read({"text": value})


@pytest.mark.parametrize("place", [0, 120])
def test_one_row_with_a_number_neither_breaks_recognition_nor_ends_the_run(
    tmp_path: Path, place: int
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "How many?", "completion": "well"} for _ in range(121)]
    rows[place]["completion"] = 4
    assert recognise_rows(tmp_path, rows) == "prompt-completion"
    data = load(tmp_path / "a.jsonl", rows)
    assert data.report.examples == 121
    assert data.example(place).messages[1]["content"] == "4"


def recognise_rows(directory: Path, rows: list[dict[str, Any]]) -> str:
    path = directory / "recognised.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return recognise(path).name


CALLS = [
    {"name": "weather", "arguments": {"city": "Paris"}},
    {"name": "add", "arguments": {"a": 1, "b": {"c": 2}}},
    {"name": "now", "arguments": {}},
]
TOOLS = [
    {"type": "function", "function": {"name": call["name"], "parameters": {"properties": call["arguments"]}}}
    for call in CALLS
]


def test_calls_from_parquet_give_the_tokens_of_the_same_rows_as_json_lines(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "content": "well"},
                {"role": "assistant", "content": "Paris"},
            ],
            "tools": TOOLS[: 1 + number % 3],
        }
        for number, call in enumerate(CALLS)
    ]
    lines = load(tmp_path / "a.jsonl", rows, "qwen2.5")
    table = pa.Table.from_pylist(rows)
    filled = table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert filled == {"city": "Paris", "a": None, "b": None}  # what the file format makes of it
    pq.write_table(table, tmp_path / "a.parquet")
    settings = DataSettings((str(tmp_path / "a.parquet"),), 400)
    columns = load_data(settings, tokenizer_of("qwen2.5"))
    assert columns.dataset[:] == lines.dataset[:]
    assert '"arguments": {"city": "Paris"}' in tokenizer_of("qwen2.5").decode(lines.dataset[0]["input_ids"])


def test_nulls_that_a_file_says_itself_stay(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"until": None}}}
    row = {"messages": [*messages("user: a"), {"role": "assistant", "tool_calls": [call]}]}
    data = load(tmp_path / "a.jsonl", [row], "qwen2.5")
    assert '{"until": null}' in tokenizer_of("qwen2.5").decode(data.dataset[0]["input_ids"])
    # A map's keys are its own, as against a struct's.
    kind = pa.map_(pa.string(), pa.struct({"a": pa.int64(), "b": pa.int64()}))
    table = pa.table({"text": ["a"], "more": pa.array([{"x": None, "y": {"a": 1}}], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert next(read_rows(tmp_path / "a.parquet")).value == {"text": "a", "more": {"x": None, "y": {"a": 1}}}


HALF = "half an emoji: \ud83d!"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*messages("user: a"), {"role": "assistant", "content": HALF}]},
        {"conversations": [{"from": "human", "value": HALF}, *turns("gpt: b")]},
        {"instruction": HALF, "output": "b"},
        {"prompt": "a", "completion": "b", "system": HALF},
        {"prompt": "a", "completion": "b", "tools": [{"name": HALF}]},
        {"text": HALF},
    ],
)
def test_half_an_emoji_is_refused_with_its_line(tmp_path: Path, row: Mapping[str, Any]) -> None:
    with pytest.raises(InvalidData, match=r"a\.jsonl:1: a character is broken: U\+D83D is half of a pair"):
        load(tmp_path / "a.jsonl", [row])


def test_half_an_emoji_in_a_field_that_is_not_read_does_no_harm(tmp_path: Path) -> None:
    row = {"text": "Hello", "note": HALF}
    assert load(tmp_path / "a.jsonl", [row]).report.examples == 1


def test_a_whole_emoji_written_as_two_escapes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "so \\ud83d\\ude00"}')
    assert load_data(DataSettings((str(path),), 60), tokenizer_of("chatml")).example(0).text == "so 😀"


def test_arguments_that_give_a_key_two_values_are_refused_with_their_line(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": '{"city": "Bern", "city": "Basel"}'}}
    row = {"messages": [*messages("user: and?"), {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(InvalidData, match=r"a\.jsonl:1: .*weather.*gives 'city' two values"):
        load(tmp_path / "a.jsonl", [row])
