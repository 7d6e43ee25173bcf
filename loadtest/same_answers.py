"""Each way to train, on a real model, to the end: `python -m manylora.loadtest.same_answers BASE`.

For every method, by the commands that a user gives and that the commands before print: train, and answer held-out
questions before and after; train half of it, resume, and compare the adapter's bytes; serve base and adapter by the
last line of the training; merge by the defaults; answer with the merged model in transformers; serve it by the last
line of the merge. Prints how many answers were right each time and how many were the same. Exit status 1 if a method
learnt nothing, resumed otherwise, or answers otherwise once merged: more than 1 % fewer or more right answers.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from manylora.loadtest.gptq_copy import write_gptq_copy
from manylora.loadtest.server_process import command, environment_of_children, running, start_server
from manylora.loadtest.text_table import text_table

ADAPTER = "adapter_model.safetensors"
SERVE, COMMAND = "Serve it", "manylora serve "
"""The line may say of which step the adapter is before the command comes."""
TASK, LONGEST_ANSWER = "sql", 48
ALIKE = 0.01
"""Share of the questions by which the right answers may differ."""
AT_ONCE, GPTQ_GROUP = 16, 64
START_SECONDS = 1800.0
"""A machine that does other things too may take long to load a model."""
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
    Method("PiSSA", ("--use_lora", "--init_lora_weights", "pissa", *FIXED)),
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

    def faults(self) -> list[str]:
        """Return what is not as it must be."""
        room = ALIKE * self.questions
        found = ["resumed otherwise than unbroken"] if self.resumed is False else []
        if self.trained is not None and not self.trained > (self.before or 0):
            found.append("learnt nothing")
        steps = (("served", self.served), ("merged", self.merged), ("merged and served", self.merged_served))
        first = self.merged if self.trained is None else self.trained
        for name, right in steps:
            if right is not None and first is not None and abs(right - first) > room:
                found.append(f"{name}: {right} right, not {first}")
        return found


class Failed(SystemExit):
    """A command failed; with what it printed."""


def run(words: Sequence[str], log: Path) -> str:
    """Run a command of manylora and return what it printed. Raises Failed."""
    done = subprocess.run(
        command(*words), env=environment_of_children(), capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    log.write_text(said, encoding="utf-8")
    if done.returncode:
        raise Failed(f"manylora {shlex.join(words)} failed:\n{said}")
    return said


def train_words(job: Job, method: Method, output: Path) -> list[str]:
    """Return the words of the training."""
    base = job.gptq if method.on_gptq else job.base
    return [
        *("train", "--model_name_or_path", str(base), *method.flags, "--output_dir", str(output)),
        *("--data_path", str(job.data / f"{TASK}.json"), "--data_check", "off", "--bf16", "True"),
        *("--eval_data_path", str(job.data / f"{TASK}-eval.json"), "--report_to", "none"),
        *("--max_steps", str(job.steps), "--per_device_train_batch_size", str(job.batch)),
        *("--learning_rate", str(job.rate * method.rate)),
        *("--save_strategy", "steps", "--save_steps", str(job.steps // 2), "--no_live"),
    ]


def train(job: Job, method: Method, output: Path) -> tuple[str, dict[str, Any]]:
    """Train, unless it is done, and return what was said and run.json. DoRA can't be asked of the served base."""
    asked = ["--eval_answers", "exact", "--eval_answers_limit", str(job.questions)]
    asked += ["--eval_answers_max_new_tokens", str(LONGEST_ANSWER)]
    words = train_words(job, method, output) + ([] if "--use_dora" in method.flags else asked)
    log, record = output.with_suffix(".log"), output / "run.json"
    said = log.read_text(encoding="utf-8") if record.exists() else run(words, log)
    return said, json.loads(record.read_text(encoding="utf-8"))


def resumes(job: Job, method: Method, whole: Path, again: Path) -> bool:
    """Go on from the checkpoint in the middle of ``whole``; return whether the adapter is the same, byte by byte."""
    again.mkdir()
    shutil.copytree(whole / f"checkpoint-{job.steps // 2}", again / f"checkpoint-{job.steps // 2}")
    run([*train_words(job, method, again), "--resume"], again.with_suffix(".log"))
    return (again / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def serve_words(said: str) -> list[str] | None:
    """Return the words after ``manylora serve`` in the last line that says how; None if none does."""
    lines = [line.partition(COMMAND)[2] for line in said.splitlines() if SERVE in line and COMMAND in line]
    return shlex.split(lines[-1]) if lines else None


def ask(words: Sequence[str], model: str | None, questions: Sequence[str], place: Path) -> list[str]:
    """Serve as the words say and return the answers; ``model`` None asks for the base."""
    server = start_server(None, place, words)
    with (
        running(server, start_seconds=START_SECONDS),
        httpx.Client(base_url=server.url, timeout=START_SECONDS) as client,
    ):
        name = model or client.get("/v1/models").json()["data"][0]["id"]

        def answer(question: str) -> str:
            body = {"model": name, "messages": [{"role": "user", "content": question}], "temperature": 0}
            found = client.post("/v1/chat/completions", json={**body, "max_tokens": LONGEST_ANSWER})
            found.raise_for_status()
            return str(found.json()["choices"][0]["message"]["content"])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(answer, questions))


def by_transformers(directory: Path, questions: Sequence[str]) -> list[str]:
    """Return a merged model's answers without anything of this project but its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from manylora.adapters.tokenizer import load_tokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer: Any = load_tokenizer(directory)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    answers: list[str] = []
    for first in range(0, len(texts), AT_ONCE):
        batch = tokenizer(
            texts[first : first + AT_ONCE], add_special_tokens=False, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            made = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=LONGEST_ANSWER,
            )
        new = made[:, batch["input_ids"].shape[1] :]
        answers += map(str, tokenizer.batch_decode(new, skip_special_tokens=True))
    return answers


def right(answers: Sequence[str], expected: Sequence[str]) -> int:
    """Return how many answers are what was expected."""
    return sum(one.strip() == two.strip() for one, two in zip(answers, expected, strict=True))


def follow(job: Job, method: Method, place: Path, *, without_resume: bool) -> Outcome:
    """Take one method through all of it, in ``place``."""
    rows = json.loads((job.data / f"{TASK}-eval.json").read_text(encoding="utf-8"))[: job.questions]
    questions, expected = ([row["conversations"][turn]["value"] for row in rows] for turn in (0, 1))
    output, merged = place / "adapter", place / "merged"
    said, record = train(job, method, output)
    words = serve_words(said)
    answers = None if words is None else ask(words, output.name, questions, place / "served")
    shutil.rmtree(merged, ignore_errors=True)
    closing = run(["merge", "--adapter", str(output), "--output", str(merged)], place / "merge.log")
    of_merged = serve_words(closing)
    if of_merged is None:
        raise Failed(f"the merge doesn't say how to serve its result:\n{closing}")
    again = ask(of_merged, None, questions, place / "merged-served")
    scores = [record["evaluation"][when].get("eval_exact_match") for when in ("before", "after")]
    before, trained = (None if each is None else round(each * len(rows)) for each in scores)
    return Outcome(
        method.name,
        len(rows),
        before,
        trained,
        None if without_resume else resumes(job, method, output, place / "again"),
        None if answers is None else right(answers, expected),
        right(by_transformers(merged, questions), expected),
        right(again, expected),
        None if answers is None else sum(one == two for one, two in zip(answers, again, strict=True)),
    )


def report(outcomes: Sequence[Outcome]) -> str:
    """Return the table, a line for each method."""
    head = ("method", "before", "trained", "served", "merged", "merged, served", "same answers", "resumed")
    lines = []
    for each in outcomes:
        counts = (each.before, each.trained, each.served, each.merged, each.merged_served, each.same)
        cells = ["–" if count is None else str(count) for count in counts]
        lines.append((each.method, *cells, RESUMED[each.resumed]))
    return text_table(head, lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m manylora.loadtest.same_answers", description=__doc__)
    parser.add_argument("base", type=Path, help="a chat model's directory, 16 bits")
    parser.add_argument(
        "--methods", help=f"names by semicolons, of {'; '.join(each.name for each in METHODS)}"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--without-resume", action="store_true", help="leave out the resumed run")
    parser.add_argument(
        "--keep", type=Path, help="leave everything here; what was trained here before is taken"
    )
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    given = parser.parse_args()
    chosen = METHODS if given.methods is None else _chosen(given.methods)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = given.keep or Path(scratch)
        gptq, data = place / "gptq", place / "data"
        job = Job(given.base, gptq, data, given.steps, given.batch, given.rate, given.questions)
        _prepare(job, chosen)
        for number, method in enumerate(chosen):
            home = place / str(number)
            home.mkdir(parents=True, exist_ok=True)
            outcomes.append(follow(job, method, home, without_resume=given.without_resume))
            print(json.dumps(asdict(outcomes[-1])), file=sys.stderr, flush=True)  # noqa: T201  # the result
            if given.json is not None:
                given.json.write_text(json.dumps([asdict(each) for each in outcomes], indent=2) + "\n")
    print(report(outcomes))  # noqa: T201  # the result
    faults = [f"{each.method}: {fault}" for each in outcomes for fault in each.faults()]
    sys.exit("\n".join(faults) or None)


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
