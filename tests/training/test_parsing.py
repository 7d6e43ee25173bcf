"""The flags: the guide's commands, transformers' own, old names, YAML, and what is refused."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from manylora.training.arguments import ARGUMENT_CLASSES
from manylora.training.errors import InvalidArgument
from manylora.training.fields import REFUSED
from manylora.training.parser import make_parser
from manylora.training.parsing import parse_arguments
from manylora.training.tasks.plan import read_tasks

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


def test_the_default_base_is_one_that_can_be_trained() -> None:
    assert parse_arguments(LEAST.split()).model.model_name_or_path == "Qwen/Qwen2.5-7B-Instruct"


def test_defaults_are_those_of_qwens_script() -> None:
    found = parse_arguments(LEAST.split())
    lora = found.lora
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_bias) == (64, 16, 0.05, "none")
    assert lora.lora_target_modules == []  # which is every layer of the blocks, as the script's own names are
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
        ("--evaluation_strategy steps --eval_steps 5 --eval_share 0.1", "eval_steps", 5),
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
        "data_path: d.json\noutput_dir: out\nuse_lora: true\nguard: off\ndata_check: off\nsave_strategy: no\n"
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
        (f"{LEAST} --lora_r {'9' * 5000}x", r"^.{0,450}$"),
        (f"{LEAST} --rank_schedule soon", "isn't a stage"),
        (f"{LEAST} --rank_schedule adalora:8", "expected adalora:FIRST_RANK"),
        (f"{LEAST} --lora_dropout 1.5", "--lora_dropout"),
        (f"{LEAST} --learning_rate -1", "above 0"),
        (f"{LEAST} --lr_scheduler_type wavy", "wavy"),
        (f"{LEAST} --from_adapter one --lora_weight_path other", "name two adapters"),
        (f"{LEAST} --from_adapter one --init_lora_weights pissa", "begins with one that is there"),
        (f"{LEAST} --deepspeed --bf16", "--deepspeed takes one value"),
        (f"{LEAST} --fsdp full_shard --fsdp_config", "--fsdp_config takes one value"),
        (f"{LEAST} --group_by_length often", "expected true or false"),
        (f"{LEAST} --save_safetensors True more", "takes one value"),
        (f"{LEAST} --warmup_ratio 1.5", "expected a share"),
        (f"{LEAST} --eval_answers_limit 5", "no effect without --eval_answers"),
        (f"{LEAST} --route_examples 33", "--route_examples 33: expected 0, for none, to 32"),
        (f"{LEAST} --route_examples -1", "--route_examples -1: expected 0"),
        (f"{LEAST} --description {'x' * 1001}", "--description has 1001 characters: at most 1000"),
        (f"{LEAST} --warmup_ratio much", "expected a number"),
        (f"{LEAST} --config a.yaml --config b.yaml", "given twice"),
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


OLD = ("--group_by_length", "--save_safetensors", "--jit_mode_eval", "--logging_dir", "--no_cuda")
NEXT = {"--packing": "packing", "--q_lora": "q_lora", "--lazy_preprocess": "lazy_preprocess"}


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("following", NEXT)
@pytest.mark.parametrize("value", ["", "=True"])
def test_an_old_flag_neither_swallows_nor_drops_the_next(old: str, following: str, value: str) -> None:
    found = parse_arguments([*LEAST.split(), f"{old}{value}", following])
    part = found.lora if following == "--q_lora" else found.data
    assert getattr(part, NEXT[following]) is True
    assert (found.training.train_sampling_strategy == "group_by_length") == (old == "--group_by_length")


@pytest.mark.parametrize(
    "name", ["gradient_checkpointing", "ddp_static_graph", "disable_tqdm", "hub_always_push", "bf16"]
)
@pytest.mark.parametrize("following", ["", " --packing"])
def test_every_switch_is_on_without_a_value(name: str, following: str) -> None:
    found = parse_arguments([*LEAST.split(), "--push_to_hub", *f"--{name}{following}".split()])
    assert getattr(found.training, name) is True


@pytest.mark.parametrize(
    ("words", "steps", "said"),
    [
        ("--warmup_ratio 0.5 --warmup_steps 0", 0.5, False),
        ("--warmup_steps 0 --warmup_ratio 0.5", 0.5, False),
        ("--warmup_steps 20 --warmup_ratio 0.5", 20, True),
        ("--warmup_ratio 0.5 --warmup_steps 20", 20, True),
        ("--warmup_ratio 0 --warmup_steps 20", 20, False),
        ("--warmup_ratio 0.2 --warmup_ratio 0.3", 0.3, False),
    ],
)
def test_a_share_of_warm_up_is_lost_to_steps_alone(words: str, steps: float, said: bool) -> None:
    found = parse_arguments([*LEAST.split(), *words.split()])
    assert found.training.warmup_steps == steps
    assert any("--warmup_ratio" in note for note in found.notes) == said


@pytest.mark.parametrize(
    "words",
    [
        "--eval_share 0.1 --eval_data_path e.json",
        "--lora_r 64 --rank_schedule 4:0,8:0.5",
        "--memory 8GiB",
        "--admin_key secret",
    ],
)
def test_a_flag_that_another_leaves_without_effect_is_said(words: str) -> None:
    notes = parse_arguments([*LEAST.split(), *words.split()]).notes
    assert any(note.startswith(f"{words.split()[0]} is not used") for note in notes)


@pytest.mark.parametrize(
    ("words", "by_length"),
    [
        ("--group_by_length --group_by_length False", False),
        ("--group_by_length False --group_by_length", True),
    ],
)
def test_the_last_of_an_old_flag_counts(words: str, by_length: bool) -> None:
    found = parse_arguments([*LEAST.split(), *words.split()]).training.train_sampling_strategy
    assert (found == "group_by_length") == by_length


@pytest.mark.parametrize(
    ("words", "half"),
    [("--fp16", True), ("--fp16 True --fp16 False", False), ("--fp16 False --fp16 --packing", True)],
)
def test_the_last_fp16_is_what_a_cpu_makes_bf16_of(
    words: str, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = parse_arguments([*LEAST.split(), *words.split()])
    assert found.training.bf16 == half
    assert not found.training.fp16


@pytest.mark.parametrize(
    ("text", "part", "name", "value"),
    [
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}",
            "training",
            "lr_scheduler_kwargs",
            {"min_lr": 1e-5},
        ),
        ("learning_rate: 1e-5", "training", "learning_rate", 1e-5),
        ("eval_strategy: no", "training", "eval_strategy", "no"),
        ("save_strategy: no", "training", "save_strategy", "no"),
        ("packing: yes", "data", "packing", True),
        ("rank_schedule: 8:0", "lora", "rank_schedule", "8:0"),
        ("seed: 010", "training", "seed", 10),
        ("run_name: 2024-01-01", "training", "run_name", "2024-01-01"),
        ("report_to: [tensorboard, wandb]", "training", "report_to", ["tensorboard", "wandb"]),
        ("run_name: --x", "training", "run_name", "--x"),
    ],
)
def test_yaml_means_what_is_written(tmp_path: Path, text: str, part: str, name: str, value: object) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{text}\n")
    found = parse_arguments([str(path), *LEAST.split()])
    assert getattr(getattr(found, part), name) == value


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lora_r: 8\nlora_r: 16\n")
    with pytest.raises(InvalidArgument, match="'lora_r' is given twice"):
        parse_arguments([str(path), *LEAST.split()])


@pytest.mark.parametrize(
    ("words", "resume", "named"),
    [
        ("--resume_from_checkpoint", True, None),
        ("--resume_from_checkpoint True", True, None),
        ("--resume_from_checkpoint False", False, None),
        ("--resume_from_checkpoint out/checkpoint-5", True, "out/checkpoint-5"),
        ("--resume_from_checkpoint=out/checkpoint-5 --packing", True, "out/checkpoint-5"),
    ],
)
def test_transformers_own_flag_resumes(words: str, resume: bool, named: str | None) -> None:
    found = parse_arguments([*LEAST.split(), *words.split()])
    assert found.run.resume == resume
    assert found.training.resume_from_checkpoint == named


def test_help_begins_with_ours_and_has_each_flag_once() -> None:
    text = make_parser().format_help()
    titles = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and line[0].isalpha()]
    assert titles == ["Base", "Data", "Adapter", "Run", "Training, by transformers' names"]
    shown = re.findall(r"^  (--\w[\w-]*)", text, re.MULTILINE)
    assert len(shown) == len(set(shown)) == len({name.replace("-", "_") for name in shown})
    assert len(text.splitlines()) < 160
    assert {"--lora_r", "--rank_schedule", "--auto_fit", "--model_max_length", "--deepspeed"} <= set(shown)
    assert "--ddp_timeout" not in shown
    assert "--help-all" in text


def test_the_whole_help_has_what_is_honoured_and_nothing_else() -> None:
    shown = re.findall(r"^  --(\w[\w-]*)", make_parser(everything=True).format_help(), re.MULTILINE)
    names = {each.name for part in ARGUMENT_CLASSES for each in fields(part)}
    assert set(shown) == names - REFUSED.keys()
    assert len(shown) == len(set(shown))


def test_the_bases_own_directory_is_no_output(tmp_path: Path) -> None:
    """The adapter's tokenizer and chat template would be written over the base's."""
    (tmp_path / "other").mkdir()
    words = f"--model_name_or_path {tmp_path} --data_path d.json --use_lora --output_dir".split()
    with pytest.raises(InvalidArgument, match="is the base's own directory"):
        parse_arguments([*words, f"{tmp_path}/other/.."])
    assert parse_arguments([*words, f"{tmp_path}/other"])


def test_options_that_are_not_json_are_named() -> None:
    words = [*LEAST.split(), "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", "{min_lr"]
    with pytest.raises(InvalidArgument, match="min_lr' isn't JSON"):
        parse_arguments(words)


def test_going_on_from_elsewhere_may_replace_what_is_here(tmp_path: Path) -> None:
    words = [
        *LEAST.split(),
        "--overwrite_output_dir",
        "--output_dir",
        str(tmp_path / "out"),
        "--resume_from_checkpoint",
    ]
    elsewhere = str(tmp_path / "other" / "checkpoint-3")
    assert parse_arguments([*words, elsewhere]).run.overwrite_output_dir
    for here in (
        "True",
        str(tmp_path / "out" / "checkpoint-3"),
        str(tmp_path / "out" / ".." / "out" / "checkpoint-3"),
    ):
        with pytest.raises(InvalidArgument, match="goes on with the run in --output_dir, which"):
            parse_arguments([*words, here])


@pytest.mark.parametrize("flag", ["--config", "--tasks"])
def test_a_file_of_keys_that_is_nested_without_end_is_refused(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text("lora_r: " + "[" * 5000)
    with pytest.raises(InvalidArgument, match="nested too deeply"):
        read_tasks(parse_arguments([flag, str(path), "--output_dir", str(tmp_path / "out")]))


@pytest.mark.parametrize("flag", ["--config", "--tasks"])
def test_a_missing_file_of_keys_is_named_without_the_systems_number(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "none.yaml"
    words = [flag, str(path), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InvalidArgument) as told:
        read_tasks(parse_arguments(words))
    assert str(told.value) == f"{flag} {path} can't be read: No such file or directory"
