"""Going on with a run: only with what it began with, only from what is whole, and no step too far."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manylora.demo.task_data import write_tasks
from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training.bases.types import Base
from manylora.training.continuing import Kept, compare, facts_of, keep, settled_again
from manylora.training.errors import InvalidArgument
from manylora.training.evaluate.generate import Generate
from manylora.training.loop import checkpoints
from manylora.training.output import alone
from manylora.training.parsing import parse_arguments
from manylora.training.rate.curve import Curve
from manylora.training.rate.find import Choice
from manylora.training.rate.trials import Trial
from manylora.training.run import Surroundings, train

CONFIG = (
    "--use_lora --data_check off --lora_r 4 --lora_dropout 0 --max_steps 4 --save_steps 2 --learning_rate 1e-2"
    " --per_device_train_batch_size 4 --logging_steps 1"
)


def answers(conversations: object, adapter: object, max_new_tokens: int) -> list[str]:
    raise AssertionError("no run here asks for answers")


@contextmanager
def nobody(_: Base) -> Iterator[Generate]:
    yield answers


def run(place: Path, out: Path, more: str = "") -> list[str]:
    """Run the command with the flags that all tests share, and more, which win. Returns what was said."""
    said: list[str] = []
    words = (
        f"--model_name_or_path {place / 'tiny'} --data_path {place / 'sql.json'} --output_dir {out} {CONFIG}"
    )
    train(parse_arguments([*words.split(), *more.split()]), Surroundings(said.append, nobody))
    return said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("continuing")
    write_tasks(directory, 40, 4)
    write_base(directory / "tiny", TINY)
    write_base(directory / "other", TINY, seed=3)
    run(directory, directory / "out")
    return directory


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    """The finished run's directory as it was after step 2."""
    return copied(place, tmp_path / "out", keep=2)


def copied(place: Path, target: Path, keep: int) -> Path:
    shutil.copytree(place / "out", target)
    for name in ("adapter_config.json", "adapter_model.safetensors", "run.json", "report.html"):
        (target / name).unlink(missing_ok=True)
    for each in checkpoints.checkpoints(target):
        if checkpoints.step_of(each) > keep:
            shutil.rmtree(each)
    return target


def weights(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


CHANGED = {
    "--lora_alpha 64": ["--lora_alpha is 64.0 now and was 16"],
    "--use_rslora": ["--use_rslora is True now and was False"],
    "--q_lora": ["--q_lora is True now"],
    "--lora_dropout 0.5 --lora_r 8": [
        "--lora_r is 8 now and was 4",
        "--lora_dropout is 0.5 now and was 0.0",
    ],
    "--lora_target_modules q_proj": ["--lora_target_modules is q_proj now"],
    "--init_lora_weights gaussian": ["--init_lora_weights"],
    "--rank_schedule 4:0,8:0.5": ["--rank_schedule"],
    "--data_path {place}/json.json": ["--data_path holds other data"],
    "--data_path {place}/sql.json:0.5": ["--data_path holds other data"],
    "--packing": ["--packing is True now"],
    "--eval_share 0.1": ["--eval_share"],
    "--learning_rate 1e-3": ["--learning_rate is 0.001 now and was 0.01"],
    "--lr_scheduler_type cosine": ["--lr_scheduler_type is cosine now and was linear"],
    "--warmup_steps 1": ["--warmup_steps"],
    "--weight_decay 0.1": ["--weight_decay"],
    "--adam_beta2 0.9": ["--adam_beta2"],
    "--optim sgd": ["--optim is sgd now and was adamw_torch"],
    "--max_grad_norm 5": ["--max_grad_norm"],
    "--seed 1": ["--seed is 1 now and was 42", "--data_seed"],
    "--bf16": ["--bf16 is True now"],
    "--model_max_length 64": ["--model_max_length"],
    "--per_device_train_batch_size 2": [
        "per_device_train_batch_size × gradient_accumulation_steps is 2 now and was 4"
    ],
    "--from_adapter {place}/out": ["--from_adapter is another now and was none"],
}


@pytest.mark.parametrize("words", CHANGED)
def test_other_settings_are_refused_with_the_names_of_what_differs(
    place: Path, out: Path, words: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        run(place, out, f"{words.format(place=place)} --resume")
    told = str(refused.value)
    assert "checkpoint-2 is of a run with other settings" in told
    assert all(part in told for part in CHANGED[words])
    assert told.count(" now and was ") + told.count("other data") == len(CHANGED[words])


def test_the_rows_of_a_step_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"--data_path {__file__} --output_dir out {CONFIG}"

    def facts(processes: int, more: str) -> Mapping[str, object]:
        monkeypatch.setattr("manylora.training.continuing.world_size", lambda: processes)
        return facts_of(parse_arguments([*words.split(), *more.split()]), {})

    one = facts(1, "--per_device_train_batch_size 4")
    kept = Kept(one, {})
    compare(Path("there"), kept, facts(2, "--per_device_train_batch_size 2"))
    with pytest.raises(InvalidArgument, match="accumulation_steps is 8 now and was 4"):
        compare(Path("there"), kept, facts(2, "--per_device_train_batch_size 4"))


@pytest.mark.parametrize("flags", ["--resume", "--overwrite_output_dir"])
def test_a_directory_that_a_run_is_at_work_in_is_left_to_it(place: Path, out: Path, flags: str) -> None:
    before = sorted(path.name for path in out.iterdir())
    (out / ".checkpoint-partial").mkdir()
    with alone(out), pytest.raises(InvalidArgument, match="another run is at work there"):
        run(place, out, flags)
    assert sorted(path.name for path in out.iterdir()) == [".checkpoint-partial", *before]


def test_another_base_is_refused(place: Path, out: Path) -> None:
    with pytest.raises(InvalidArgument, match="--model_name_or_path is another base"):
        run(place, out, f"--model_name_or_path {place / 'other'} --resume")


def test_what_does_not_change_the_run_may_differ(place: Path, out: Path) -> None:
    moved = place / "moved"
    shutil.copytree(place / "tiny", moved, dirs_exist_ok=True)
    shutil.copy(place / "sql.json", moved / "rows.json")
    run(
        place,
        out,
        f"--model_name_or_path {moved} --data_path {moved / 'rows.json'} --per_device_train_batch_size 2"
        " --gradient_accumulation_steps 2 --save_steps 3 --logging_steps 2 --resume",
    )
    expected = load_file(place / "out" / "adapter_model.safetensors")
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("words", ["--resume", "--resume_from_checkpoint {out}/checkpoint-2"])
def test_a_run_goes_on_to_the_same_adapter(place: Path, out: Path, words: str) -> None:
    run(place, out, words.format(out=out))
    assert weights(out) == weights(place / "out")


def test_the_checkpoint_that_is_named_is_gone_on_from(place: Path, tmp_path: Path) -> None:
    """Not the last one in the directory, and from another directory too."""
    whole = copied(place, tmp_path / "whole", keep=4)
    (whole / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"not looked at")
    run(place, whole, f"--resume_from_checkpoint {whole / 'checkpoint-2'}")
    assert weights(whole) == weights(place / "out")
    run(place, tmp_path / "elsewhere", f"--resume_from_checkpoint {place / 'out' / 'checkpoint-2'}")
    assert weights(tmp_path / "elsewhere") == weights(place / "out")
    with pytest.raises(InvalidArgument, match="there is no such directory"):
        run(place, whole, f"--resume_from_checkpoint {tmp_path / 'nowhere'}")


@pytest.mark.parametrize("steps", [1, 2])
def test_no_step_is_taken_past_the_end(place: Path, out: Path, steps: int) -> None:
    said = run(place, out, f"--max_steps {steps} --resume")
    record = json.loads((out / "run.json").read_text())
    assert record["results"]["steps"] == 2
    assert weights(out) == weights(out / "checkpoint-2")
    assert any("no step was taken" in each for each in said) == (steps == 1)


FILES = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "adapter_model.safetensors",
    "adapter_config.json",
)


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_without_a_file_is_refused(place: Path, out: Path, name: str) -> None:
    (out / "checkpoint-2" / name).unlink()
    helps = "start again" if name.startswith("adapter_") else "--from_adapter"
    with pytest.raises(InvalidArgument, match=rf"has no {name}.*{helps}"):
        run(place, out, "--resume")


@pytest.mark.parametrize("name", [*FILES, "manylora_state.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_that_is_cut_is_named(place: Path, out: Path, name: str, share: float) -> None:
    path = out / "checkpoint-2" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InvalidArgument, match=name) as refused:
        run(place, out, "--resume")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["manylora_state.json", "trainer_state.json"])
@pytest.mark.parametrize("content", ["{}", "[1]", "null"])
def test_a_file_that_holds_something_else_is_named(place: Path, out: Path, name: str, content: str) -> None:
    (out / "checkpoint-2" / name).write_text(content)
    with pytest.raises(InvalidArgument, match=name):
        run(place, out, "--resume")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", [1]),
        ("optimizer.pt", {"state": {}, "param_groups": []}),
        ("scheduler.pt", {}),
        ("rng_state.pth", {}),
    ],
)
def test_states_of_something_else_are_refused_by_the_name_of_their_file(
    place: Path, out: Path, name: str, content: object
) -> None:
    torch.save(content, out / "checkpoint-2" / name)
    with pytest.raises(
        InvalidArgument, match=rf"{name} .*of .*checkpoint-2 can't be read .*--from_adapter"
    ) as said:
        run(place, out, "--resume")
    assert "\n" not in str(said.value)


def test_of_several_checkpoints_another_one_is_offered(place: Path, tmp_path: Path) -> None:
    whole = copied(place, tmp_path / "whole", keep=4)
    (whole / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(InvalidArgument, match=r"--resume_from_checkpoint .*checkpoint-2"):
        run(place, whole, "--resume")


def test_a_checkpoint_without_its_optimiser_is_said_to_be_none_to_go_on_from(
    place: Path, tmp_path: Path
) -> None:
    run(place, tmp_path / "light", "--save_only_model --max_steps 2")
    with pytest.raises(InvalidArgument, match="--save_only_model"):
        run(place, tmp_path / "light", "--resume")


def test_a_run_from_an_adapter_goes_on_by_the_same_command(place: Path, tmp_path: Path) -> None:
    start = f"--from_adapter {place / 'out'}"
    run(place, tmp_path / "first", start)
    target = tmp_path / "second"
    shutil.copytree(tmp_path / "first", target)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (target / name).unlink()
    shutil.rmtree(target / "checkpoint-4")
    run(place, target, f"{start} --resume")
    assert weights(target) == weights(tmp_path / "first")
    with pytest.raises(InvalidArgument, match="--from_adapter is none now and was another"):
        run(place, target, "--resume")


def test_a_rate_that_was_found_is_gone_on_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = Choice(
        0.02,
        "because",
        Curve((1e-3, 1e-2), (2.0, 1.0)),
        (Trial(0.02, 1, 1.0), Trial(0.5, 1, math.inf)),
        30,
        1.5,
    )
    monkeypatch.setattr("manylora.training.run.find_learning_rate", lambda job, say: choice)
    monkeypatch.setattr("manylora.training.run.write_choice", lambda choice, directory: None)
    auto = "--learning_rate auto"  # the last one counts
    found = tmp_path / "found"
    run(place, found, auto)
    expected = weights(found)
    assert rate_of(found) == 0.02
    search = search_of(found)
    assert (search["rate"], search["steps"], search["trials"]) == (0.02, 30, [[0.02, 1, 1.0], [0.5, 1, None]])
    shutil.rmtree(found / "checkpoint-4")
    (found / "adapter_model.safetensors").unlink()
    run(place, found, f"{auto} --resume")
    assert weights(found) == expected
    assert rate_of(found) == 0.02
    # The report draws it as that of the first part did.
    assert search_of(found) == search
    assert "range test" in (found / "report.html").read_text()
    with pytest.raises(InvalidArgument, match=r"--learning_rate is 0\.5 now and was 0\.02"):
        run(place, found, "--learning_rate 0.5 --resume")


def search_of(directory: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((directory / "run.json").read_text())["search"]
    return found


def rate_of(directory: Path) -> float:
    rate: float = json.loads((directory / "run.json").read_text())["arguments"]["learning_rate"]
    return rate


def test_a_run_that_goes_further_than_it_was_to_goes_by_its_own_flags(place: Path, tmp_path: Path) -> None:
    further = copied(place, tmp_path / "further", keep=4)
    run(place, further, "--resume --max_steps 7 --save_steps 1 --logging_steps 2 --logging_first_step False")
    record = json.loads((further / "run.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in record["history"]["log"] if "loss" in entry}
    # The checkpoint's schedule has ended, at 0; the one of seven steps has not.
    assert rates[6] == pytest.approx(1e-2 * 2 / 7)
    assert 5 not in rates
    assert [each.name for each in checkpoints.checkpoints(further)][-3:] == [
        "checkpoint-5",
        "checkpoint-6",
        "checkpoint-7",
    ]
    first = json.loads((further / "checkpoint-5" / "trainer_state.json").read_text())
    assert first["save_steps"] == 1
    moments = torch.load(further / "checkpoint-5" / "scheduler.pt", weights_only=True)
    assert moments["last_epoch"] == 5
    assert weights(further / "checkpoint-5") != weights(further / "checkpoint-4"), "a step at rate 0"


BEST = (
    "--eval_data_path {place}/sql-eval.json --eval_strategy steps --eval_steps 2"
    " --early_stopping_patience 9 --metric_for_best_model loss"
)


@pytest.fixture(scope="module")
def judged(place: Path) -> Path:
    """A run whose best checkpoint is that of step 2, as it was after step 4."""
    out = place / "judged"
    run(place, out, BEST.format(place=place))
    for name in ("adapter_config.json", "adapter_model.safetensors", "run.json", "report.html"):
        (out / name).unlink()
    state = out / "checkpoint-4" / "trainer_state.json"
    best = {
        "best_global_step": 2,
        "best_metric": 0.001,
        "best_model_checkpoint": str(place / "moved-from" / "checkpoint-2"),
    }
    state.write_text(json.dumps(json.loads(state.read_text()) | best))
    return out


def test_the_best_checkpoint_is_found_where_the_run_was_moved_to(
    place: Path, judged: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(judged, tmp_path / "moved")
    said = run(place, moved, f"{BEST.format(place=place)} --resume --max_steps 6")
    assert any("checkpoint of step 2 of 6" in each for each in said)
    assert weights(moved) == weights(moved / "checkpoint-2")


def test_a_best_checkpoint_that_is_gone_is_said_and_another_one_found(
    place: Path, judged: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(judged, tmp_path / "moved")
    shutil.rmtree(moved / "checkpoint-2")
    said = run(place, moved, f"{BEST.format(place=place)} --resume --max_steps 6")
    record = json.loads((moved / "run.json").read_text())
    assert any(
        "checkpoint-2, the best so far, is gone" in each["sentence"] for each in record["history"]["events"]
    )
    assert record["results"]["published_step"] == 6
    assert any("checkpoint of step 6 of 6" in each for each in said)


def test_a_run_goes_on_in_the_bits_that_auto_fit_had_found(place: Path) -> None:
    words = ["--model_name_or_path", str(place / "tiny"), "--data_path", str(place / "sql.json")]
    words += ["--output_dir", str(place / "fitted"), "--use_lora", "--auto_fit"]
    fitted = parse_arguments(words)
    fitted = replace(fitted, lora=replace(fitted.lora, q_lora=True, double_quant=True))
    again, _ = settled_again(parse_arguments(words), Kept.of({"run": keep(fitted, {}, "base").state()}))
    assert (again.lora.q_lora, again.lora.double_quant) == (True, True)


def test_what_auto_fit_had_settled_holds_for_the_run_that_goes_on() -> None:
    words = "--data_path d.json --output_dir out --use_lora --auto_fit --auto_fit_cut 32 --resume"
    settled = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "activation_checkpointing": True,
        "model_max_length": 64,
        "q_lora": True,
    }
    arguments, changes = settled_again(parse_arguments(words.split()), Kept({}, settled))
    assert arguments.training.model_max_length == 64
    assert arguments.lora.q_lora
    assert changes == {name: settled[name] for name in list(settled)[:3]}
