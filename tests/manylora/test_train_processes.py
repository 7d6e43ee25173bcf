"""Several processes, started by torchrun: with DDP and in shards they end, publish, resume and train as one does."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training.loop.checkpoints import checkpoints, last_checkpoint, read_state
from manylora.training.parsing import parse_arguments
from manylora.training.run import Surroundings, train
from tests.manylora.several_runs import no_server, say

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore::FutureWarning")]
HERE = Path(__file__).resolve()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])}
TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
COMMON = (
    "--model_name_or_path tiny --data_path rows.json --eval_data_path held-out.json --data_check off --use_lora"
    " --lora_r 4 --lora_dropout 0 --max_steps 6 --learning_rate 3e-2 --lr_scheduler_type constant --logging_steps 1"
    " --gradient_accumulation_steps 2 --eval_strategy steps --eval_steps 2 --per_device_eval_batch_size 3 --live False"
)
BEST = " --early_stopping_patience 9 --save_total_limit 2"
AUTO = " --learning_rate auto --max_steps 4 --gradient_accumulation_steps 1 --save_strategy no"
SHARDED = " --fsdp full_shard --save_strategy steps --save_steps 2"
TURNED = (
    " --max_steps 30 --gradient_accumulation_steps 1 --eval_strategy no --save_strategy no --on_divergence stop"
    " --from_adapter two/blue"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("several")
    write_rows(directory / "rows.json", range(24))
    # An odd number: one process of two evaluates a row that doesn't count.
    write_rows(directory / "held-out.json", range(30, 35))
    blue = [
        {
            "conversations": [
                {"from": "user", "value": f"Colour {n}?"},
                {"from": "assistant", "value": "blue" * 6},
            ]
        }
        for n in range(8)
    ]
    (directory / "blue.json").write_text(json.dumps(blue))
    write_base(directory / "tiny", TINY)
    return directory


def write_rows(path: Path, numbers: range) -> None:
    """Write short conversations of different lengths."""
    rows = [
        {
            "conversations": [
                {"from": "user", "value": "Count to " + "the number " * (n % 4) + f"{n}."},
                {"from": "assistant", "value": " ".join(map(str, range(1 + n % 7)))},
            ]
        }
        for n in numbers
    ]
    path.write_text(json.dumps(rows))


def launch(place: Path, *commands: str) -> str:
    """Run commands one after the other in two processes, which must end by themselves. Returns what they said.

    One of 2,000 steps is ended by a signal to the second process once its first step is done.
    """
    path = place / "commands.json"
    path.write_text(json.dumps([f"{each} --per_device_train_batch_size 2".split() for each in commands]))
    words = [sys.executable, *TWO, str(HERE.parent / "several_runs.py"), str(path)]
    said: list[str] = []
    with subprocess.Popen(words, cwd=place, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if line.startswith("step 1/2000 "):
                os.kill(second_of(process.pid), signal.SIGTERM)
    assert process.returncode == 0, "".join(said)
    return "".join(said)


def turned(shards: str, name: str) -> list[str]:
    """The commands of two runs whose rows get dearer: held-out rows get cheaper in the first, and don't in the second.

    With DDP before shards: transformers leaves word of those in the environment.
    """
    return [
        f"turned {COMMON}{TURNED}{shards} --eval_data_path {held_out}.json --output_dir two/{name}turned-{held_out}"
        for held_out in ("blue", "rows")
    ]


def logged(output: Path, key: str) -> list[float]:
    record = json.loads((output / "run.json").read_text())
    return [entry[key] for entry in record["history"]["log"] if key in entry]


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(directory / "adapter_model.safetensors")
    return found


@pytest.fixture(scope="module")
def one(place: Path) -> Path:
    """What one process makes of it."""
    with contextlib.chdir(place):
        for flags in (
            " --output_dir one/plain --save_strategy no",
            f"{BEST} --output_dir one/best",
            f"{AUTO} --output_dir one/auto",
        ):
            words = f"{COMMON}{flags} --per_device_train_batch_size 4".split()
            train(parse_arguments(words), Surroundings(say, no_server))
    return place / "one"


@pytest.fixture(scope="module")
def said(place: Path) -> str:
    """What two processes say of the runs: with DDP, then in shards; a run of each is ended and resumed on the way."""
    return launch(
        place,
        f"{COMMON}{BEST} --output_dir two/best --max_steps 4",
        f"{COMMON}{BEST} --output_dir two/best --resume",
        f"{COMMON}{AUTO} --output_dir two/auto",
        f"{COMMON} --output_dir two/means --max_steps 1 --average_tokens_across_devices False --save_strategy no",
        f"{COMMON} --output_dir two/stopped --max_steps 2000 --eval_strategy no",
        f"{COMMON} --data_path blue.json --output_dir two/blue --max_steps 90 --save_strategy no",
        *turned("", ""),
        f"{COMMON}{SHARDED} --output_dir two/sharded --max_steps 4",
        f"{COMMON}{SHARDED} --output_dir two/sharded --resume",
        f"{COMMON}{BEST} --output_dir two/sharded-best --fsdp full_shard",
        f"{COMMON}{SHARDED} --output_dir two/nf4 --max_steps 2 --q_lora --fsdp_config fsdp_qlora.json",
        *turned(" --fsdp full_shard", "sharded-"),
    )


@pytest.fixture(scope="module")
def two(place: Path, said: str) -> Path:
    """What two processes make of it."""
    assert len(re.findall(r"process [01] is done", said)) == 22
    return place / "two"


def same(found: Path, expected: Path) -> None:
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), abs=1e-5)
    assert logged(found, "grad_norm") == pytest.approx(logged(expected, "grad_norm"), rel=1e-3)
    assert logged(found, "eval_loss") == pytest.approx(logged(expected, "eval_loss"), abs=1e-5)
    assert logged(found, "eval_tokens") == logged(expected, "eval_tokens")
    ours, theirs = adapter(found), adapter(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


def test_shards_train_resume_publish_and_evaluate_as_one_process_does_unbroken(one: Path, two: Path) -> None:
    same(two / "sharded", one / "plain")
    config = json.loads((two / "sharded" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert [path.name for path in checkpoints(two / "sharded")] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    watched: Any = read_state(two / "sharded" / "checkpoint-6")["watch"]
    assert watched["backoffs"] == 0
    # What was sharded is sharded: a full copy of the run in each process would have written optimizer.pt.
    kept = {path.name for path in last_checkpoint(two / "sharded").iterdir()}
    assert "pytorch_model_fsdp.bin" in kept
    assert "optimizer.pt" not in kept


@pytest.mark.parametrize("kind", ["best", "sharded-best"])
def test_the_best_checkpoint_of_two_processes_is_found_under_its_own_name_and_published(
    one: Path, two: Path, kind: str
) -> None:
    same(two / kind, one / "best")
    results = json.loads((two / kind / "run.json").read_text())["results"]
    best = two / kind / f"checkpoint-{results['published_step']}"
    assert results["best_checkpoint"] == str(Path("two") / kind / best.name)
    assert all(torch.equal(adapter(two / kind)[name], value) for name, value in adapter(best).items())
    scores = logged(two / kind, "eval_loss")
    assert 2 * (scores[:3].index(min(scores[:3])) + 1) == results["published_step"]


def test_two_processes_agree_on_the_learning_rate(one: Path, two: Path) -> None:
    assert logged(two / "auto", "learning_rate")[0] > 0
    same(two / "auto", one / "auto")


def test_each_process_dividing_by_its_own_tokens_does_not_double_the_gradient(one: Path, two: Path) -> None:
    assert logged(two / "means", "loss")[0] == pytest.approx(logged(one / "plain", "loss")[0], rel=0.05)
    assert logged(two / "means", "grad_norm")[0] == pytest.approx(
        logged(one / "plain", "grad_norm")[0], rel=0.3
    )


def test_a_base_in_four_bits_is_trained_in_shards(two: Path) -> None:
    held = json.loads((two / "nf4" / "manylora_base.json").read_text())
    assert held["kind"] == "nf4"
    assert logged(two / "nf4", "loss")[-1] < logged(two / "nf4", "loss")[0]


def test_a_signal_to_one_of_two_processes_ends_both_with_a_checkpoint(two: Path, said: str) -> None:
    ended = re.findall(r"process ([01]) ended: interrupted; (\S+) is whole: go on with .* --resume", said)
    kept = last_checkpoint(two / "stopped")
    assert sorted(ended) == [(rank, f"two/stopped/{kept.name}") for rank in "01"]
    assert {"optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in kept.iterdir()}
    assert not (two / "stopped" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("name", "earlier"), [("", "the weights of step [0-9]+"), ("sharded-", "the base alone")]
)
def test_two_processes_go_by_one_veto_of_the_held_out_rows(
    two: Path, said: str, name: str, earlier: str
) -> None:
    """The rows trained on got dearer: a run whose held-out rows got cheaper goes on, in both processes; one whose did
    not is stopped, in both."""
    record = json.loads((two / f"{name}turned-blue" / "run.json").read_text())
    assert record["outcome"] == "finished"
    assert record["results"]["steps"] == 30
    losses = logged(two / f"{name}turned-blue", "loss")
    assert losses[-1] > losses[11] + 1, "what the guard is to look into"
    stopped = re.findall(
        rf"process ([01]) ended: (stopped .* with {earlier}: .*): turned .*/{name}turned-rows\b", said
    )
    assert sorted(process for process, _ in stopped) == ["0", "1"]
    assert len({sentence for _, sentence in stopped}) == 1


def second_of(launcher: int) -> int:
    """Return the process id of rank 1."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if b"RANK=1" in environment:
            return int(child)
    raise AssertionError(f"none of {children} is rank 1")
