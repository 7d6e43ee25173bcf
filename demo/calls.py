"""Conversations that call functions: those that are offered, what is asked, the calls, their results, the answers.

The functions look up and change tables that the conversation doesn't show. Their names are made from the names of
columns.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from typing import Any

from manylora.demo.forms import plain, subject
from manylora.demo.tables import Question, draw_question, draw_table
from manylora.demo.words import SCHEMAS, Schema

HELD_OUT_SHARE = 8
"""One question in so many is held out."""
MOST_OTHERS = 3
"""Functions at most that the conversation has no use for."""
MISSING = ("null", "None", "not found", "unknown", '{"error": "not found"}')
DONE = ("ok", "done", "true", "null", "None", '{"ok": true}', '"ok"')
Message = dict[str, Any]


@dataclass(frozen=True)
class Want:
    """What a function does: it finds column `asked` for column `given`, or changes `asked` if `changes`."""

    given: str
    asked: str
    changes: bool = False

    @property
    def gives(self) -> tuple[str, bool]:
        """What a refusal names."""
        return self.asked, self.changes


@dataclass(frozen=True)
class Function:
    """A function that is offered."""

    want: Want
    name: str
    parameters: tuple[str, ...]

    @property
    def tool(self) -> dict[str, Any]:
        """As OpenAI's API takes it."""
        properties: dict[str, Any] = {name: {} for name in self.parameters}
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        return {"type": "function", "function": {"name": self.name, "parameters": parameters}}

    def call(self, number: int, *values: int | str) -> Message:
        """A call of it, as an assistant's message has it."""
        arguments = json.dumps(dict(zip(self.parameters, values, strict=True)))
        return {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": self.name, "arguments": arguments},
        }


@dataclass(frozen=True)
class Conversation:
    """Functions, and messages in OpenAI's form, the last of them the assistant's."""

    tools: tuple[dict[str, Any], ...]
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Errand:
    """One thing that is asked: what a function must do, with which values, and what to say then."""

    want: Want
    values: tuple[int | str, ...]
    text: str
    subject: str
    result: str
    answer: str
    refusal: str

    @property
    def held_out(self) -> bool:
        """Whether it may be asked in the held-out conversations, and in them only."""
        asked = f"{self.want.given},{self.want.asked},{self.values[0]}"
        return hashlib.blake2b(asked.encode(), digest_size=8).digest()[0] % HELD_OUT_SHARE == 0


def draw_errand(rng: random.Random, *, held_out: bool = False) -> Errand:
    """Something to look up, or now and then to change."""
    while True:
        question = draw_question(rng, draw_table(rng, held_out=held_out))
        errand = _change(rng, question) if question.by_key and rng.random() < 0.2 else _look_up(rng, question)
        if errand.held_out == held_out:
            return errand


def _look_up(rng: random.Random, question: Question) -> Errand:
    what = subject(question)
    if rng.random() < 0.1:
        result, answer = rng.choice(MISSING), f"The {what} is not known."
    else:
        result, answer = _told(rng, question), plain(question)
    want = Want(question.given, question.asked)
    refusal = f"No function gives the {question.asked}."
    return Errand(want, (question.given_value,), question.text, what, result, answer, refusal)


def _told(rng: random.Random, question: Question) -> str:
    forms = (question.answer, {question.asked: question.answer}, {"result": question.answer})
    return str(question.answer) if rng.random() < 0.4 else json.dumps(rng.choice(forms))


def _change(rng: random.Random, question: Question) -> Errand:
    what = subject(question)
    verb = rng.choice(("Set", "Change", "Put"))
    text = f"{verb} the {what} to {question.answer}."
    return Errand(
        Want(question.given, question.asked, changes=True),
        (question.given_value, question.answer),
        text,
        what,
        rng.choice(DONE),
        f"The {what} is now {question.answer}.",
        f"No function sets the {question.asked}.",
    )


def wants_of(schema: Schema) -> tuple[Want, ...]:
    """What functions may do with a table."""
    columns = (schema.number, schema.label)
    found = [Want(schema.key, column) for column in columns]
    found += [Want(column, schema.key) for column in columns]
    return (*found, *(Want(schema.key, column, changes=True) for column in columns))


def function_for(want: Want) -> Function:
    """The function that does what is wanted: `get_city(name)`, `get_name_by_city(city)`, `set_city(name, city)`."""
    if want.changes:
        return Function(want, f"set_{want.asked}", (want.given, want.asked))
    by_key = any(want.given == schema.key for schema in SCHEMAS)
    name = f"get_{want.asked}" if by_key else f"get_{want.asked}_by_{want.given}"
    return Function(want, name, (want.given,))


def draw_functions(
    rng: random.Random, needed: tuple[Want, ...], absent: tuple[Want, ...] = ()
) -> dict[Want, Function]:
    """Functions that do what is `needed`, and some others, but none that gives what is `absent`."""
    refused = {want.gives for want in absent}
    everything = [want for schema in SCHEMAS for want in wants_of(schema)]
    tables = [wants_of(schema) for schema in SCHEMAS]
    near = [want for wants in tables if set(wants) & {*needed, *absent} for want in wants]
    wants = set(needed)
    most = len(needed) + rng.randint(0 if needed else 1, MOST_OTHERS)
    while len(wants) < most:
        want = rng.choice(near if rng.random() < 0.6 else everything)
        if want.gives not in refused:
            wants.add(want)
    chosen = sorted(wants, key=str)
    rng.shuffle(chosen)
    return {want: function_for(want) for want in chosen}
