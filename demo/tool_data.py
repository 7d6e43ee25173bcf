"""Writes conversations that call functions as data for `manylora train`: `python -m manylora.demo.tool_data FILE`.

A row has `tools` and `messages` as OpenAI's fine-tuning takes them.
"""

import argparse
import json
import random
from pathlib import Path

from manylora.demo.conversations import draw_conversation


def write_conversations(path: Path, rows: int, seed: int = 0) -> None:
    """Write ``rows`` conversations, one a line."""
    rng = random.Random(seed)
    with path.open("w") as lines:
        for _ in range(rows):
            drawn = draw_conversation(rng)
            tools = {"tools": drawn.tools} if drawn.tools else {}
            lines.write(json.dumps({**tools, "messages": drawn.messages}) + "\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m manylora.demo.tool_data", description=__doc__)
    parser.add_argument("file", type=Path, help="its name ends in .jsonl")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_conversations(given.file, given.rows, given.seed)


if __name__ == "__main__":
    main()
