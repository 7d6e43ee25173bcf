"""Planning and fitting a prepared run."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from manylora.adapters.base_form import BaseForm
from manylora.loadtest.material.checkpoints import TINY, BaseShape, write_base
from manylora.training.arguments import Arguments
from manylora.training.bases.load import load_base
from manylora.training.bases.lora import LoraSettings, attach
from manylora.training.bases.types import BaseSettings
from manylora.training.errors import DoesNotFit, InvalidArgument
from manylora.training.job import Job, total_steps
from manylora.training.memory.job import _change, fit_job, plan_job, shapes_of, state_bytes, untried_bytes
from manylora.training.memory.plan import GIB, plan
from manylora.training.parsing import parse_arguments
from manylora.training.preparation import Prepared, prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_base(tmp_path / "base", TINY)
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x" * n}]}
        for n in range(8, 60)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        *("--model_name_or_path", str(tmp_path / "base"), "--data_path", str(tmp_path / "data.jsonl")),
        *("--output_dir", str(tmp_path / "out"), "--use_lora", "--use_cpu", "--model_max_length", "64"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--data_check", "off"),
        *("--rank_schedule", "4:0,16:0.5", "--auto_fit"),
    ]


def prepare_again(arguments: Arguments) -> Prepared:
    return prepare(arguments, lambda rows: total_steps(arguments.training, rows), lambda _: None)


def job_of(words: list[str]) -> Job:
    arguments = parse_arguments(words)
    return Job(arguments, prepare_again(arguments))


def test_sizes_are_the_runs_own(words: list[str]) -> None:
    job = job_of(words)
    model, run = shapes_of(job)
    assert model.parameters == sum(each.numel() for each in job.prepared.base.model.parameters()) - sum(
        each.numel() for name, each in job.prepared.model.named_parameters() if "lora_" in name
    )
    assert (run.rank, run.batch, run.accumulation, run.device) == (16, 4, 2, "cpu")
    assert run.seq == max(job.prepared.train.lengths)
    assert plan_job(job).total_gib > 0


def test_a_run_that_fits_is_left_as_it_is(words: list[str]) -> None:
    job = job_of([*words, "--memory", "64GiB"])
    said: list[str] = []
    fit_job(job, prepare_again, said.append)
    assert len(said) == 1
    assert "the longest batch took" in said[0]
    assert job.training_arguments().per_device_train_batch_size == 4


def test_what_can_not_fit_is_said(words: list[str]) -> None:
    job = job_of([*words, "--memory", "16MiB"])
    with pytest.raises(DoesNotFit, match="smaller base"):
        fit_job(job, prepare_again, lambda _: None)


def test_four_bits_and_another_length_prepare_anew(words: list[str]) -> None:
    job = job_of(words)
    _, run = shapes_of(job)
    wanted = replace(run, method="qlora", seq=32, batch=2, accumulation=4, gradient_checkpointing=True)
    _change(job, run, wanted, prepare_again)
    _, changed = shapes_of(job)
    assert changed == wanted
    assert job.prepared.base.kind == "nf4"
    assert job.arguments.lora.q_lora


def test_double_quantisation_prepares_anew(words: list[str]) -> None:
    """It is settled as --q_lora --double_quant would be, on a base that is in 4 bits already too."""
    for flags in ([], ["--q_lora"]):
        job = job_of([*words, *flags])
        _, run = shapes_of(job)
        wanted = replace(run, method="qlora", double_quant=True)
        _change(job, run, wanted, prepare_again)
        assert shapes_of(job)[1] == wanted
        assert job.prepared.base.form == BaseForm("nf4", True)
        states = [each.weight.quant_state for each in job.prepared.model.modules() if is_nf4(each)]
        assert states
        assert all(each.nested for each in states)


def is_nf4(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--use_dora"], {"use_dora": True}),
        (["--init_lora_weights", "olora"], {"starts_from_base": True, "dropout": 0.0}),
        (["--q_lora", "--double_quant"], {"double_quant": True}),
    ],
)
def test_what_is_asked_of_the_adapter_is_planned(
    words: list[str], flags: list[str], said: dict[str, object]
) -> None:
    _, plain = shapes_of(job_of(words))
    job = job_of([*words, *flags])
    _, run = shapes_of(job)
    assert {name: getattr(run, name) for name in said} == said
    assert {name: getattr(plain, name) for name in said} != said
    trained = sum(each.nbytes for each in job.prepared.model.parameters() if each.requires_grad)
    assert plan(shapes_of(job)[0], replace(run, rank=4)).parts["gradients"] * GIB == trained, (
        "at the first rank"
    )


@pytest.mark.parametrize(
    ("flags", "embedding"),
    [
        ("--modules_to_save norm", False),
        ("--modules_to_save lm_head", True),  # tied to the embedding
        ("--modules_to_save embed_tokens", True),
        ("--modules_to_save embed_tokens lm_head norm", True),
        ("--lora_bias all", False),
        ("--lora_bias lora_only --modules_to_save norm", False),
    ],
)
def test_what_is_trained_beside_lora_is_planned_by_what_it_holds(
    words: list[str], flags: str, embedding: bool
) -> None:
    job = job_of([*words, *flags.split()])
    model, run = shapes_of(job)
    trained = sum(each.nbytes for each in job.prepared.model.parameters() if each.requires_grad)
    assert plan(model, replace(run, rank=4)).parts["gradients"] * GIB == trained
    assert run.whole
    assert run.train_embeddings == embedding


def test_an_adapters_own_ranks_are_planned(words: list[str], tmp_path: Path) -> None:
    """Trained values of a run that goes on from it; and where its targets are paths, too."""
    without = [word for word in words if not word.startswith(("--rank_schedule", "4:0"))]
    base = load_base(BaseSettings(str(tmp_path / "base"), dtype="fp32"))
    targets = ("q_proj", "down_proj")
    model = attach(base, LoraSettings(r=4, rank_pattern={"down_proj": 16}, targets=targets))
    model.save_pretrained(tmp_path / "adapter")
    for layers in (None, [0]):
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "layers_to_transform": layers}))
        if layers:
            kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
            kept = {name: each for name, each in kept.items() if ".layers.0." in name}
            save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors")
        job = job_of([*without, "--from_adapter", str(tmp_path / "adapter")])
        trained = sum(each.nbytes for each in job.prepared.model.parameters() if each.requires_grad)
        assert plan(*shapes_of(job)).parts["gradients"] * GIB == trained > 0


EVALUATED = ("--eval_share", "0.2", "--per_device_eval_batch_size", "6")


def test_what_is_held_out_and_answered_is_planned(words: list[str]) -> None:
    _, without = shapes_of(job_of(words))
    assert (without.eval_seq, without.answer_tokens) == (0, 0)
    job = job_of([*words, *EVALUATED, "--eval_answers", "exact", "--eval_answers_max_new_tokens", "40"])
    held_out = job.prepared.held_out
    assert held_out is not None
    _, run = shapes_of(job)
    longest = max(held_out.lengths)
    assert (run.eval_seq, run.eval_batch) == (longest, min(6, held_out.report.examples))
    assert (run.answer_tokens, run.answers) == (longest + 40, held_out.report.examples)
    planned = plan_job(job)
    assert planned.parts["served"] > 0


def test_what_a_trial_does_not_hold_is_added_to_its_peak(words: list[str]) -> None:
    """The served copy, the state to go back to, and the rank's growth from 4 to 16."""
    job = job_of([*words, *EVALUATED, "--eval_answers", "exact"])
    model, run = shapes_of(job)
    at_once = plan(model, replace(run, rank=4, answer_tokens=0)).parts
    in_a_trial = sum(size for name, size in at_once.items() if name != "rollback")
    missing = (plan(model, run).total_gib - in_a_trial) * GIB
    assert untried_bytes(job, model, run) == pytest.approx(missing, rel=0.001)
    assert missing > plan(model, run).parts["served"] * GIB


def test_the_optimisers_state_is_there_while_a_run_is_evaluated(words: list[str]) -> None:
    model, run = shapes_of(job_of(words))
    assert state_bytes(model, run) == pytest.approx(8 * (1 << 30) * plan(model, run).parts["gradients"] / 4)
    assert state_bytes(model, replace(run, optim="sgd")) == 0


def test_examples_are_cut_when_that_is_allowed_alone(words: list[str], tmp_path: Path) -> None:
    write_base(tmp_path / "base", BaseShape("qwen2", 4000, 64, 64, 1, 2, 2, 1024))
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x y z " * 400}]}
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    done = [*("--q_lora", "--gradient_checkpointing", "--per_device_train_batch_size", "1")]
    done += [*("--model_max_length", "512", "--memory", "64GiB")]
    job = job_of([*words, *done])
    longest = max(job.prepared.train.lengths)
    full = _Full(job.prepared.model)
    with pytest.raises(DoesNotFit, match="--model_max_length"):
        fit_job(job, prepare_again, lambda _: None)
    assert (max(job.prepared.train.lengths), full.asked) == (longest, 1)
    job = job_of([*words, *done, "--auto_fit_cut", "128"])
    _Full(job.prepared.model)
    fit_job(job, prepare_again, lambda _: None)
    assert 128 <= max(job.prepared.train.lengths) < longest
    assert job.arguments.training.model_max_length == max(job.prepared.train.lengths)


class _Full:
    """A device on which the first model that is trained doesn't fit."""

    def __init__(self, model: nn.Module) -> None:
        self.asked = 0
        model.register_forward_pre_hook(self.look)

    def look(self, module: nn.Module, _: object) -> None:
        self.asked += 1
        raise torch.OutOfMemoryError("CUDA out of memory")


class _TooSmall:
    """A device on which more than ``rows`` rows of an evaluation don't fit."""

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.rows = rows
        self.tried: list[tuple[int, int]] = []
        model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: nn.Module, _: object, given: Mapping[str, Tensor]) -> None:
        if module.training:
            return
        rows, width = given["input_ids"].shape
        self.tried.append((rows, width))
        if rows > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_longest_evaluation_batch_is_tried_and_halved(words: list[str]) -> None:
    job = job_of([*words, *EVALUATED, "--memory", "64GiB"])
    held_out = job.prepared.held_out
    assert held_out is not None
    device = _TooSmall(job.prepared.model, 2)
    said: list[str] = []
    fit_job(job, prepare_again, said.append)
    assert [rows for rows, _ in device.tried] == [6, 3, 1]
    assert {width for _, width in device.tried} == {max(held_out.lengths)}
    training = job.training_arguments()
    assert (training.per_device_eval_batch_size, training.per_device_train_batch_size) == (1, 4)
    assert "--per_device_eval_batch_size 1" in said[-2]
    assert "longest evaluation batch took" in said[-1]


def test_examples_stay_whole_unless_their_cutting_is_asked_for(words: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="--auto_fit too"):
        parse_arguments([word for word in words if word != "--auto_fit"] + ["--auto_fit_cut", "32"])
    with pytest.raises(InvalidArgument, match="--auto_fit_cut -1"):
        parse_arguments([*words, "--auto_fit_cut", "-1"])
    assert parse_arguments(words).run.auto_fit_cut == 0
