"""Each way to train, on a real model, to the end: `python -m manylora.loadtest.checks.same_answers BASE`.

For every method, by the commands that a user gives and that the commands before print: train, and answer held-out
questions before and after; train half of it, resume, and compare the adapter's bytes; serve base and adapter by the
last line of the training; merge by the defaults; answer with the merged model in transformers; serve it by the last
line of the merge. Prints how many answers were right each time and how many were the same, a line for each method as
soon as it is through. Exit status 1 if a method learnt nothing, resumed otherwise, or answers otherwise once merged:
more than 1 % fewer or more right answers.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manylora.loadtest.checks.model_answers import (
    ask,
    by_transformers,
    longest,
    on_other_form,
    right,
    serve_words,
)
from manylora.loadtest.material.gptq_copy import write_gptq_copy
from manylora.loadtest.material.server_process import command, environment_of_children

ADAPTER = "adapter_model.safetensors"
ALIKE = 0.01
"""Share of the questions by which the right answers may differ; by one always."""
GPTQ_GROUP = 64
TASKS = ("sql", "json", "pirate")
"""Of the demo. In sql nothing is looked up: the base learns it in fewer steps than tell the forms apart."""
RESUMED = {True: "to the bit", False: "otherwise", None: "–"}
FIXED = ("--lora_r", "16", "--lora_alpha", "32")


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train."""

    name: str
    flags: tuple[str, ...]
    on_gptq: bool = False
    rate: float = 1.0
    """Times the rate that was asked for."""


METHODS = (
    Method("LoRA, 16 bits", ("--use_lora", *FIXED)),
    Method("Q-LoRA, NF4", ("--q_lora", *FIXED)),
    Method("Q-LoRA, NF4 double", ("--q_lora", "--double_quant", *FIXED)),
    Method("Q-LoRA, GPTQ", ("--q_lora", *FIXED), on_gptq=True),
    Method("rank 4, 8, 16", ("--q_lora", "--rank_schedule", "4:0,8:0.3,16:0.6", "--lora_alpha", "8")),
    # Its factors start at 0, 0.02 and 0.02: at LoRA's rates it learns next to nothing in so few steps.
    Method(
        "AdaLoRA 12 to 8", ("--use_lora", "--rank_schedule", "adalora:12:8", "--lora_alpha", "24"), rate=10
    ),
    Method("rsLoRA", ("--use_lora", "--use_rslora", "--lora_r", "16", "--lora_alpha", "8")),
    # Its factors are large from the start, and so is what a step of the same length does.
    Method("PiSSA", ("--use_lora", "--init_lora_weights", "pissa", *FIXED), rate=0.3),
    Method("LoftQ", ("--q_lora", "--init_lora_weights", "loftq", *FIXED)),
    Method("DoRA", ("--use_lora", "--use_dora", *FIXED)),
)


@dataclass(frozen=True, slots=True)
class Job:
    """What all methods do."""

    base: Path
    gptq: Path
    data: Path
    steps: int
    batch: int
    rate: float
    questions: int
    task: str
    """Form of the answers."""
    resume: bool
    other_form: bool
    """Whether the adapter is asked on the other form of its base too."""

    def rows(self) -> tuple[list[str], list[str]]:
        """Return the held-out questions and the answers that are right."""
        found = json.loads((self.data / f"{self.task}-eval.json").read_text(encoding="utf-8"))
        turns = [[turn["value"] for turn in row["conversations"]] for row in found[: self.questions]]
        return [each[0] for each in turns], [each[1] for each in turns]

    def new_tokens(self) -> int:
        """Return how many tokens an answer may have: what the longest right one needs, its end included."""
        return longest(self.base, self.rows()[1]) + 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one method; right answers of so many questions, None where there are none."""

    method: str
    questions: int
    before: int | None
    """The base's."""
    trained: int | None
    """At the end of the training, as it says."""
    resumed: bool | None
    """Whether the resumed run gave the same bytes; None if it was left out."""
    served: int | None
    merged: int
    """The merged model's in transformers."""
    merged_served: int
    same: int | None
    """Answers of the merged model, served, that are those of base and adapter, served."""
    other_form: int | None = None
    """The adapter's on the other form of its base: NF4 if it was trained on 16 bits, 16 bits if on NF4."""

    def faults(self) -> list[str]:
        """Return what is not as it must be."""
        room = max(1, ALIKE * self.questions)
        found = ["resumed otherwise than unbroken"] if self.resumed is False else []
        steps = (("served", self.served), ("merged", self.merged), ("merged and served", self.merged_served))
        first = self.merged if self.trained is None else self.trained
        if not first > (self.before or 0):
            found.append("learnt nothing")
        for name, count in steps:
            if count is not None and abs(count - first) > room:
                found.append(f"{name}: {count} right, not {first}")
        return found


class Failed(SystemExit):
    """A command failed; with what it printed."""


def run(words: Sequence[str], log: Path) -> str:
    """Run a command of manylora and return what it printed. Raises Failed."""
    with log.open("wb") as output:
        done = subprocess.run(
            command(*words),
            env=environment_of_children(),
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    said = log.read_text(encoding="utf-8", errors="replace")
    if done.returncode:
        raise Failed(f"manylora {shlex.join(words)} failed:\n{said}")
    return said


def train_words(job: Job, method: Method, output: Path) -> list[str]:
    """Return the words of the training."""
    base = job.gptq if method.on_gptq else job.base
    return [
        *("train", "--model_name_or_path", str(base), *method.flags, "--output_dir", str(output)),
        *("--data_path", str(job.data / f"{job.task}.json"), "--data_check", "off", "--bf16", "True"),
        *("--eval_data_path", str(job.data / f"{job.task}-eval.json"), "--report_to", "none"),
        *("--max_steps", str(job.steps), "--per_device_train_batch_size", str(job.batch)),
        *("--learning_rate", str(job.rate * method.rate)),
        *("--save_strategy", "steps", "--save_steps", str(job.steps // 2), "--no_live"),
    ]


@dataclass(frozen=True, slots=True)
class Doors:
    """How commands are run and servers asked."""

    run: Callable[[Sequence[str], Path], str] = run
    ask: Callable[[Sequence[str], str | None, Sequence[str], int, Path], list[str]] = ask


def train(job: Job, method: Method, output: Path, doors: Doors) -> tuple[str, dict[str, Any]]:
    """Train, unless it is done, and return what was said and run.json."""
    asked = ["--eval_answers", "exact", "--eval_answers_limit", str(job.questions)]
    asked += ["--eval_answers_max_new_tokens", str(job.new_tokens())]
    words = train_words(job, method, output) + asked
    log, record = output.with_suffix(".log"), output / "run.json"
    said = log.read_text(encoding="utf-8") if record.exists() else doors.run(words, log)
    return said, json.loads(record.read_text(encoding="utf-8"))


def resumes(job: Job, method: Method, whole: Path, again: Path, doors: Doors) -> bool:
    """Go on from the checkpoint in the middle of ``whole``; return whether the adapter is the same, byte by byte."""
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(whole / f"checkpoint-{job.steps // 2}", again / f"checkpoint-{job.steps // 2}")
    doors.run([*train_words(job, method, again), "--resume"], again.with_suffix(".log"))
    return (again / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def follow(job: Job, method: Method, place: Path, doors: Doors) -> Outcome:
    """Take one method through all of it, in ``place``."""
    questions, expected = job.rows()
    output, merged = place / "adapter", place / "merged"
    said, record = train(job, method, output, doors)

    def answers(words: list[str] | None, model: str | None, where: str) -> list[str] | None:
        return None if words is None else doors.ask(words, model, questions, job.new_tokens(), place / where)

    words = serve_words(said)
    served = answers(words, output.name, "served")
    other = words if job.other_form and not method.on_gptq else None
    elsewhere = answers(None if other is None else on_other_form(other), output.name, "other-form")
    shutil.rmtree(merged, ignore_errors=True)
    closing = doors.run(["merge", "--adapter", str(output), "--output", str(merged)], place / "merge.log")
    again = answers(serve_words(closing), None, "merged-served")
    if again is None:
        raise Failed(f"the merge doesn't say how to serve its result:\n{closing}")
    scores = [record["evaluation"][when].get("eval_exact_match") for when in ("before", "after")]
    before, trained = (None if each is None else round(each * len(questions)) for each in scores)
    return Outcome(
        method.name,
        len(questions),
        before,
        trained,
        resumes(job, method, output, place / "again", doors) if job.resume else None,
        None if served is None else right(served, expected),
        right(by_transformers(merged, questions, job.new_tokens()), expected),
        right(again, expected),
        None if served is None else sum(one == two for one, two in zip(served, again, strict=True)),
        None if elsewhere is None else right(elsewhere, expected),
    )


HEAD = (
    "method",
    "before",
    "trained",
    "served",
    "other form",
    "merged",
    "merged, served",
    "same answers",
    "resumed",
)
WIDTHS = [max(len(method.name) for method in METHODS), *map(len, HEAD[1:-1]), max(map(len, RESUMED.values()))]


def line(cells: Sequence[str]) -> str:
    """Return a line of the table, aligned with all others."""
    placed = [cell.rjust(width) for cell, width in zip(cells[1:], WIDTHS[1:], strict=True)]
    return "  ".join([cells[0].ljust(WIDTHS[0]), *placed])


def report(outcome: Outcome) -> str:
    """Return a method's line."""
    counts = [outcome.before, outcome.trained, outcome.served, outcome.other_form, outcome.merged]
    counts += [outcome.merged_served, outcome.same]
    cells = ["–" if count is None else str(count) for count in counts]
    return line((outcome.method, *cells, RESUMED[outcome.resumed]))


def through(job: Job, method: Method, home: Path, doors: Doors = Doors()) -> Outcome:
    """Take one method through all of it unless that was done in ``home`` before. Raises Failed."""
    done, asked = home / "outcome.json", home / "job.json"
    home.mkdir(parents=True, exist_ok=True)
    wanted = {**{name: str(value) for name, value in asdict(job).items()}, "method": method.name}
    if asked.exists() and (before := json.loads(asked.read_text(encoding="utf-8"))) != wanted:
        other = [name for name in wanted if before.get(name) != wanted[name]]
        raise Failed(f"{home} is of another run ({', '.join(other)}): give another directory to --keep")
    asked.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    if done.exists():
        return Outcome(**json.loads(done.read_text(encoding="utf-8")))
    outcome = follow(job, method, home, doors)
    done.write_text(json.dumps(asdict(outcome), indent=1), encoding="utf-8")
    return outcome


def main() -> None:
    """Run the command."""
    given = _parser().parse_args()
    chosen = METHODS if given.methods is None else _chosen(given.methods)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = given.keep or Path(scratch)
        job = Job(
            *(given.base, place / "gptq", place / "data", given.steps, given.batch, given.rate),
            *(given.questions, given.task, not given.without_resume, given.other_form),
        )
        _prepare(job, chosen)
        print(line(HEAD), flush=True)  # noqa: T201  # the result
        for method in chosen:
            outcomes.append(through(job, method, place / str(METHODS.index(method))))
            print(report(outcomes[-1]), flush=True)  # noqa: T201  # the result
            if given.json is not None:
                given.json.write_text(json.dumps([asdict(each) for each in outcomes], indent=2) + "\n")
    faults = [f"{each.method}: {fault}" for each in outcomes for fault in each.faults()]
    sys.exit("\n".join(faults) or None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m manylora.loadtest.checks.same_answers", description=__doc__
    )
    parser.add_argument("base", type=Path, help="a chat model's directory, 16 bits")
    parser.add_argument(
        "--methods", help=f"names by semicolons, of {'; '.join(each.name for each in METHODS)}"
    )
    parser.add_argument("--task", choices=TASKS, default="json", help="form of the answers")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--without-resume", action="store_true", help="leave out the resumed run")
    parser.add_argument(
        "--other-form", action="store_true", help="ask the adapter on the other form of its base too"
    )
    parser.add_argument(
        "--keep", type=Path, help="leave everything here; what was done here before is not done again"
    )
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    return parser


def _chosen(names: str) -> tuple[Method, ...]:
    known = {method.name.replace(",", ""): method for method in METHODS}
    asked = [name.strip() for name in names.split(";")]
    missing = [name for name in asked if name.replace(",", "") not in known]
    if missing:
        raise SystemExit(f"no method {missing[0]!r}; there are {'; '.join(each.name for each in METHODS)}")
    return tuple(known[name.replace(",", "")] for name in asked)


def _prepare(job: Job, methods: Sequence[Method]) -> None:
    """Write the data and, if a method needs it, the GPTQ copy."""
    sizes = ("--rows", str(job.steps * job.batch), "--eval-rows", str(job.questions))
    subprocess.run([sys.executable, "-m", "manylora.demo.task_data", str(job.data), *sizes], check=True)
    if any(method.on_gptq for method in methods) and not job.gptq.exists():
        write_gptq_copy(job.base, job.gptq, group_size=GPTQ_GROUP)


if __name__ == "__main__":
    main()
