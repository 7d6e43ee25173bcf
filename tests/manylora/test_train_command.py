"""`manylora train` as a user runs it: the guide's two commands, several processes, resuming, and bad input."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from manylora.cli import app
from manylora.demo.task_data import write_tasks
from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.loadtest.material.gptq_copy import write_gptq_copy
from manylora.served_generation import ServedBase, ServedGeneration
from manylora.training import load_finetuned_model
from manylora.training.bases.load import BaseSettings, load_base
from manylora.training.bases.targets import choose_targets
from manylora.training.loop.checkpoints import last_checkpoint, step_of

DEMO = Path(__file__).resolve().parents[2] / "demo" / "base"
ROWS = 48
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
}
LORA = (
    "--bf16 True --output_dir output_lora --num_train_epochs 3 --per_device_train_batch_size 2"
    " --gradient_accumulation_steps 8 --learning_rate 3e-4 --model_max_length 1024 --use_lora --lora_r 64"
    " --lora_alpha 16"
)
QLORA = (
    "--fp16 True --output_dir output_qlora --num_train_epochs 3 --per_device_train_batch_size 4"
    " --gradient_accumulation_steps 4 --learning_rate 2e-4 --use_lora --q_lora"
    " --deepspeed finetune/ds_config_zero2.json"
)


def run(words: str, cwd: Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a user would, on one thread."""
    several = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [sys.executable, *(several if processes > 1 else []), "-m", "manylora", *words.split()]
    return subprocess.run(
        command,
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def told(words: str, cwd: Path) -> Result:
    """Run the command here, where what is told doesn't hang on a process: one imports for longer than it trains."""
    with contextlib.chdir(cwd):
        return CliRunner().invoke(app, words.split())


def losses(output: Path) -> list[float]:
    record = json.loads((output / "run.json").read_text())
    return [entry["loss"] for entry in record["history"]["log"] if "loss" in entry]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train")
    write_tasks(directory, ROWS, 8)
    write_base(directory / "tiny", TINY)
    write_gptq_copy(DEMO, directory / "demo-Int4", group_size=64)
    return directory


def served(base: ServedBase, adapter: Path, conversations: list[list[dict[str, str]]]) -> list[str]:
    with ServedGeneration(base) as generate:
        return generate(conversations, adapter, 24)


def by_transformers(adapter: Path, base: Path, conversations: list[list[dict[str, str]]]) -> list[str]:
    model, tokenizer = load_finetuned_model(adapter, base=str(base), dtype=torch.float32)
    answers = []
    for conversation in conversations:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        made = model.generate(input_ids=ids, do_sample=False, max_new_tokens=24)
        answers.append(str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)))
    return answers


def serve_line(said: str) -> list[str]:
    """The words after `manylora serve` in the run's last line."""
    [line] = [line for line in said.splitlines() if "Serve it" in line]
    command = shlex.split(line[line.index("manylora serve ") :])
    assert command[:2] == ["manylora", "serve"]
    return command[2:]


def of_merged(adapter: Path, output: Path, conversations: list[list[dict[str, str]]]) -> list[str]:
    """Merge by the defaults, and answer as a server does that is told nothing."""
    result = CliRunner(env={"COLUMNS": "300"}).invoke(
        app, ["merge", "--adapter", str(adapter), "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    assert "as in training" in result.stdout
    assert serve_line(result.stdout) == [str(output)]
    with ServedGeneration(ServedBase(output)) as generate:
        return generate(conversations, None, 24)


def questions(place: Path) -> list[list[dict[str, str]]]:
    rows = json.loads((place / "sql-eval.json").read_text())
    return [[{"role": "user", "content": row["conversations"][0]["value"]}] for row in rows[:4]]


def test_the_guides_lora_command_gives_an_adapter_that_is_served(place: Path) -> None:
    done = run(f"train --model_name_or_path {DEMO} --data_path sql.json {LORA}", place)
    assert done.returncode == 0, done.stderr
    output = place / "output_lora"
    adapter = f"output_lora={output.resolve()}"
    assert serve_line(done.stderr) == [str(DEMO), "--quantization", "none", "--adapter", adapter]
    asked = questions(place)
    answers = served(ServedBase(DEMO, quantization="none", dtype="float32"), output, asked)
    assert answers == by_transformers(output, DEMO, asked)
    assert answers == of_merged(output, place / "lora_merged", asked)
    record = json.loads((output / "run.json").read_text())
    unread = f"sql.json: fields that were not read: id ({ROWS} rows)."
    assert unread in record["data"]["sentences"]
    assert unread in (output / "report.html").read_text()
    assert record["results"]["steps"] == 9
    assert record["results"]["adapter"] == str(output.resolve())
    memory = record["memory"]
    assert sum(memory["planned"].values()) == pytest.approx(memory["measured_peak_gib"], rel=0.12)
    assert "<html" in (output / "report.html").read_text()


def test_the_guides_qlora_command_trains_on_a_gptq_base_that_is_served(place: Path) -> None:
    base = place / "demo-Int4"
    done = run(f"train --model_name_or_path {base} --data_path sql.json {QLORA}", place)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "ZeRO has nothing to shard" in said
    assert "bf16 is used" in said
    output = place / "output_qlora"
    assert json.loads((output / "run.json").read_text())["base"]["kind"] == "gptq"
    asked = questions(place)
    assert served(ServedBase(base, dtype="float32"), output, asked) == by_transformers(output, base, asked)


def test_an_adapter_trained_in_nf4_answers_the_same_served_and_in_transformers(place: Path) -> None:
    flags = (
        f"train --model_name_or_path {DEMO} --data_path sql.json --output_dir nf4 --use_lora --q_lora --lora_r 8"
        " --max_steps 30 --learning_rate 3e-3 --per_device_train_batch_size 8 --data_check off"
    )
    done = told(flags, place)
    assert done.exit_code == 0, done.stderr
    asked = questions(place)
    base = ServedBase(DEMO, dtype="float32")
    answers = served(base, place / "nf4", asked)
    assert all(answer.startswith("SELECT") for answer in answers)
    assert answers == by_transformers(place / "nf4", DEMO, asked)
    assert answers == of_merged(place / "nf4", place / "nf4_merged", asked)


def test_answers_of_the_served_base_judge_a_run_and_end_it_early(place: Path) -> None:
    flags = (
        f"train --model_name_or_path {DEMO} --data_path sql.json --eval_data_path sql-eval.json --output_dir judged"
        " --use_lora --q_lora --lora_r 4 --max_steps 8 --learning_rate 1e-6 --per_device_train_batch_size 4"
        " --eval_strategy steps --eval_steps 2 --early_stopping_patience 1 --eval_answers exact --eval_answers_limit 4"
        " --eval_answers_max_new_tokens 24 --data_check off"
    )
    done = told(flags, place)
    assert done.exit_code == 0, done.stderr
    record = json.loads((place / "judged" / "run.json").read_text())
    # At such a rate no answer changes: scores stay equal, and the loss hardly falls, so patience may end at any step.
    assert record["evaluation"]["before"] == {"eval_exact_match": 0.0}
    assert set(record["evaluation"]["after"]) == {"eval_exact_match"}
    assert record["evaluation"]["samples"][0]["expected"].startswith("SELECT")
    assert record["results"]["best_checkpoint"]
    logged = [entry for entry in record["history"]["log"] if "eval_exact_match" in entry]
    assert logged[0]["eval_perplexity"] > 1
    assert serve_line(done.stderr) == [str(DEMO), "--adapter", f"judged={(place / 'judged').resolve()}"]


SMALL = (
    "train --model_name_or_path tiny --data_path sql.json --data_check off --use_lora --max_steps 4"
    " --learning_rate 1e-3 --lora_dropout 0 --rank_schedule 4:0,8:0.5 --logging_steps 1"
)


def test_two_processes_train_as_one_does_with_the_same_global_batch(place: Path) -> None:
    alone = "--output_dir alone --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    both = "--output_dir both --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    one, two = run(f"{SMALL} {alone}", place), run(f"{SMALL} {both}", place, processes=2)
    assert one.returncode == 0, one.stderr
    assert "[transformers]" not in one.stderr
    assert two.returncode == 0, two.stderr
    assert losses(place / "both") == pytest.approx(losses(place / "alone"), abs=1e-5)
    first, second = (load_file(place / name / "adapter_model.safetensors") for name in ("alone", "both"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_resumed_run_ends_as_the_unbroken_one(place: Path) -> None:
    saving = "--save_strategy steps --save_steps 3 --per_device_train_batch_size 4 --output_dir whole"
    whole = told(f"{SMALL} {saving}", place)
    assert whole.exit_code == 0, whole.stderr
    expected = (place / "whole" / "adapter_model.safetensors").read_bytes()
    # What a kill after the checkpoint leaves: no adapter, no report.
    for name in ("adapter_config.json", "adapter_model.safetensors", "run.json", "report.html"):
        (place / "whole" / name).unlink()
    newest = place / "whole" / "checkpoint-4"
    newest.rename(place / "checkpoint-4")
    again = told(f"{SMALL} {saving} --resume", place)
    assert again.exit_code == 0, again.stderr
    assert (place / "whole" / "adapter_model.safetensors").read_bytes() == expected
    assert len(losses(place / "whole")) == 4


def test_ctrl_c_ends_a_run_with_a_checkpoint_that_is_gone_on_from(place: Path) -> None:
    words = f"{SMALL} --output_dir stopped --max_steps 2000".split()
    with subprocess.Popen(
        [sys.executable, "-m", "manylora", *words],
        cwd=place,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        # The first line about a step comes when the first step is done.
        before = next(line for line in process.stderr if line.startswith("step "))
        process.send_signal(signal.SIGINT)
        said = before + process.stderr.read()
    assert process.returncode == 2, said
    assert "--resume" in said
    assert "Traceback" not in said
    kept = last_checkpoint(place / "stopped")
    assert not (place / "stopped" / "adapter_config.json").exists()
    steps = step_of(kept) + 2
    again = run(f"{SMALL} --output_dir stopped --max_steps {steps} --resume", place)
    assert again.returncode == 0, again.stderr
    assert "[transformers]" not in again.stderr, "it compares steps between logs that this run's flags say"
    assert len(losses(place / "stopped")) == steps


def refused(words: str, place: Path, *parts: str) -> None:
    """The command ends in one line and status 2, and has written nothing."""
    before = sorted(place.rglob("*"))
    done = told(words, place)
    lines = [line for line in done.stderr.splitlines() if line.startswith("manylora:")]
    assert done.exit_code == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0]
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--data_path sql.json --use_lora --output_dir new --lora_rank 8", ("--lora_rank", "--lora_r")),
        (
            "--data_path none.json --use_lora --output_dir taken --model_name_or_path tiny",
            ("taken", "--resume"),
        ),
        ("--data_path sql.json --use_lora --output_dir new --model_name_or_path ./nowhere", ("nowhere",)),
    ],
)
def test_bad_input_is_one_line_and_status_2(place: Path, words: str, parts: tuple[str, ...]) -> None:
    (place / "taken").mkdir(exist_ok=True)
    (place / "taken" / "adapter_config.json").write_text("{}")
    refused(f"train {words}", place, *parts)


def test_a_broken_data_file_is_named_with_its_line(place: Path) -> None:
    (place / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    done = told("train --model_name_or_path tiny --data_path bad.jsonl --use_lora --output_dir none", place)
    assert done.exit_code == 2
    assert "bad.jsonl:2" in done.stderr
    assert not (place / "none").exists()


def test_the_first_qwen_is_refused_with_what_to_take_instead(place: Path) -> None:
    first = place / "first-qwen"
    first.mkdir(exist_ok=True)
    (first / "config.json").write_text(
        json.dumps({"model_type": "qwen", "architectures": ["QWenLMHeadModel"]})
    )
    done = told(
        f"train --model_name_or_path {first} --data_path sql.json --use_lora --output_dir none2",
        place,
    )
    assert done.exit_code == 2
    assert "Qwen2.5" in done.stderr
    assert "--trust_remote_code" in done.stderr


def test_help_lists_the_guides_flags_and_ours(place: Path) -> None:
    said = told("train --help", place).stdout
    for flag in ("--lora_r", "--model_max_length", "--rank_schedule", "--deepspeed", "--auto_fit"):
        assert flag in said
    assert "--ddp_timeout" not in said


@pytest.mark.parametrize(
    ("words", "flag"), [("train sweep --help", "--sweep_ranks"), ("train --help-all", "--ddp_timeout")]
)
def test_each_command_has_a_help_of_its_own(words: str, flag: str) -> None:
    said = CliRunner().invoke(app, words.split())
    assert said.exit_code == 0
    assert said.output.count(f"  {flag} ") == 1


def test_nobody_who_named_no_module_reads_of_the_first_qwens(place: Path) -> None:
    targets, notes = choose_targets(load_base(BaseSettings(str(place / "tiny"))).model, ())
    assert "q_proj" in targets
    assert notes == ()
    done = told(f"{SMALL} --output_dir unnamed --max_steps 1", place)
    assert done.exit_code == 0, done.stderr
    assert "c_attn" not in done.stderr
    assert "first Qwen" not in done.stderr
