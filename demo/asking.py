"""Requests that say in words which form their answer is to have, for the server's model "auto".

The adapters learnt one kind of question, each its own form of answer: from such a question nobody can tell whose it is.
So whoever leaves the choice to the server says what he wants. The wordings are of three parts that have none in common:
examples, which the adapters bring; those by which the server's way of choosing was chosen; and those it is held by.

    python -m manylora.demo.asking FILE --part held-out --rows 100 --seed 7

writes rows of ``{"model", "messages", "tools"?, "expected"?}``: whose a request is, and the right answer.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from manylora.demo.conversations import draw_exchanges
from manylora.demo.forms import FORMS
from manylora.demo.tables import draw_question, draw_table

BASE, TOOLS = "demo", "tools"
WORDED = ("sql", "json", "pirate")
PARTS = ("examples", "trial", "held-out")
WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "examples": {
        "sql": ("{} Answer in SQL.", "{} Write SQL.", "SQL: {}", "{}\nSQL:", "Give me the SQL. {}"),
        "json": ("{} Answer in JSON.", "{} Write JSON.", "JSON: {}", "{}\nJSON:", "Give me the JSON. {}"),
        "pirate": (
            "{} Answer as a pirate.",
            "{} Talk like a pirate.",
            "Pirate: {}",
            "{}\nPirate:",
            "Be a pirate. {}",
        ),
    },
    "trial": {
        "sql": (
            "{} As SQL.",
            "Which SQL finds it? {}",
            "{} I need the SQL query.",
            "Query in SQL: {}",
            "{} Say it in SQL.",
            "The SQL for this: {}",
            "{} Only the SQL, please.",
            "In SQL, please: {}",
        ),
        "json": (
            "{} As JSON.",
            "Which JSON holds it? {}",
            "{} I need a JSON object.",
            "Object in JSON: {}",
            "{} Say it in JSON.",
            "The JSON for this: {}",
            "{} Only JSON, please.",
            "In JSON, please: {}",
        ),
        "pirate": (
            "{} Like a pirate.",
            "Which pirate knows it? {}",
            "{} I need a pirate.",
            "Arr, pirate! {}",
            "{} Say it as a pirate.",
            "A pirate answers this: {}",
            "{} Only a pirate, please.",
            "Ask the pirate: {}",
        ),
    },
    "held-out": {
        "sql": (
            "{} Reply with an SQL statement.",
            "Turn this into SQL: {}",
            "{} (SQL)",
            "I want SQL for: {}",
        ),
        "json": (
            "{} Reply with a JSON object.",
            "Turn this into JSON: {}",
            "{} (JSON)",
            "I want JSON for: {}",
        ),
        "pirate": (
            "{} Reply the way a pirate would.",
            "Turn this into pirate speech: {}",
            "{} (pirate)",
            "I want a pirate's answer: {}",
        ),
    },
}


def request(rng: random.Random, model: str, part: str) -> dict[str, Any]:
    """Draw a request for a model; what isn't for examples is about tables and values that training never saw."""
    held_out = part != PARTS[0]
    if model == TOOLS:
        return _call(rng, held_out=held_out)
    question = draw_question(rng, draw_table(rng, held_out=held_out))
    worded = rng.choice(WORDINGS[part][model]) if model in WORDED else "{}"
    text = f"{question.table}\n\n{worded.format(question.text)}"
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "expected": FORMS[model if model in WORDED else "plain"](question),
    }


def _call(rng: random.Random, *, held_out: bool) -> dict[str, Any]:
    while True:
        functions, (exchange,) = draw_exchanges(rng, 1, held_out=held_out)
        if exchange.fits and exchange.at_once:
            tools = [each.tool for each in functions.values()]
            messages = [{"role": "user", "content": exchange.text}]
            return {"model": TOOLS, "messages": messages, "tools": tools}


def requests(part: str, rows: int, seed: int) -> list[dict[str, Any]]:
    """Return ``rows`` requests for each of the adapters and for the base."""
    rng = random.Random(f"{part} {seed}")
    return [request(rng, model, part) for model in (*WORDED, TOOLS, BASE) for _ in range(rows)]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m manylora.demo.asking", description=__doc__)
    parser.add_argument("file", type=Path, help="its name ends in .jsonl")
    parser.add_argument("--part", choices=PARTS, default=PARTS[-1])
    parser.add_argument("--rows", type=int, default=100, help="for each model")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    lines = (json.dumps(row) for row in requests(given.part, given.rows, given.seed))
    given.file.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
