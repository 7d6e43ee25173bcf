"""Traces of others, read as they are written."""

import json
from pathlib import Path

import pytest

from manylora.loadtest.bench.traces import Recorded, TraceError, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:47.0000000,396,109
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,879,0
2023-11-16 18:15:51.0000000,0,5
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_azure_s_times_count_from_the_first_and_rows_are_sorted(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path / "trace.csv", AZURE))
    assert [(each.input_tokens, each.output_tokens) for each in found] == [(374, 44), (396, 109), (879, 1)]
    assert [each.at for each in found] == pytest.approx([0, 0.31941, 4.314579], abs=1e-5)


def test_azure_s_other_forms_of_time(tmp_path: Path) -> None:
    """The traces of 2024 name a zone; seconds will do too."""
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    zoned = "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:02+00:00,7,6\n"
    found = read_trace(written(tmp_path / "a.csv", head + zoned))
    assert [each.at for each in found] == pytest.approx([0, 1.99007], abs=1e-5)
    plain = read_trace(written(tmp_path / "b.csv", head + "10.5,3,4\n12,5,6\n"))
    assert plain == [Recorded(3, 4, 0.0), Recorded(5, 6, 1.5)]


def test_sharegpt_s_first_exchange_is_asked(tmp_path: Path) -> None:
    rows = [
        {
            "conversations": [
                said("human", "one two three four"),
                said("gpt", "a b c d e"),
                said("human", "x"),
            ]
        },
        {"conversations": [said("gpt", "it begins with an answer"), said("human", "a b c d")]},
        {"conversations": [said("human", "too short"), said("gpt", "a b c d e")]},
        {"conversations": [said("human", "only a question here")]},
        {"conversations": []},
        {
            "conversation": [
                {"role": "user", "content": "p q r s"},
                {"role": "assistant", "content": "a b c d"},
            ]
        },
    ]
    path = written(tmp_path / "sharegpt.json", json.dumps(rows))
    found = read_trace(path, lambda text: len(text.split()))
    assert found == [Recorded(4, 5, None, "one two three four"), Recorded(4, 4, None, "p q r s")]


def said(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "time,in,out\n1,2,3\n", "no column TIMESTAMP"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,2,3\n", "line 2: 'soon,2,3'"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n1,2\n", "line 2"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("t.json", "{", "no JSON"),
        ("t.json", "{}", "no list"),
        ("t.json", "[1, null]", "no request"),
    ],
)
def test_what_is_no_trace_is_said_with_its_place(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        read_trace(written(tmp_path / name, text))
