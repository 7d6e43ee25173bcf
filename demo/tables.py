"""Made-up tables and questions about them, from a seed. No answers (forms.py), no tokens (examples.py).

A table and everything asked about it belong to the held-out part or to the training part, by a hash of the table's
rows; so the two can't meet, however many of either are drawn.
"""

import hashlib
import random
from dataclasses import dataclass

from manylora.demo.words import NUMBERS, SCHEMAS, Schema

MIN_ROWS, MAX_ROWS = 3, 4
HELD_OUT_SHARE = 16
"""One table in so many is held out."""


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    key: str
    number: int
    label: str


@dataclass(frozen=True)
class Table:
    """A schema with three or four rows, in which nothing occurs twice; `columns` are those after the key, in order."""

    schema: Schema
    rows: tuple[Row, ...]
    columns: tuple[str, str]

    def __str__(self) -> str:
        lines = [self.schema.table, " | ".join((self.schema.key, *self.columns))]
        for row in self.rows:
            lines.append(" | ".join((row.key, *(str(self.cell(row, column)) for column in self.columns))))
        return "\n".join(lines)

    def cell(self, row: Row, column: str) -> int | str:
        """The value of a column in a row."""
        if column == self.schema.key:
            return row.key
        return row.number if column == self.schema.number else row.label

    @property
    def held_out(self) -> bool:
        """Whether this table may be used in the held-out prompts, and in them only."""
        rows = "\n".join(sorted(f"{row.key},{row.number},{row.label}" for row in self.rows))
        return hashlib.blake2b(rows.encode(), digest_size=8).digest()[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Question:
    """What stands in the column `asked` of the row whose column `given` is known? `text` asks it in words."""

    table: Table
    row: Row
    given: str
    asked: str
    text: str

    @property
    def by_key(self) -> bool:
        """Whether the row is named by its key."""
        return self.given == self.table.schema.key

    @property
    def given_value(self) -> int | str:
        """What the question says about the row."""
        return self.table.cell(self.row, self.given)

    @property
    def answer(self) -> int | str:
        """What the question asks for."""
        return self.table.cell(self.row, self.asked)

    @property
    def prompt(self) -> str:
        """The text of a user turn that brings its own table."""
        return f"{self.table}\n\n{self.text}"


BY_KEY = (
    "What is the {asked} of {value}?",
    "Tell me the {asked} of {value}.",
    "Which {asked} does {value} have?",
    "I need the {asked} of {value}.",
)
BY_VALUE = (
    "What is the {asked} with the {given} {value}?",
    "Find the {asked} with the {given} {value}.",
    "Which {asked} has the {given} {value}?",
)


def draw_table(rng: random.Random, *, held_out: bool = False) -> Table:
    """A random table of the training part, or of the held-out part."""
    while True:
        schema = rng.choice(SCHEMAS)
        count = rng.randint(MIN_ROWS, MAX_ROWS)
        keys, labels = rng.sample(schema.keys, count), rng.sample(schema.labels, count)
        numbers = rng.sample(NUMBERS, count)
        first, second = rng.sample((schema.number, schema.label), 2)
        table = Table(schema, tuple(map(Row, keys, numbers, labels)), (first, second))
        if table.held_out == held_out:
            return table


def draw_question(rng: random.Random, table: Table) -> Question:
    """A random question about `table`: from the key to another column, or from that one to the key."""
    row = rng.choice(table.rows)
    given, asked = rng.sample((table.schema.key, rng.choice(table.columns)), 2)
    wording = rng.choice(BY_KEY if given == table.schema.key else BY_VALUE)
    text = wording.format(given=given, asked=asked, value=table.cell(row, given))
    return Question(table, row, given, asked, text)
