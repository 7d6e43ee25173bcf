"""Writes the demo's tasks as data files for `manylora train`: `python -m manylora.demo.task_data DIRECTORY`.

Each form of answer gets FORM.json in the format of Qwen's finetune.py, and FORM-eval.json whose tables are others.
"""

import argparse
import json
import random
from pathlib import Path

from manylora.demo.forms import FORMS
from manylora.demo.tables import draw_question, draw_table

EVAL_SEED = 1_000_003


def conversations(form: str, rows: int, seed: int) -> list[dict[str, object]]:
    """Return ``rows`` conversations of one question and its answer in ``form``, in Qwen's format."""
    rng = random.Random(seed)
    found: list[dict[str, object]] = []
    for index in range(rows):
        question = draw_question(rng, draw_table(rng))
        turns = [("user", question.prompt), ("assistant", FORMS[form](question))]
        found.append(
            {"id": f"{form}_{index}", "conversations": [{"from": who, "value": text} for who, text in turns]}
        )
    return found


def write_tasks(directory: Path, rows: int, eval_rows: int, seed: int = 0) -> list[Path]:
    """Write every form's two files. Returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for form in FORMS:
        for name, count, start in ((form, rows, seed), (f"{form}-eval", eval_rows, seed + EVAL_SEED)):
            path = directory / f"{name}.json"
            path.write_text(json.dumps(conversations(form, count, start), ensure_ascii=False, indent=1))
            written.append(path)
    return written


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m manylora.demo.task_data", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=2000, help="for training, of each task")
    parser.add_argument("--eval-rows", type=int, default=200, help="for evaluation, of each task")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_tasks(given.directory, given.rows, given.eval_rows, given.seed)


if __name__ == "__main__":
    main()
