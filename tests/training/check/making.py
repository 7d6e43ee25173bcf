"""Rows and files for the tests of the data check."""

import json
from collections.abc import Iterable
from pathlib import Path

from manylora.training.check.check import CheckSettings, check_data
from manylora.training.check.report import CheckReport

SUBJECTS = (
    "The baker",
    "A sailor",
    "My aunt",
    "The clerk",
    "Our guide",
    "A painter",
    "The judge",
    "One pupil",
)
DEEDS = ("mends", "sells", "paints", "counts", "hides", "finds", "lends", "weighs", "draws")
THINGS = (
    "a copper kettle",
    "seven lanterns",
    "the blue door",
    "fresh plums",
    "old maps",
    "a wool scarf",
    "ink",
)
PLACES = (
    "by the river",
    "after lunch",
    "in the attic",
    "near the mill",
    "at dawn",
    "on the pier",
    "in spring",
)


def sentence(number: int) -> str:
    """One of 3,528 different sentences."""
    subject, number = SUBJECTS[number % 8], number // 8
    deed, number = DEEDS[number % 9], number // 9
    thing, number = THINGS[number % 7], number // 7
    return f"{subject} {deed} {thing} {PLACES[number % 7]}."


def chat(*texts: str, system: str | None = None) -> dict[str, object]:
    """A conversation that begins with the user."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def good(number: int) -> dict[str, object]:
    """A row that nothing is wrong with."""
    answer = " ".join(sentence(number * 37 + step * 1013) for step in range(1 + number % 3))
    return chat(f"Tell me about case {number}: {sentence(number * 7 + 3)}", answer)


def write(path: Path, rows: Iterable[object]) -> str:
    """Write rows as JSON lines; strings as they are."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def kinds_by_line(report: CheckReport) -> dict[int, set[str]]:
    """What each line of the first file is blamed for."""
    found: dict[int, set[str]] = {}
    for finding in report.findings:
        for line in finding.lines.get(report.files[0].path, ()):
            found.setdefault(int(line), set()).add(finding.kind.name)
    return found


def check_rows(directory: Path, *rows: object, beside: int = 0, **settings: object) -> dict[int, set[str]]:
    """Check these rows, followed by so many good ones."""
    path = write(directory / "data.jsonl", (*rows, *map(good, range(beside))))
    return kinds_by_line(check_data(CheckSettings((path,), **settings)))  # type: ignore[arg-type]
