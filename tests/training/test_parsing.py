"""The flags: the guide's commands, transformers' own, old names, YAML, and what is refused."""

from pathlib import Path

import pytest

from manylora.training.errors import InvalidArgument
from manylora.training.parsing import parse_arguments

FIRST = (
    "--model_name_or_path Qwen/Qwen-7B --data_path your_training_data.json --bf16 True --output_dir output_lora"
    " --num_train_epochs 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 3e-4"
    " --model_max_length 1024 --use_lora --lora_r 64 --lora_alpha 16"
)
SECOND = (
    "--model_name_or_path Qwen/Qwen-7B-Chat-Int4 --data_path your_training_data.json --fp16 True"
    " --output_dir output_qlora --num_train_epochs 3 --per_device_train_batch_size 4"
    " --gradient_accumulation_steps 4 --learning_rate 2e-4 --use_lora --q_lora"
    " --deepspeed finetune/ds_config_zero2.json"
)
LEAST = "--data_path d.json --output_dir out --use_lora"


def test_the_guides_lora_command_is_read_word_for_word() -> None:
    found = parse_arguments(FIRST.split())
    assert found.model.model_name_or_path == "Qwen/Qwen-7B"
    assert found.data.data_path == ["your_training_data.json"]
    assert found.training.bf16
    assert found.training.per_device_train_batch_size == 2
    assert found.training.gradient_accumulation_steps == 8
    assert found.training.learning_rate == 3e-4
    assert found.training.model_max_length == 1024
    assert (found.lora.lora_r, found.lora.lora_alpha, found.lora.lora_dropout) == (64, 16, 0.05)


def test_the_guides_qlora_command_is_read_and_says_what_this_machine_does_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("manylora.training.distributed.find_spec", lambda _: None)
    found = parse_arguments(SECOND.split())
    assert found.lora.q_lora
    assert found.training.bf16
    assert not found.training.fp16
    said = " ".join(found.notes)
    assert "ZeRO has nothing to shard" in said
    assert "bf16 is used" in said


def test_defaults_are_those_of_qwens_script() -> None:
    found = parse_arguments(LEAST.split())
    lora = found.lora
    assert found.model.model_name_or_path == "Qwen/Qwen-7B"
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_bias) == (64, 16, 0.05, "none")
    assert lora.lora_target_modules == ["c_attn", "c_proj", "w1", "w2"]
    assert found.training.model_max_length == 8192
    assert found.training.optim == "adamw_torch"
    assert not found.data.lazy_preprocess


def test_several_processes_need_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("manylora.training.distributed.find_spec", lambda _: None)
    with pytest.raises(InvalidArgument, match=r"manylora\[deepspeed\]"):
        parse_arguments(SECOND.split())


def test_a_config_that_does_not_ship_is_refused_with_those_that_do() -> None:
    with pytest.raises(InvalidArgument, match=r"ds_config_zero2\.json"):
        parse_arguments([*LEAST.split(), "--deepspeed", "finetune/mine.json"])


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--warmup_ratio 0.01", "warmup_steps", 0.01),
        ("--evaluation_strategy steps --eval_steps 5", "eval_steps", 5),
        ("--lr_scheduler_type=cosine", "lr_scheduler_type", "cosine"),
        ("--learning-rate 1e-3", "learning_rate", 1e-3),
        ("--group_by_length True", "train_sampling_strategy", "group_by_length"),
    ],
)
def test_old_names_and_spellings_are_taken(words: str, name: str, value: object) -> None:
    assert getattr(parse_arguments([*LEAST.split(), *words.split()]).training, name) == value


def test_a_dropped_flag_is_said_and_not_refused() -> None:
    assert "safetensors" in " ".join(parse_arguments([*LEAST.split(), "--save_safetensors", "True"]).notes)


def test_what_yaml_takes_for_a_truth_value_is_the_word_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data_path: d.json\noutput_dir: out\nuse_lora: on\nguard: off\ndata_check: off\nsave_strategy: no\n"
    )
    found = parse_arguments([str(path)])
    assert (found.run.guard, found.data.data_check, found.training.use_lora) == ("off", "off", True)
    assert found.training.save_strategy == "no"
    path.write_text(path.read_text().replace("guard: off", "guard: on"))
    assert parse_arguments([str(path)]).run.guard == "on"


def test_the_guard_is_on_warn_or_off() -> None:
    assert parse_arguments(LEAST.split()).run.guard == "on"
    assert parse_arguments([*LEAST.split(), "--guard", "warn"]).run.guard == "warn"
    with pytest.raises(InvalidArgument, match="--guard"):
        parse_arguments([*LEAST.split(), "--guard", "maybe"])


def test_a_yaml_file_has_the_same_keys_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data_path: [a.json, b.json:0.5]\noutput_dir: out\nuse_lora: true\nlora_r: 8\nlearning_rate: 2e-4\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\n"
    )
    found = parse_arguments([str(path), "--lora_r", "16"])
    assert found.data.data_path == ["a.json", "b.json:0.5"]
    assert found.lora.lora_r == 16
    assert found.training.learning_rate == 2e-4
    assert found.training.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("words", "auto"),
    [
        ("--learning_rate auto", True),
        ("--learning_rate 1e-4 --learning_rate auto", True),
        ("--learning_rate auto --learning_rate 1e-4", False),
    ],
)
def test_the_last_learning_rate_counts(words: str, auto: bool) -> None:
    if auto:
        assert parse_arguments([*LEAST.split(), *words.split()]).learning_rate_auto
    else:
        found = parse_arguments([*LEAST.split(), *words.split()])
        assert not found.learning_rate_auto
        assert found.training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{LEAST} --lora_rr 8", "did you mean --lora_r"),
        (f"{LEAST} --lora_r many", "invalid int value"),
        (f"{LEAST} --lora_r 0", "from 1 up"),
        (f"{LEAST} --lora_dropout 1.5", "--lora_dropout"),
        (f"{LEAST} --learning_rate -1", "above 0"),
        (f"{LEAST} --lr_scheduler_type wavy", "wavy"),
        (f"{LEAST} --resume --from_adapter other", "two things|give one"),
        (f"{LEAST} --rank_schedule 4:0,8:0.5 --fsdp full_shard", "leave one of them out"),
        (f"{LEAST} --early_stopping_patience 3", "--eval_data_path"),
        (f"{LEAST} --load_best_model_at_end True", "save and eval strategy"),
        ("--data_path d.json --output_dir out", "add --use_lora"),
        ("--output_dir out --use_lora", "--data_path is missing"),
        ("--data_path d.json --use_lora", "--output_dir is missing"),
        ("missing.yaml", "can't be read"),
    ],
)
def test_what_can_not_be_run_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as refused:
        parse_arguments(words.split())
    assert "\n" not in str(refused.value)


def test_a_yaml_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(InvalidArgument, match="keys and values"):
        parse_arguments([str(path)])
