"""How many planted faults `manylora data check` finds, and how many good rows it blames.

    python -m manylora.loadtest.checks.data_faults [--rows 50000] [--seed 1] [--share 0.02] [--keep DIR]

Writes a data set with 2 % of each kind of fault, and an evaluation file that shares rows with it, runs the command as
a user would and compares line by line. Of a fault that takes two rows (a copy and what it copies) either may be named.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from manylora.loadtest.checks.data_planting import FAULTS, edited, suits
from manylora.loadtest.material.data_texts import Row, clean_rows
from manylora.loadtest.material.text_table import text_table

OVERLAP = "overlap"
MAX_LENGTH = 1024
EVAL_ONLY = 500


@dataclass(slots=True)
class DataSet:
    """Files with faults in them, and where."""

    train: Path
    evaluation: Path
    planted: dict[str, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    """By kind, the lines of each fault."""
    clean: list[int] = field(default_factory=list)
    """Lines that have no part in any fault."""


@dataclass(frozen=True, slots=True)
class Score:
    """What was found of one kind."""

    kind: str
    planted: int
    found: int
    false_alarms: int

    @property
    def share(self) -> float:
        """Of the planted faults."""
        return self.found / self.planted if self.planted else 1.0


@dataclass(slots=True)
class _Line:
    text: str
    fault: int | None = None
    """The number of the fault that the line has a part in."""


def make_data_set(directory: Path, rows: int, share: float, seed: int) -> DataSet:
    """Write train.jsonl with `rows` lines and eval.jsonl."""
    rng = random.Random(seed)
    clean = clean_rows(rng)
    each = round(rows * share)
    kinds: list[str] = []
    lines: list[_Line] = []
    shared: list[str] = []
    by_task: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in islice(clean_rows(random.Random(seed + 1)), 2000):
        by_task[row.task, row.language.name].append(row)
    for kind, spoil in FAULTS.items():
        for row in islice((row for row in clean if suits(kind, row)), each):
            planted = spoil(row, by_task[row.task, row.language.name], rng)
            lines.append(_Line(planted.line, len(kinds)))
            if planted.beside:
                lines.append(_Line(row.as_json(), len(kinds)))
            kinds.append(kind)
    for row in islice(clean, each):
        shared.append((row if rng.random() < 0.5 else edited(row, rng)).as_json())
        lines.append(_Line(row.as_json(), len(kinds)))
        kinds.append(OVERLAP)
    lines += [_Line(row.as_json()) for row in islice(clean, max(rows - len(lines), 0))]
    rng.shuffle(lines)
    shared += [row.as_json() for row in islice(clean, EVAL_ONLY)]
    rng.shuffle(shared)
    made = DataSet(directory / "train.jsonl", directory / "eval.jsonl")
    made.train.write_text("".join(f"{line.text}\n" for line in lines), encoding="utf-8")
    made.evaluation.write_text("".join(f"{line}\n" for line in shared), encoding="utf-8")
    of_fault: dict[int, list[int]] = defaultdict(list)
    for number, line in enumerate(lines, 1):
        if line.fault is None:
            made.clean.append(number)
        else:
            of_fault[line.fault].append(number)
    for fault, numbers in of_fault.items():
        made.planted[kinds[fault]].append(tuple(numbers))
    return made


def found_lines(made: DataSet) -> Mapping[str, set[int]]:
    """Run the command; returns the lines of the training file by kind, but for mere information."""
    command = [
        sys.executable,
        "-m",
        "manylora",
        "data",
        "check",
        str(made.train),
        "--eval",
        str(made.evaluation),
    ]
    command += ["--max-length", str(MAX_LENGTH), "--json"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        finding["kind"]: set(finding["lines"].get(str(made.train), ()))
        for finding in json.loads(output)["findings"]
        if finding["severity"] != "info"
    }


def scores(made: DataSet, found: Mapping[str, set[int]]) -> Iterator[Score]:
    """Compare what was found with what was planted, kind by kind."""
    clean = set(made.clean)
    for kind, faults in made.planted.items():
        named = found.get(kind, set())
        hits = sum(any(line in named for line in lines) for lines in faults)
        yield Score(kind, len(faults), hits, len(named & clean))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 1 where the bar isn't met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--share", type=float, default=0.02, help="of the rows, for each kind of fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a directory in which the files stay")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        made = make_data_set(directory, options.rows, options.share, options.seed)
        began = time.perf_counter()
        found = found_lines(made)
        seconds = time.perf_counter() - began
    results = list(scores(made, found))
    clean, blamed = set(made.clean), set().union(*found.values())
    alarms = len(blamed & clean) / len(clean)
    rows = [
        (one.kind, f"{one.planted:,}", f"{one.found:,}", f"{one.share:.1%}", f"{one.false_alarms:,}")
        for one in results
    ]
    sys.stdout.write(text_table(("kind", "planted", "found", "share", "false alarms"), rows) + "\n")
    sys.stdout.write(
        f"{alarms:.2%} of {len(clean):,} good rows blamed; {options.rows:,} rows in {seconds:.1f} s\n"
    )
    return int(alarms > 0.01 or any(one.share < 0.95 for one in results))


if __name__ == "__main__":
    sys.exit(main())
