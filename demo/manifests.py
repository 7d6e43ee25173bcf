"""`python -m manylora.demo.manifests`: has the demo's adapters and its base say which prompts are their own.

Writes manylora_adapter.json into adapters/NAME/ and base/ beside this file, or below the directory that is given.
"""

import argparse
import json
import random
from pathlib import Path

from manylora.demo.asking import BASE, PARTS, TOOLS, WORDED, request

FILE = "manylora_adapter.json"
EXAMPLES = 32
SEED = 5
DESCRIPTIONS = {
    "sql": "Answers a question about a table with the SQL query that finds the answer.",
    "json": "Answers a question about a table with a JSON object.",
    "pirate": "Answers a question about a table as a pirate says it.",
    TOOLS: "Calls the functions that a request offers.",
    BASE: "Answers a question about a table with a plain sentence.",
}


def write_manifests(folder: Path) -> None:
    """Write one for each adapter below ``folder``, and the base's."""
    rng = random.Random(SEED)
    for model in (*WORDED, TOOLS, BASE):
        drawn = (request(rng, model, PARTS[0])["messages"][0]["content"] for _ in range(EXAMPLES))
        told = {"description": DESCRIPTIONS[model], "examples": list(dict.fromkeys(drawn))}
        place = folder / "base" if model == BASE else folder / "adapters" / model
        (place / FILE).write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m manylora.demo.manifests", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: demo/")
    write_manifests(parser.parse_args().out)


if __name__ == "__main__":
    main()
