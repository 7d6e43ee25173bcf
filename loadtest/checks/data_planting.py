"""Spoils rows of a clean data set, a function for each kind of fault, and returns the line that takes a row's place."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from manylora.loadtest.material.data_texts import Row, sentences


@dataclass(frozen=True, slots=True)
class Planted:
    """A fault in place of, or beside, a clean row."""

    line: str
    beside: bool
    """Whether the clean row stays in the data set, as what is copied or contradicted."""


def broken(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """A line that isn't JSON, a missing field, or a field of the wrong type."""
    line, value = row.as_json(), json.loads(row.as_json())
    last = value["messages"][-1]
    match rng.randrange(7):
        case 0:
            line = line[: rng.randint(1, len(line) - 2)]
        case 1:
            line = line.replace('"content": "', '"content": ""', 1)
        case 2:
            line = json.dumps({"text_of_row": row.answer}, ensure_ascii=False)
        case 3:
            line = json.dumps({"messages": row.prompt}, ensure_ascii=False)
        case 4:
            last["content"] = {"text": rng.randint(0, 999)}
            line = json.dumps(value, ensure_ascii=False)
        case 5:
            del last["role"]
            line = json.dumps(value, ensure_ascii=False)
        case _:
            line = json.dumps([row.prompt, row.answer], ensure_ascii=False)
    return Planted(line, beside=False)


def empty(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """A question or an answer without anything to see."""
    blank = rng.choice(("", "", " ", "\n\n", "\t ", "\u3000", "\u200b"))
    if rng.random() < 0.75:
        return Planted(row.with_last(row.prompt, blank).as_json(), beside=False)
    return Planted(row.with_last(blank, row.answer).as_json(), beside=False)


def untrained(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """No message that is learnt: all answers of weight 0, or none there."""
    value = json.loads(row.as_json())
    for message in value["messages"]:
        if message["role"] == "assistant":
            message["weight"] = 0
    if rng.random() < 0.4:
        value["messages"] = [message for message in value["messages"] if message["role"] != "assistant"]
    return Planted(json.dumps(value, ensure_ascii=False), beside=False)


def roles(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """Turns in an order that no chat has."""
    turns = [turn for turn in row.turns if turn[0] != "system"]
    match rng.randrange(5):
        case 0:
            turns.insert(0, ("assistant", sentences(row.language, rng, 1)))
        case 1:
            turns.insert(len(turns) - 1, ("user", sentences(row.language, rng, 1)))
        case 2:
            turns.append(("user", sentences(row.language, rng, 1)))
        case 3:
            turns.append(("assistant", sentences(row.language, rng, 1)))
        case _:
            turns.insert(len(turns) - 1, ("system", "You are a helpful assistant."))
    return Planted(Row(tuple(turns), row.task, row.language).as_json(), beside=False)


def overlong(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """An answer well over 1,024 tokens, by any tokenizer."""
    characters = rng.randint(1500, 6000) if row.language.name == "zh" else rng.randint(6000, 20_000)
    parts: list[str] = []
    while sum(map(len, parts)) < characters:
        parts.append(sentences(row.language, rng, 5))
    return Planted(row.with_last(row.prompt, "\n\n".join(parts)).as_json(), beside=False)


def repeats(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """An answer that falls into a loop of a word, a phrase, a sentence or a line, as models do."""
    text = row.answer if len(row.answer) > 60 else sentences(row.language, rng, 3)
    unit, times = rng.choice(((6, 12), (14, 8), (30, 5), (60, 4), (110, 4)))
    begin = rng.randrange(max(len(text) - unit, 1))
    piece = text[begin : begin + max(rng.randint(unit // 2, unit), 3)].strip() or text[:unit]
    if row.language.name != "zh":
        piece = " ".join(piece.split(" ")[1:]) if piece.count(" ") > 1 else piece
        piece += rng.choice((" ", " ", "\n", ", "))
    looped = text[: begin + unit] + " " + piece * rng.randint(times, 4 * times)
    if rng.random() < 0.5:
        looped = looped[: len(looped) - rng.randrange(1, len(piece))]
    if rng.random() < 0.3:
        looped += " " + sentences(row.language, rng, 1)
    return Planted(row.with_last(row.prompt, looped).as_json(), beside=False)


def cut_off(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """An answer that ends at any character of its last 60 %."""
    size = rng.randrange(int(0.4 * len(row.answer)), len(row.answer))
    return Planted(row.with_last(row.prompt, row.answer[:size]).as_json(), beside=False)


def mojibake(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """UTF-8 that was read as Latin-1, Windows-1252, Windows-1251 or GBK, or with what didn't fit replaced."""
    encodings = {"ru": ("latin-1", "cp1252", "cp1251"), "zh": ("latin-1", "cp1252", "gbk")}
    encoding = rng.choice(encodings.get(row.language.name, ("latin-1", "cp1252", "cp1252", "utf-8")))

    def spoiled(text: str) -> str:
        if encoding == "utf-8":  # Latin-1 that was read as UTF-8
            return text.encode("latin-1", "ignore").decode("utf-8", "replace")
        return text.encode().decode(encoding, "replace")

    prompt, answer = row.prompt, row.answer
    if rng.random() < 0.6 or prompt.isascii():
        answer = spoiled(answer)
    else:
        prompt = spoiled(prompt)
    return Planted(row.with_last(prompt, answer).as_json(), beside=False)


def control(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """A character that can't be seen."""
    at = rng.randrange(len(row.answer) + 1)
    sign = rng.choice(("\x00", "\x07", "\x08", "\x1b[0m", "\x0b", "\u200b", "\ufeff", "\u202e"))
    return Planted(
        row.with_last(row.prompt, row.answer[:at] + sign + row.answer[at:]).as_json(), beside=False
    )


def exact_duplicate(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """The row again, perhaps with its fields written otherwise."""
    value = json.loads(row.as_json())
    if rng.random() < 0.5:
        value = {"id": rng.randint(1, 10**9), **value}
    return Planted(json.dumps(value, ensure_ascii=rng.random() < 0.5), beside=True)


def near_duplicate(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """The row again with one or two small edits in its last question or answer."""
    return Planted(edited(row, rng).as_json(), beside=True)


def edited(row: Row, rng: random.Random) -> Row:
    """Make one or two small edits: another word, a word less, a typo, other case, spaces or marks."""
    prompt, answer = row.prompt, row.answer
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.5 or len(answer) < 30:
            prompt = _edit(prompt, row, rng)
        else:
            answer = _edit(answer, row, rng)
    changed = row.with_last(prompt, answer)
    return changed if changed != row else edited(row, rng)


def _edit(text: str, row: Row, rng: random.Random) -> str:
    kind = rng.choice(("word", "word", "drop", "typo", "case", "space", "mark"))
    if kind == "case":
        return rng.choice((text.lower(), text.upper(), text.swapcase(), text[:1].swapcase() + text[1:]))
    if kind == "mark":
        return text.rstrip(".!?。！？ ") if rng.random() < 0.5 else text.replace(",", "").replace("，", "、")
    if kind == "space":
        return text.replace(" ", "  ") if rng.random() < 0.5 else f" {text}\n"
    if row.language.name == "zh" and not text.isascii():
        return _edit_characters(text, kind, row, rng)
    words = text.split(" ")
    letters = [index for index, word in enumerate(words) if word.isalpha()]
    if not letters:
        return text
    at = rng.choice(letters)
    if kind == "drop":
        del words[at]
    elif kind == "typo" and len(words[at]) > 3:
        place = rng.randrange(1, len(words[at]) - 1)
        words[at] = words[at][:place] + words[at][place + 1] + words[at][place] + words[at][place + 2 :]
    else:
        words[at] = rng.choice(
            [word for word in sentences(row.language, rng, 2).split(" ") if word.isalpha()]
        )
    return " ".join(words)


def _edit_characters(text: str, kind: str, row: Row, rng: random.Random) -> str:
    at = rng.randrange(len(text) - 1)
    new = "" if kind == "drop" else rng.choice(row.language.verbs)
    return text[:at] + new + text[at + len(new or "ab") :]


def inconsistent(row: Row, others: Sequence[Row], rng: random.Random) -> Planted:
    """The row's question again with the answer of another row of its task."""
    answer = rng.choice([other.answer for other in others if other.answer != row.answer])
    return Planted(row.with_last(row.prompt, answer).as_json(), beside=True)


Spoil = Callable[[Row, Sequence[Row], random.Random], Planted]
FAULTS: Mapping[str, Spoil] = {
    "broken": broken,
    "empty": empty,
    "untrained": untrained,
    "roles": roles,
    "overlong": overlong,
    "repeats": repeats,
    "cut-off": cut_off,
    "mojibake": mojibake,
    "control": control,
    "exact-duplicate": exact_duplicate,
    "near-duplicate": near_duplicate,
    "inconsistent": inconsistent,
}


def suits(kind: str, row: Row) -> bool:
    """Whether anyone could tell that this row was spoiled in this way."""
    if kind == "cut-off":
        return len(row.answer) > 30
    if kind == "mojibake":
        return row.language.name != "en" and not row.answer.isascii() and not row.prompt.isascii()
    return True
