"""Requests as somebody recorded them: a ShareGPT file's texts, or an Azure trace's times and token counts."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

LEAST_TOKENS = 4
"""Shorter prompts and answers of a ShareGPT file are left out, as other load clients do."""
LETTERS_PER_TOKEN = 4
"""Assumed where no tokenizer counts."""
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
SPEAKERS = {"human": "asks", "user": "asks", "gpt": "answers", "assistant": "answers", "chatgpt": "answers"}

Count = Callable[[str], int]


class TraceError(ValueError):
    """A file that is no trace. One line: which file, where, what was expected."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a trace."""

    input_tokens: int
    output_tokens: int
    at: float | None = None
    """Seconds after the first; None: the file has no times."""
    text: str | None = None
    """The prompt; None: any of so many tokens."""


def by_letters(text: str) -> int:
    """Return about how many tokens a text has, where no tokenizer says."""
    return max(1, round(len(text) / LETTERS_PER_TOKEN))


def read_trace(path: Path, count: Count = by_letters) -> list[Recorded]:
    """Read a trace: .csv in Azure's form, .json in ShareGPT's. Raises TraceError, OSError.

    ``count`` counts the tokens of ShareGPT's texts.
    """
    try:
        found = _azure(path) if path.suffix == ".csv" else _sharegpt(path, count)
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not found:
        raise TraceError(f"{path} holds no request that can be asked")
    return found


def _azure(path: Path) -> list[Recorded]:
    """Read the form of Azure's LLM inference traces: TIMESTAMP,ContextTokens,GeneratedTokens."""
    found: list[tuple[float, int, int]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise TraceError(f"{path} has no column {missing[0]}; an Azure trace has {', '.join(COLUMNS)}")
        for row in reader:
            found.append(_azure_row(row, f"{path}, line {reader.line_num}"))
    found.sort()
    first = found[0][0] if found else 0.0
    return [Recorded(prompt, max(1, answer), at - first) for at, prompt, answer in found if prompt > 0]


def _azure_row(row: Mapping[str, str], where: str) -> tuple[float, int, int]:
    try:
        return _seconds(row[COLUMNS[0]]), int(row[COLUMNS[1]]), int(row[COLUMNS[2]])
    except (ValueError, TypeError, AttributeError):
        said = ",".join(str(row.get(name)) for name in COLUMNS)
        raise TraceError(f"{where}: {said!r} is not a time and two numbers of tokens") from None


def _seconds(text: str) -> float:
    """Read a time as Azure writes it ("2023-11-16 18:15:46.6805900", also with a zone), or seconds."""
    try:
        return float(text)
    except ValueError:
        whole, dot, rest = text.strip().partition(".")
        digits = len(rest) - len(rest.lstrip("0123456789"))
        # datetime reads six digits of a second at most.
        moment = datetime.fromisoformat(whole + (dot + rest[: min(6, digits)]) * bool(digits) + rest[digits:])
        return moment.timestamp()


def _sharegpt(path: Path, count: Count) -> list[Recorded]:
    """Read a list of {"conversations": [{"from", "value"}, …]}: the first question and its answer's length."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TraceError(f"{path} is no JSON: {error.msg}, line {error.lineno}") from None
    if not isinstance(rows, list):
        raise TraceError(f"{path} is no list of conversations")
    return [found for row in rows for found in _first_exchange(row, count)]


def _first_exchange(row: Any, count: Count) -> Iterator[Recorded]:
    """Yield the request of a conversation that begins with a question and an answer; else nothing."""
    turns = row.get("conversations", row.get("conversation")) if isinstance(row, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        return
    who = [SPEAKERS.get(str(turn.get("from", turn.get("role")))) for turn in turns[:2]]
    asked, answered = (turn.get("value", turn.get("content")) for turn in turns[:2])
    if who != ["asks", "answers"] or not isinstance(asked, str) or not isinstance(answered, str):
        return
    sizes = count(asked), count(answered)
    if min(sizes) >= LEAST_TOKENS:
        yield Recorded(*sizes, text=asked)
