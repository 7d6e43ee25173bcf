"""Makes a clean data set to plant faults in: questions and answers in six languages, and tasks on tables and reviews.

All rows are in OpenAI's messages format. No prompt comes twice, and no two rows differ by a word alone.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from manylora.loadtest.material.data_words import LANGUAGES, TABLES, Language


@dataclass(frozen=True, slots=True)
class Row:
    """One example and where it came from."""

    turns: tuple[tuple[str, str], ...]
    """(role, content), the last the assistant's."""
    task: str
    language: Language

    @property
    def prompt(self) -> str:
        """The last question."""
        return self.turns[-2][1]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.turns[-1][1]

    def with_last(self, prompt: str, answer: str) -> "Row":
        """The same row with another last question and answer."""
        return Row((*self.turns[:-2], ("user", prompt), ("assistant", answer)), self.task, self.language)

    def as_json(self) -> str:
        """The row as a line of the file."""
        messages = [{"role": role, "content": content} for role, content in self.turns]
        return json.dumps({"messages": messages}, ensure_ascii=False)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _filled(frame: str, language: Language, rng: random.Random) -> str:
    slots = {
        "t": rng.choice(language.topics),
        "s": rng.choice(language.subjects),
        "s2": rng.choice(language.subjects),
        "v": rng.choice(language.verbs),
        "o": rng.choice(language.objects),
        "o2": rng.choice(language.objects),
        "w": rng.choice(language.places),
        "a": rng.choice(language.remarks),
    }
    slots |= {"S": _capital(slots["s"]), "W": _capital(slots["w"])}
    return frame.format(**slots)


def sentences(language: Language, rng: random.Random, count: int) -> str:
    """Return so many sentences of a language."""
    space = "" if language.name == "zh" else " "
    return space.join(_filled(rng.choice(language.frames), language, rng) for _ in range(count))


def _prose(rng: random.Random) -> Row:
    language = rng.choices(LANGUAGES, [one.share for one in LANGUAGES])[0]
    turns: list[tuple[str, str]] = []
    if rng.random() < 0.2:
        turns.append(
            ("system", rng.choice(("You are a helpful assistant.", "Answer in the user's language.")))
        )
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        turns.append(("user", _filled(rng.choice(language.questions), language, rng)))
        turns.append(("assistant", sentences(language, rng, rng.randint(1, 7))))
    if len(turns) < 4 and rng.random() < 0.15:
        items = [sentences(language, rng, 1) for _ in range(rng.randint(3, 5))]
        turns[-1] = ("assistant", "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1)))
    return Row(tuple(turns), "prose", language)


def _sql(rng: random.Random) -> Row:
    """A table and a question about it, answered as SQL, with no mark at the end."""
    name, (key, keys, number, label, labels) = rng.choice(tuple(TABLES.items()))
    rows = [(one, rng.randint(1, 99), rng.choice(labels)) for one in rng.sample(keys, rng.randint(3, 6))]
    table = "\n".join(f"{one} | {value} | {word}" for one, value, word in rows)
    asked, amount, word = rng.choice(rows)
    question, answer = rng.choice(
        (
            (f"What is the {number} of {asked}?", f"SELECT {number} FROM {name} WHERE {key} = '{asked}'"),
            (f"Which {key} has the {label} {word}?", f"SELECT {key} FROM {name} WHERE {label} = '{word}'"),
            (
                f"List every {key} with a {number} over {amount}.",
                f"SELECT {key} FROM {name} WHERE {number} > {amount}",
            ),
            (f"Sort by {number} and show the {label}s.", f"SELECT {label} FROM {name} ORDER BY {number}"),
        )
    )
    prompt = f"{name}\n{key} | {number} | {label}\n{table}\n\n{question}"
    return Row((("user", prompt), ("assistant", answer)), "sql", LANGUAGES[0])


def _extraction(rng: random.Random) -> Row:
    """Prose in which something is to be found, answered as JSON."""
    name, (key, keys, number, label, labels) = rng.choice(tuple(TABLES.items()))
    one, value, word = rng.choice(keys), rng.randint(1, 99), rng.choice(labels)
    language = LANGUAGES[0]
    text = f"{sentences(language, rng, 1)} Our {name} now has {one}, {number} {value}, {label} {word}. "
    prompt = f"Extract the record as JSON.\n\n{text}{sentences(language, rng, rng.randint(1, 2))}"
    answer = json.dumps({key: one, number: value, label: word}, ensure_ascii=False)
    return Row((("user", prompt), ("assistant", answer)), "json", language)


def _review(rng: random.Random) -> Row:
    """A review to be sorted into three labels."""
    language = rng.choice(LANGUAGES[:4])
    prompt = f"Classify the sentiment of this review:\n\n{sentences(language, rng, rng.randint(2, 3))}"
    label = rng.choice(("positive", "negative", "neutral"))
    return Row(
        (("system", "Answer with one word."), ("user", prompt), ("assistant", label)), "review", language
    )


def _title(rng: random.Random) -> Row:
    """A headline for a paragraph: an answer of some words without a mark at its end."""
    language = LANGUAGES[0]
    prompt = f"Find a headline for: {sentences(language, rng, rng.randint(2, 4))}"
    answer = f"{_capital(rng.choice(language.topics))}: {_filled('{s} {v} {o}', language, rng)}"
    return Row((("user", prompt), ("assistant", answer)), "title", language)


_TASKS: tuple[tuple[Callable[[random.Random], Row], int], ...] = (
    (_prose, 60),
    (_sql, 14),
    (_extraction, 10),
    (_review, 10),
    (_title, 6),
)


def clean_rows(rng: random.Random) -> Iterator[Row]:
    """Yield rows of all tasks without end. No last question comes twice."""
    seen: set[str] = set()
    while True:
        make = rng.choices([task for task, _ in _TASKS], [share for _, share in _TASKS])[0]
        row = make(rng)
        key = "\n".join(content for _, content in row.turns[:-1]).casefold()
        if key not in seen:
            seen.add(key)
            yield row
