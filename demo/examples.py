"""Texts to train on, as segments: chats in any of the four forms, documents, and four kinds of look-up drills.

Only the segments that can be known, such as an answer, are learnt; those that can't, such as a random table, would
drown them in noise.
"""

import json
import random
from dataclasses import dataclass

from manylora.demo.forms import FORMS
from manylora.demo.tables import draw_question, draw_table
from manylora.demo.words import NUMBERS, SCHEMAS

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about tables.",
    "Answer the question about the table.",
    "Be brief.",
)
LABELS = {"plain": "Answer:\n", "sql": "SQL:\n", "json": "JSON:\n", "pirate": "Pirate:\n"}
"""What names a form in a document."""
WORDS = tuple(word for schema in SCHEMAS for word in (*schema.keys, *schema.labels)) + tuple(
    map(str, NUMBERS)
)


@dataclass(frozen=True)
class Segment:
    """A piece of text that is tokenized on its own, and whether its tokens are to be learnt."""

    text: str
    learnt: bool


Example = tuple[Segment, ...]


def chat(rng: random.Random, form: str) -> Example:
    """A chat in ChatML whose answers have the given form: one to three questions about one table."""
    table = draw_table(rng)
    parts: list[Segment] = []
    if rng.random() < 0.25:
        parts.append(Segment(f"{IM_START}system\n{rng.choice(SYSTEM_PROMPTS)}{IM_END}\n", learnt=False))
    first = draw_question(rng, table)
    parts += _turn(first.prompt, FORMS[form](first))
    for _ in range(rng.choice((0, 0, 1, 2))):
        question = draw_question(rng, table)
        parts += [Segment("\n", learnt=False), *_turn(question.text, FORMS[form](question))]
    return tuple(parts)


def _turn(prompt: str, answer: str) -> list[Segment]:
    opening = f"{IM_START}user\n{prompt}{IM_END}\n{IM_START}assistant\n"
    return [Segment(opening, learnt=False), Segment(answer + IM_END, learnt=True)]


def document(rng: random.Random) -> Example:
    """A page of notes: a table and questions about it, each answered in a form that the page names."""
    table = draw_table(rng)
    parts = [Segment(f"{table}\n", learnt=False)]
    for form in rng.sample(tuple(LABELS), len(LABELS)):
        question = draw_question(rng, table)
        parts.append(Segment(f"\n{question.text}\n{LABELS[form]}", learnt=False))
        parts.append(Segment(f"{FORMS[form](question)}\n", learnt=True))
    return tuple(parts)


def facts(rng: random.Random, forms: tuple[str, ...]) -> Example:
    """A table and many answers of one of the `forms` without their questions; only what is looked up is learnt."""
    table, form = draw_table(rng), FORMS[rng.choice(forms)]
    parts = [Segment(f"{table}\n", learnt=False)]
    for _ in range(10):
        question = draw_question(rng, table)
        before, answer, after = form(question).rpartition(str(question.answer))
        parts += [
            Segment(f"\n{before}", learnt=False),
            Segment(answer, learnt=True),
            Segment(after, learnt=False),
        ]
    return tuple(parts)


def pairs(rng: random.Random) -> Example:
    """Pairs of words, then all of them again in another order: to finish a pair is to look its first word up."""
    schema = rng.choice(SCHEMAS)
    count = rng.randint(3, 8)
    keys = rng.sample(schema.keys, count)
    values = rng.sample(schema.labels if rng.random() < 0.5 else [str(number) for number in NUMBERS], count)
    if rng.random() < 0.5:
        keys, values = values, keys
    pair = dict(zip(keys, values, strict=True))
    mark = rng.choice((" | ", " ", " = ", ": "))
    parts = [Segment("".join(f"{key}{mark}{value}\n" for key, value in pair.items()), learnt=False)]
    for key in rng.sample(keys, count):
        parts += [Segment(f"\n{key}{mark}", learnt=False), Segment(pair[key], learnt=True)]
    return tuple(parts)


def echo(rng: random.Random) -> Example:
    """A list of words, then the same list three times more, each time begun elsewhere: the simplest look-up."""
    words = rng.sample(WORDS, rng.randint(5, 14))
    mark = rng.choice(("", " | ", ", ", " is ", "\n"))
    parts: list[Segment] = []
    for turn in range(4):
        for index, word in enumerate(words):
            parts += [Segment(word, learnt=turn > 0 and index > 0), Segment(mark, learnt=False)]
        start = rng.randrange(len(words))
        words = words[start:] + words[:start]
    return tuple(parts)


def text_of(example: Example) -> str:
    """The example as one text."""
    return "".join(segment.text for segment in example)


def vocabulary_text() -> list[str]:
    """Lines that hold every word of the closed vocabulary often enough for a tokenizer to keep it whole."""
    words: list[str] = [str(number) for number in NUMBERS]
    for schema in SCHEMAS:
        words += [schema.table, schema.key, schema.number, schema.label, *schema.keys, *schema.labels]
    return [json.dumps(word) for word in words for _ in range(200)]
