"""How many processes and devices a run uses: what one process can't do is said, what shards can't do is refused."""

from pathlib import Path

import pytest
import torch

from manylora.training.arguments import TrainingArguments
from manylora.training.distributed import settle_processes
from manylora.training.errors import InvalidArgument
from manylora.training.parsing import parse_arguments
from tests.training.loop.making import items, losses, make_trainer, tiny_base

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LEAST = "--data_path data.json --output_dir out --use_lora"


def test_of_several_visible_gpus_one_process_trains_on_one_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    (note,) = settle_processes(TrainingArguments(str(tmp_path)))
    assert note.startswith(
        "4 GPUs are visible and one process trains on one of them: torchrun --nproc_per_node 4"
    )
    assert settle_processes(TrainingArguments(str(tmp_path), use_cpu=True)) == []


def test_a_run_that_sees_several_gpus_is_no_data_parallel(tmp_path: Path) -> None:
    one = make_trainer(tiny_base(tmp_path), tmp_path / "one", items(24))
    one.train()
    several = make_trainer(tiny_base(tmp_path), tmp_path / "several", items(24))
    several.args._n_gpu = 4  # as transformers counts them
    assert several.args.n_gpu == 1
    assert several.args.train_batch_size == one.args.train_batch_size
    several.train()
    assert losses(several) == losses(one)
    assert not isinstance(several.model_wrapped, torch.nn.DataParallel)


def test_fsdp_of_one_process_is_left_out_with_a_sentence() -> None:
    arguments = parse_arguments([*LEAST.split(), "--fsdp", "full_shard", "--fsdp_config", "fsdp_qlora.json"])
    assert not arguments.training.fsdp
    assert any("nothing to shard" in note for note in arguments.notes)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--learning_rate auto", "trials on one model"),
        ("--init_lora_weights pissa", "keeps its start beside the base"),
        ("--rank_schedule 4:0,8:0.5", "leave one of them out"),
        ("--gradient_checkpointing --fsdp_config fsdp_qlora.json", "leave the flag out"),
        ('--fsdp_config {"version":1}', "take version 2"),
    ],
)
def test_what_does_not_go_with_shards_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, words: str, reason: str
) -> None:
    monkeypatch.setattr("manylora.training.distributed.world_size", lambda: 2)
    with pytest.raises(InvalidArgument, match=reason):
        parse_arguments([*LEAST.split(), "--fsdp", "full_shard", *words.split()])
