"""Four made-up tasks in plain English, to try ``model: "auto"`` on a base that understands it.

    python -m manylora.loadtest.lab.auto_tasks BASE OUT
    python -m manylora.loadtest.checks.auto BASE $(cat OUT/flags) --rows-of OUT/rows.jsonl

Writes an adapter of noise for each task, which brings examples, and rows whose wordings and words no example has: what
is tried is whose a prompt is, not how it is answered. ``--part trial`` draws from a third set, to choose by.
"""

import argparse
import json
import random
from pathlib import Path

from manylora.adapters.manifest import AdapterManifest, write_manifest
from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter

BASE = "base"
PARTS = ("examples", "trial", "held-out")
WORDS = {
    "examples": {
        "thing": ("chair", "lamp", "bicycle", "kettle", "jacket"),
        "place": ("Berlin", "Oslo", "Madrid", "Cairo"),
        "person": ("my boss", "a customer", "the landlord"),
        "line": ("The train leaves at seven.", "Where did you put the keys?", "My sister loves cats."),
    },
    "trial": {
        "thing": ("table", "printer", "camera", "tent", "blanket"),
        "place": ("Lisbon", "Dublin", "Vienna", "Lima"),
        "person": ("a supplier", "our tenant", "the bank"),
        "line": ("It has been raining all week.", "Can you hear the music?", "The soup is too cold."),
    },
    "held-out": {
        "thing": ("sofa", "keyboard", "watch", "backpack", "mirror"),
        "place": ("Prague", "Nairobi", "Toronto", "Hanoi"),
        "person": ("a colleague", "the insurance", "my neighbour"),
        "line": (
            "We will meet at the station.",
            "Who ate the last apple?",
            "The old bridge is closed today.",
        ),
    },
}
TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "sql": {
        "examples": (
            "Write a SQL query that lists all orders of a {thing} from {place}.",
            "SELECT the names of customers in {place} who bought more than {n} {thing}s.",
            "Given a table sales(item, city, amount), count the {thing}s that were sold in {place}.",
            "Which SQL statement deletes all rows of the table orders that are older than {n} days?",
        ),
        "trial": (
            "I need a query: the average price of a {thing} in {place}, from the table prices.",
            "How do I join the tables customers and orders to find who bought a {thing}?",
            "SQL for the top {n} cities by number of {thing}s sold, please.",
        ),
        "held-out": (
            "Give me a database query for the total revenue of {thing}s in {place}, table sales(item, city, revenue).",
            "Update the table stock so that every {thing} costs {n} more. What is the SQL?",
            "Show me a SELECT with GROUP BY that counts orders per city, without {place}.",
        ),
    },
    "french": {
        "examples": (
            "Translate into French: {line}",
            "How do you say '{line}' in French?",
            "French translation of this sentence, please: {line}",
            "Put the following into French. {line}",
        ),
        "trial": (
            "What is '{line}' in French?",
            "Please translate to French the sentence: {line}",
            "In French, how would I write: {line}",
        ),
        "held-out": (
            "I want to say '{line}' to somebody in Paris. Translate it.",
            "Give me the French for: {line}",
            "Can you turn this English sentence into a French one? {line}",
        ),
    },
    "maths": {
        "examples": (
            "A {thing} costs {n} euros. How much do {m} of them cost?",
            "If I drive {n} kilometres in {m} hours, what is my average speed?",
            "Tom has {n} coins and gives {m} of them away. How many are left?",
            "What is {n} percent of {m}?",
        ),
        "trial": (
            "A shop sells {n} {thing}s a day. How many does it sell in {m} days?",
            "Anna is {n} years old, her brother is {m} years older. How old are they together?",
            "I pay {n} euros with a note of {m}. How much change do I get?",
        ),
        "held-out": (
            "Each box holds {n} {thing}s and there are {m} boxes. How many {thing}s are there?",
            "A rectangle is {n} metres long and {m} metres wide. What is its area?",
            "A {thing} was {n} euros and is now {m} percent cheaper. What does it cost?",
        ),
    },
    "email": {
        "examples": (
            "Write a polite e-mail to {person} about a broken {thing}.",
            "Draft a message to {person} to cancel our meeting in {place}.",
            "I have to tell {person} that the {thing} will arrive late. Write the mail.",
            "Compose a short letter of thanks to {person} for the {thing}.",
        ),
        "trial": (
            "Write to {person} and ask for a refund for the {thing}.",
            "Help me with an e-mail to {person}: I can't come to {place}.",
            "A friendly reminder to {person} that the {thing} hasn't been paid, please write it.",
        ),
        "held-out": (
            "Can you write an e-mail in which I apologise to {person} for the damaged {thing}?",
            "Draft an answer to {person}, who invited me to {place}: I accept.",
            "I want to complain to {person} about the noise. Write a firm but friendly mail.",
        ),
    },
    BASE: {
        "examples": (),
        "trial": (
            "What can I see in {place} in two days?",
            "Why is the sky blue?",
            "Tell me a joke about a {thing}.",
            "Who invented the {thing}?",
        ),
        "held-out": (
            "Write a poem about a {thing} that wanted to see {place}.",
            "Describe the history of {place} in three sentences.",
            "What is the difference between a frog and a toad?",
            "Recommend a book for a long flight to {place}.",
        ),
    },
}
EXAMPLES = 16


def draw(rng: random.Random, task: str, part: str) -> str:
    """Draw a prompt."""
    words = {name: rng.choice(choices) for name, choices in WORDS[part].items()}
    return rng.choice(TASKS[task][part]).format(n=rng.randint(2, 90), m=rng.randint(2, 30), **words)


def write_adapters(base: Path, out: Path, seed: int) -> list[str]:
    """Write an adapter with examples for each task; return the flags that serve them."""
    rng, flags = random.Random(seed), list[str]()
    for task in TASKS:
        if task == BASE:
            continue
        directory = write_adapter(out / "adapters" / task, base, AdapterShape(rank=4, seed=len(flags)))
        examples = dict.fromkeys(draw(rng, task, PARTS[0]) for _ in range(EXAMPLES))
        write_manifest(directory, AdapterManifest(f"A task of {task}.", tuple(examples)))
        flags += ["--adapter", f"{task}={directory.resolve()}"]
    return flags


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=PARTS[1:], default=PARTS[-1])
    parser.add_argument("--rows", type=int, default=50, help="for each task")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "flags").write_text(" ".join(write_adapters(given.base, given.out, given.seed)))
    rng = random.Random(f"{given.part} {given.seed}")
    with (given.out / "rows.jsonl").open("w", encoding="utf-8") as rows:
        for task in TASKS:
            model = given.base.resolve().name if task == BASE else task
            for _ in range(given.rows):
                messages = [{"role": "user", "content": draw(rng, task, given.part)}]
                rows.write(json.dumps({"model": model, "messages": messages}) + "\n")


if __name__ == "__main__":
    main()
