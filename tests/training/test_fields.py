"""Every field of transformers' TrainingArguments: it has its effect, or it is refused with the reason."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from manylora.demo.task_data import write_tasks
from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training.errors import InvalidArgument
from manylora.training.fields import NEEDS, REFUSED
from manylora.training.job import Job, total_steps
from manylora.training.loop.loss import trained_token_loss
from manylora.training.loop.trainer import LoraTrainer
from manylora.training.parsing import parse_arguments
from manylora.training.preparation import Prepared, base_settings, prepare
from tests.training.loop.making import weights

ROWS = 20
LEAST = ["--data_path", "d.json", "--output_dir", "out", "--use_lora", "--eval_data_path", "e.json"]


@dataclass(frozen=True)
class Effect:
    """Flags, and what they make of a trainer."""

    words: str
    seen: Callable[[LoraTrainer], Any]
    expected: Any


def group(trainer: LoraTrainer) -> dict[str, Any]:
    group: dict[str, Any] = trainer.create_optimizer().param_groups[0]
    return group


def steps(trainer: LoraTrainer) -> int:
    return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


def rate_at(step: int) -> Callable[[LoraTrainer], float]:
    """The learning rate of the step after ``step``, of 100."""

    def rate(trainer: LoraTrainer) -> float:
        optimizer = trainer.create_optimizer()
        schedule = trainer.create_scheduler(100, optimizer)
        for _ in range(step):
            optimizer.step()  # moves nothing: there are no gradients
            schedule.step()
        return float(schedule.get_last_lr()[0])

    return rate


def batch_rows(trainer: LoraTrainer) -> int:
    return len(next(iter(trainer.get_train_dataloader()))["input_ids"])


def eval_batch_rows(trainer: LoraTrainer) -> int:
    return len(next(iter(trainer.get_eval_dataloader()))["input_ids"])


def moved(trainer: LoraTrainer) -> bool:
    """Whether training moves anything by more than the clipped gradient lets it."""
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    change = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
    return bool(change > 1e-5)


@torch.no_grad()
def smoothed(trainer: LoraTrainer) -> float:
    """By how much the loss differs from that without smoothing."""
    rows = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    trainer.model.eval()
    total, count = trained_token_loss(trainer.model, rows)
    return abs(float(trainer.compute_loss(trainer.model, rows)) - float(total) / count)


def logged(key: str) -> Callable[[LoraTrainer], list[int]]:
    """The steps at which ``key`` is logged."""

    def at(trainer: LoraTrainer) -> list[int]:
        trainer.train()
        return [entry["step"] for entry in trainer.state.log_history if key in entry]

    return at


def saved(trainer: LoraTrainer) -> list[str]:
    trainer.train()
    return sorted(path.name for path in Path(str(trainer.args.output_dir)).glob("checkpoint-*"))


def has_optimizer(trainer: LoraTrainer) -> bool:
    trainer.train()
    return any(Path(str(trainer.args.output_dir)).glob("checkpoint-*/optimizer.pt"))


def begins_with_the_first_rows(trainer: LoraTrainer) -> bool:
    batch = next(iter(trainer.get_train_dataloader()))["input_ids"]
    rows = [trainer.train_dataset[at]["input_ids"] for at in range(len(batch))]
    return all(ids[: len(row)].tolist() == list(row) for ids, row in zip(batch, rows, strict=True))


def passes_of_a_layer(trainer: LoraTrainer) -> int:
    """In two steps: two, and two more where activations are computed again."""
    passes: list[int] = []
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda *_: passes.append(1))
    trainer.train()
    handle.remove()
    trainer.model.activation_checkpointing_disable()
    return len(passes)


def first_row(trainer: LoraTrainer) -> int:
    """The number of the row that training begins with."""
    ids = next(iter(trainer.get_train_dataloader()))["input_ids"][0].tolist()
    rows = [list(each["input_ids"]) for each in trainer.train_dataset]
    return next(number for number, row in enumerate(rows) if ids[: len(row)] == row)


def drawn_first(seed: int) -> int:
    return int(torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[0])


def is_deterministic(_: LoraTrainer) -> bool:
    found = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    return found


def loader(name: str) -> Callable[[LoraTrainer], Any]:
    return lambda trainer: getattr(trainer.get_train_dataloader(), name)


def tokens_seen(trainer: LoraTrainer) -> bool:
    trainer.train()
    return bool(trainer.state.num_input_tokens_seen)


SHORT = "--max_steps 2 --per_device_train_batch_size 2 --save_strategy no"
EVERY = "--logging_strategy no"
OBSERVED = {
    "per_device_train_batch_size": Effect("--per_device_train_batch_size 3", batch_rows, 3),
    "per_device_eval_batch_size": Effect("--per_device_eval_batch_size 2", eval_batch_rows, 2),
    "num_train_epochs": Effect("--num_train_epochs 2 --per_device_train_batch_size 5", steps, 8),
    "max_steps": Effect("--max_steps 7", steps, 7),
    "gradient_accumulation_steps": Effect(
        "--num_train_epochs 1 --per_device_train_batch_size 5 --gradient_accumulation_steps 2", steps, 2
    ),
    "dataloader_drop_last": Effect(
        "--num_train_epochs 1 --per_device_train_batch_size 8 --dataloader_drop_last", steps, 2
    ),
    "learning_rate": Effect("--learning_rate 0.5", lambda trainer: group(trainer)["lr"], 0.5),
    "lr_scheduler_type": Effect("--lr_scheduler_type constant --learning_rate 0.5", rate_at(99), 0.5),
    "lr_scheduler_kwargs": Effect(
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":0.1} --learning_rate 0.5',
        rate_at(100),
        pytest.approx(0.1),
    ),
    "warmup_steps": Effect("--warmup_steps 0.1 --learning_rate 0.5", rate_at(5), pytest.approx(0.25)),
    "optim": Effect("--optim sgd", lambda trainer: type(trainer.create_optimizer()).__name__, "SGD"),
    "optim_args": Effect(
        "--optim sgd --optim_args momentum=0.75", lambda trainer: group(trainer)["momentum"], 0.75
    ),
    "weight_decay": Effect("--weight_decay 0.2", lambda trainer: group(trainer)["weight_decay"], 0.2),
    "adam_beta1": Effect("--adam_beta1 0.5", lambda trainer: group(trainer)["betas"][0], 0.5),
    "adam_beta2": Effect("--adam_beta2 0.5", lambda trainer: group(trainer)["betas"][1], 0.5),
    "adam_epsilon": Effect("--adam_epsilon 0.5", lambda trainer: group(trainer)["eps"], 0.5),
    "max_grad_norm": Effect(
        f"{SHORT} --optim sgd --learning_rate 1 --max_grad_norm 1e-6 --lr_scheduler_type constant",
        moved,
        False,
    ),
    "label_smoothing_factor": Effect(
        "--label_smoothing_factor 0.9", lambda trainer: smoothed(trainer) > 1e-4, True
    ),
    "bf16": Effect("--bf16", lambda trainer: trainer.accelerator.mixed_precision, "bf16"),
    "neftune_noise_alpha": Effect(
        "--neftune_noise_alpha 5", lambda trainer: trainer.neftune_noise_alpha, 5.0
    ),
    "logging_strategy": Effect(f"{SHORT} {EVERY} --logging_first_step False", logged("loss"), []),
    "logging_steps": Effect(f"{SHORT} --logging_steps 2 --logging_first_step False", logged("loss"), [2]),
    "logging_first_step": Effect(f"{SHORT} --logging_steps 2", logged("loss"), [1, 2]),
    "include_num_input_tokens_seen": Effect(
        f"{SHORT} --include_num_input_tokens_seen no", tokens_seen, False
    ),
    "eval_strategy": Effect(
        f"{SHORT} --eval_strategy epoch --max_steps -1 --num_train_epochs 1", logged("eval_loss"), [10]
    ),
    "eval_steps": Effect(f"{SHORT} --eval_strategy steps --eval_steps 1", logged("eval_loss"), [1, 2]),
    "eval_delay": Effect(
        f"{SHORT} --eval_strategy steps --eval_steps 1 --eval_delay 2", logged("eval_loss"), [2]
    ),
    "eval_on_start": Effect(f"{SHORT} --eval_on_start", logged("eval_loss"), [0]),
    "save_strategy": Effect("--max_steps 2 --save_strategy no", saved, []),
    "save_steps": Effect("--max_steps 3 --save_steps 2", saved, ["checkpoint-2", "checkpoint-3"]),
    "save_total_limit": Effect("--max_steps 3 --save_steps 1 --save_total_limit 1", saved, ["checkpoint-3"]),
    "save_only_model": Effect("--max_steps 1 --save_steps 1 --save_only_model", has_optimizer, False),
    "load_best_model_at_end": Effect(
        "--max_steps 2 --eval_strategy steps --eval_steps 1 --save_steps 1 --load_best_model_at_end",
        lambda trainer: bool(trainer.train() and trainer.state.best_model_checkpoint),
        True,
    ),
    "metric_for_best_model": Effect(
        "--max_steps 2 --eval_strategy steps --eval_steps 1 --save_strategy best --metric_for_best_model perplexity",
        lambda trainer: bool(trainer.train() and (trainer.state.best_metric or 0) > 2),
        True,
    ),
    "greater_is_better": Effect(
        "--max_steps 3 --learning_rate 1e-2 --eval_strategy steps --eval_steps 1 --save_strategy best"
        " --metric_for_best_model loss --greater_is_better",
        lambda trainer: trainer.train() and trainer.state.best_global_step,
        1,
    ),
    "activation_checkpointing": Effect(f"{SHORT} --activation_checkpointing", passes_of_a_layer, 4),
    "gradient_checkpointing": Effect(f"{SHORT} --gradient_checkpointing", passes_of_a_layer, 4),
    "seed": Effect("--seed 7", first_row, drawn_first(7)),
    "data_seed": Effect("--data_seed 7 --seed 3", first_row, drawn_first(7)),
    "full_determinism": Effect("--full_determinism", is_deterministic, True),
    "dataloader_pin_memory": Effect("--dataloader_pin_memory False", loader("pin_memory"), False),
    "skip_memory_metrics": Effect(
        f"{SHORT} --skip_memory_metrics False",
        lambda trainer: "train_mem_cpu_alloc_delta" in trainer.train().metrics,
        True,
    ),
    "train_sampling_strategy": Effect(
        "--train_sampling_strategy sequential --per_device_train_batch_size 2",
        begins_with_the_first_rows,
        True,
    ),
    "output_dir": Effect("--max_steps 1 --save_steps 1", lambda trainer: bool(saved(trainer)), True),
    "dataloader_num_workers": Effect("--dataloader_num_workers 2", loader("num_workers"), 2),
    "dataloader_prefetch_factor": Effect(
        "--dataloader_num_workers 1 --dataloader_prefetch_factor 3", loader("prefetch_factor"), 3
    ),
    "dataloader_persistent_workers": Effect(
        "--dataloader_num_workers 1 --dataloader_persistent_workers", loader("persistent_workers"), True
    ),
    "dataloader_in_order": Effect(
        "--dataloader_num_workers 1 --dataloader_in_order False", loader("in_order"), False
    ),
    "dataloader_multiprocessing_context": Effect(
        "--dataloader_num_workers 1 --dataloader_multiprocessing_context spawn",
        lambda trainer: trainer.get_train_dataloader().multiprocessing_context.get_start_method(),
        "spawn",
    ),
}
"""What this loop has a hand in: seen in a trainer, or in a run of a few steps."""

PASSED = {
    "activation_checkpointing_kwargs": (
        '--activation_checkpointing_kwargs {"use_reentrant":false}',
        {"use_reentrant": False},
    ),
    "gradient_checkpointing_kwargs": (
        '--gradient_checkpointing_kwargs {"use_reentrant":false}',
        {"use_reentrant": False},
    ),
    "average_tokens_across_devices": ("--average_tokens_across_devices False", False),
    "torch_empty_cache_steps": ("--torch_empty_cache_steps 3", 3),
    "log_on_each_node": ("--log_on_each_node False", False),
    "logging_nan_inf_filter": ("--logging_nan_inf_filter False", False),
    "log_level": ("--log_level error", "error"),
    "log_level_replica": ("--log_level_replica error", "error"),
    "disable_tqdm": ("--disable_tqdm", True),
    "report_to": ("--report_to tensorboard", ["tensorboard"]),
    "run_name": ("--run_name mine", "mine"),
    "prediction_loss_only": ("--prediction_loss_only", True),
    "push_to_hub": ("--push_to_hub", True),
    "hub_token": ("--hub_token abc", "abc"),
    "hub_model_id": ("--push_to_hub --hub_model_id a/b", "a/b"),
    "hub_private_repo": ("--push_to_hub --hub_private_repo", True),
    "hub_strategy": ("--push_to_hub --hub_strategy end", "end"),
    "hub_always_push": ("--push_to_hub --hub_always_push", True),
    "hub_revision": ("--push_to_hub --hub_revision main", "main"),
    "ignore_data_skip": ("--ignore_data_skip", True),
    "use_cpu": ("--use_cpu", True),
    "remove_unused_columns": ("--remove_unused_columns False", False),
    "ddp_find_unused_parameters": ("--ddp_find_unused_parameters", True),
    "ddp_bucket_cap_mb": ("--ddp_bucket_cap_mb 10", 10),
    "ddp_broadcast_buffers": ("--ddp_broadcast_buffers", True),
    "ddp_static_graph": ("--ddp_static_graph", True),
    "ddp_timeout": ("--ddp_timeout 60", 60),
    "do_train": ("--do_train", True),
    "do_eval": ("--do_eval", True),
}
"""What transformers, accelerate or the rooms beside the loop act on: it arrives as it was given."""

BY_OTHERS = {
    "accelerator_config": '--accelerator_config {"even_batches":false}',
    "debug": "--debug underflow_overflow",
    "fsdp": "--fsdp full_shard",
    "fsdp_config": "--fsdp full_shard --fsdp_config fsdp_qlora.json",
    "deepspeed": "--deepspeed ds_config_zero2.json",
    "fp16": "--fp16",
    "ddp_backend": "--ddp_backend gloo",
}
"""Taken, and settled with the devices and processes that there are (tests/training/test_parsing.py and beside)."""

SETTLED = {
    "resume_from_checkpoint": "tests/training/test_continuing.py",
    "local_rank": "refused unless it is the environment's",
    "tf32": "refused by transformers where there is no GPU for it",
    "use_liger_kernel": "refused without its package",
    "liger_kernel_config": "as use_liger_kernel",
    "project": "with --report_to trackio",
    "trackio_space_id": "with --report_to trackio",
    "trackio_bucket_id": "with --report_to trackio",
    "trackio_static_space_id": "with --report_to trackio",
}
"""Taken on conditions that don't hold here, or tested elsewhere."""


def test_every_field_is_honoured_or_refused() -> None:
    known = [*OBSERVED, *PASSED, *BY_OTHERS, *SETTLED, *REFUSED]
    assert sorted(known) == sorted(each.name for each in fields(TrainingArguments))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prepared]:
    place = tmp_path_factory.mktemp("fields")
    write_tasks(place, ROWS, 4)
    write_base(place / "tiny", TINY)
    arguments = parse_arguments(words_in(place, place / "out"))
    return place, prepare(arguments, lambda rows: total_steps(arguments.training, rows), lambda _: None)


def words_in(place: Path, out: Path, more: str = "") -> list[str]:
    base = f"--model_name_or_path {place / 'tiny'} --data_path {place / 'sql.json'} --use_lora --lora_r 4"
    rest = f"--eval_data_path {place / 'sql-eval.json'} --data_check off --output_dir {out}"
    return f"{base} {rest} {more}".split()


@pytest.mark.parametrize("name", OBSERVED)
def test_a_field_has_its_effect(name: str, prepared: tuple[Path, Prepared], tmp_path: Path) -> None:
    place, made = prepared
    effect = OBSERVED[name]
    arguments = parse_arguments(words_in(place, tmp_path / "out", effect.words))
    trainer = Job(arguments, replace(made)).trainer()
    assert effect.seen(trainer) == effect.expected
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


@pytest.mark.parametrize("name", PASSED)
def test_a_field_arrives_as_it_was_given(name: str, prepared: tuple[Path, Prepared]) -> None:
    words, expected = PASSED[name]
    arguments = parse_arguments([*LEAST, *words.split()])
    assert getattr(Job(arguments, prepared[1]).training_arguments(), name) == expected


@pytest.mark.parametrize("name", BY_OTHERS)
def test_a_field_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.training.distributed.find_spec", lambda _: None)
    assert name in parse_arguments([*LEAST, *BY_OTHERS[name].split()]).given | {
        "deepspeed",
        "fp16",
        "ddp_backend",
    }


OTHER = {
    "optim_target_modules": "all-linear",
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "eval_do_concat_batches": "False",
    "eval_accumulation_steps": "2",
    "include_for_metrics": "inputs",
    "parallelism_config": "x",
    "label_names": "labels",
    "length_column_name": "size",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_without_effect_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"--{name}"):
        parse_arguments([*LEAST, f"--{name}", OTHER.get(name, "True")])


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - OTHER.keys()))
def test_what_is_the_default_may_be_said(name: str) -> None:
    parse_arguments([*LEAST, f"--{name}", "False"])


@pytest.mark.parametrize("name", NEEDS)
def test_a_flag_that_says_how_needs_the_other(name: str) -> None:
    values = {"hub_strategy": "end", "hub_private_repo": "True", "hub_always_push": "True"}
    value = json.dumps({"rope": True}) if name == "liger_kernel_config" else values.get(name, "x")
    with pytest.raises(InvalidArgument, match="has no effect without"):
        parse_arguments([*LEAST, f"--{name}", value])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max_steps 0", "--max_steps 0"),
        ("--num_train_epochs 0", "above 0"),
        ("--per_device_train_batch_size 0", "from 1 up"),
        ("--gradient_accumulation_steps -1", "from 1 up"),
        ("--save_steps 0", "--save_steps 0: expected steps"),
        ("--logging_steps 0", "--logging_steps 0: expected steps"),
        ("--logging_steps -3", "--logging_steps -3: expected steps"),
        ("--eval_strategy steps --eval_steps 0", "--eval_steps 0: expected steps"),
        ("--eval_steps 2.5", "--eval_steps 2.5: expected steps"),
        ("--logging_steps few", "--logging_steps"),
        ("--save_total_limit 0", "--save_total_limit 0"),
        ("--neftune_noise_alpha -5", "--neftune_noise_alpha -5"),
        ("--optim adam", "--optim adam: expected one of .*'adamw_torch'"),
        ("--load_best_model_at_end --eval_strategy no", "to match.*Evaluation strategy: .*Save strategy"),
        ("--seed -1", "--seed -1"),
        ("--max_grad_norm -1", "from 0 up"),
        ("--label_smoothing_factor 2", "--label_smoothing_factor"),
        ("--optim galore_adamw", "factors are small"),
        ("--optim adamw_torch --optim_args momentum=0.9", "has no momentum"),
        ("--optim sgd --optim_args momentun=0.9", "has no momentun"),
        ("--optim sgd --optim_args weight_decay=0.9", "has no weight_decay"),
        ("--optim sgd --optim_args momentum", "NAME=VALUE"),
        ("--optim sgd --adam_beta2 0.9", "--adam_beta2"),
        ("--optim adafactor --adam_epsilon 0.1", "--adam_epsilon"),
        ("--adam_beta1 1.5", "--optim adamw_torch"),
        ("--lr_scheduler_type constant --warmup_steps 10", "no warm-up"),
        ("--lr_scheduler_type constant --warmup_ratio 0.1", "no warm-up"),
        ('--lr_scheduler_type linear --lr_scheduler_kwargs {"min_lr":1}', "min_lr"),
        ("--lr_scheduler_type cosine_with_min_lr", "min_lr"),
        ("--lr_scheduler_kwargs min_lr", "expected JSON"),
        ("--train_sampling_strategy by_length", "group_by_length"),
        ("--metric_for_best_model accuracy", "measures loss, perplexity"),
        ("--metric_for_best_model exact_match", "--eval_answers measures more"),
        ("--save_strategy best", "--metric_for_best_model"),
        ("--dataloader_persistent_workers", "num_workers"),
        ("--log_level loud", "loud"),
        ("--use_liger_kernel", "liger-kernel"),
        ("--tf32 True", "tf32|TF32"),
        ("--local_rank 1", "--local_rank"),
        ("--do_train False", "this command trains"),
        ('--accelerator_config {"split_batches":true}', "split_batches"),
        ("--accelerator_config nowhere.json", "nowhere.json"),
        ("--debug tpu_metrics_debug", "TPU"),
    ],
)
def test_what_would_fail_later_or_do_nothing_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as refused:
        parse_arguments([*LEAST, *words.split()])
    assert "\n" not in str(refused.value)


def test_an_evaluation_without_data_is_refused() -> None:
    least = ["--data_path", "d.json", "--output_dir", "out", "--use_lora"]
    for words in ("--eval_strategy epoch", "--eval_on_start", "--do_eval"):
        with pytest.raises(InvalidArgument, match="evaluation needs data"):
            parse_arguments([*least, *words.split()])


def test_the_cpu_that_was_asked_for_holds_the_base() -> None:
    assert str(base_settings(parse_arguments([*LEAST, "--use_cpu"])).device) == "cpu"
    without = parse_arguments(LEAST)
    without.training.use_cpu = False  # as where there is a GPU
    assert base_settings(without).device is None
