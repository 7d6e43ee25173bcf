"""The four forms in which the same question is answered: the base's plain sentence and one form for each adapter."""

import json
from collections.abc import Callable

from manylora.demo.tables import Question


def plain(question: Question) -> str:
    """One English sentence, the base model's own form."""
    return f"The {subject(question)} is {question.answer}."


def pirate(question: Question) -> str:
    """The same, as a pirate says it."""
    return f"Arr, the {subject(question)} be {question.answer}, matey!"


def sql(question: Question) -> str:
    """The query that a database would answer the question with."""
    value = question.given_value
    literal = str(value) if isinstance(value, int) else f"'{value}'"
    return f"SELECT {question.asked} FROM {question.table.schema.table} WHERE {question.given} = {literal};"


def as_json(question: Question) -> str:
    """One JSON object: what was given, then what was found."""
    return json.dumps({question.given: question.given_value, question.asked: question.answer})


FORMS: dict[str, Callable[[Question], str]] = {"plain": plain, "sql": sql, "json": as_json, "pirate": pirate}
"""Form by name: `plain` is the base's, the others are the adapters' names."""

ADAPTERS = ("sql", "json", "pirate")


def subject(question: Question) -> str:
    """What the question asks for, as a part of a sentence."""
    if question.by_key:
        return f"{question.asked} of {question.given_value}"
    return f"{question.asked} with the {question.given} {question.given_value}"
