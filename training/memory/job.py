"""Planning and fitting a prepared run: from its arguments and data to sizes, and from what fits back to arguments."""

import copy
import gc
import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from manylora.training.arguments import Arguments
from manylora.training.distributed import world_size
from manylora.training.errors import TrainingError
from manylora.training.job import Job
from manylora.training.loop.out_of_memory import is_out_of_memory
from manylora.training.memory.budget import Budget, this_machine
from manylora.training.memory.find import read_shape
from manylora.training.memory.fit import auto_fit, fit_evaluation
from manylora.training.memory.plan import GIB, OUTSIDE, MemoryPlan, plan
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape
from manylora.training.memory.sizes import parse_bytes
from manylora.training.memory.trial import try_longest, try_longest_evaluation
from manylora.training.preparation import Prepared


def shapes_of(job: Job) -> tuple[ModelShape, RunShape]:
    """Return the sizes of a job's model and run: of its longest real row, and at its final rank."""
    prepared, training = job.prepared, job.training_arguments()
    base, lora = prepared.base, prepared.lora
    model = replace(
        read_shape(str(base.directory)), vocab_size=base.model.get_input_embeddings().weight.shape[0]
    )
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[base.dtype]
    run = RunShape(
        method="lora" if base.kind == "dense" else "qlora",
        seq=max(prepared.train.lengths, default=training.model_max_length),
        batch=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        rank=prepared.policy.final_rank,
        targets=lora.targets,
        gradient_checkpointing=bool(training.activation_checkpointing),
        dtype=dtype,
        optim=str(getattr(training.optim, "value", training.optim)),
        packing=job.arguments.data.packing,
        train_embeddings=_trains_embedding(prepared.model),
        whole=_trained_beside_lora(prepared.model),
        dropout=lora.used_dropout,
        device="cuda" if base.model.device.type == "cuda" else "cpu",
        double_quant=job.arguments.lora.double_quant,
        rank_pattern=tuple(lora.rank_pattern.items()),
        use_dora=lora.use_dora,
        starts_from_base=lora.starts_from_base,
    )
    return model, _with_evaluation(job, run, training.per_device_eval_batch_size)


def _trains_embedding(model: nn.Module) -> bool:
    """Return whether the embedding is trained whole, so that what comes out of it is float32."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]  # transformers' models have it
    return any("modules_to_save" in name for name, _ in embedding.named_parameters())


def _trained_beside_lora(model: nn.Module) -> int:
    """Return the trained values that are no factors and no lengths of DoRA's."""
    return sum(
        each.numel() for name, each in model.named_parameters() if each.requires_grad and "lora_" not in name
    )


def _with_evaluation(job: Job, run: RunShape, batch: int) -> RunShape:
    """Return the run with what it evaluates: held-out rows, and answers of the served base."""
    held_out, asked = job.prepared.held_out, job.arguments.run
    if held_out is None:
        return run
    examples = held_out.report.examples
    longest = max(held_out.lengths, default=job.arguments.training.model_max_length)
    return replace(
        run,
        eval_seq=longest,
        eval_batch=min(batch, examples),
        answers=min(asked.eval_answers_limit, examples),
        answer_tokens=0 if asked.eval_answers == "none" else longest + asked.eval_answers_max_new_tokens,
    )


def plan_job(job: Job) -> MemoryPlan:
    """Return the plan of a prepared run as PeakMeter will measure it: on CUDA without what isn't tensors.

    Without parts when the base's family or the adapted modules are none that can be planned for.
    """
    try:
        planned = plan(*shapes_of(job))
    except TrainingError:
        return MemoryPlan({})
    if job.prepared.base.model.device.type != "cuda":
        return planned
    return MemoryPlan({name: size for name, size in planned.parts.items() if name not in OUTSIDE})


def fit_job(job: Job, prepare: Callable[[Arguments], Prepared], say: Callable[[str], None]) -> None:
    """Change the job until it fits (--auto_fit), trying its longest batches, to train on and to evaluate.

    ``prepare`` prepares changed arguments anew, which 4 bits and another length need. Raises DoesNotFit.
    """
    model, run = shapes_of(job)
    budget = budget_of(job)
    room = min(_of_all_processes(budget.bytes))

    def attempt(wanted: RunShape) -> int:
        _change(job, run, wanted, prepare)
        return train_peak(job) + outside_bytes(budget) + untried_bytes(job, model, wanted)

    def attempt_evaluation(wanted: RunShape) -> int:
        _change(job, run, wanted, prepare)
        unseen = untried_bytes(job, model, wanted) + state_bytes(model, wanted)
        return evaluation_peak(job) + outside_bytes(budget) + unseen

    fit = auto_fit(model, run, room, attempt, job.arguments.run.auto_fit_cut or None)
    for sentence in fit.sentences:
        say(sentence)
    if fit.run.eval_seq:
        for sentence in fit_evaluation(fit.run, room, attempt_evaluation).sentences:
            say(sentence)


def untried_bytes(job: Job, model: ModelShape, wanted: RunShape) -> int:
    """Return what a run will hold and a trial doesn't, as planned: the served copy, the last good state, what the rank
    will grow by, and DDP's buckets of gradients."""
    parts = plan(model, wanted).parts
    now = plan(model, replace(wanted, rank=job.prepared.policy.rank)).parts
    served, rollback = parts.get("served", 0.0), now.get("rollback", 0.0)
    growth = sum(parts.values()) - served - (sum(now.values()) - now.get("served", 0.0))
    buckets = parts["gradients"] if world_size() > 1 else 0.0
    return int((served + rollback + growth + buckets) * GIB)


def state_bytes(model: ModelShape, wanted: RunShape) -> int:
    """Return the optimiser's state, which a run holds while it is evaluated, and a trial of that alone doesn't."""
    return int(plan(model, wanted).parts.get("optimizer", 0.0) * GIB)


def train_peak(job: Job) -> int:
    """Return the peak of the longest batch to train on, of all processes. Raises when memory runs out in one."""
    return _in_all_processes(lambda: try_longest(job.trainer(), job.prepared.train.lengths))


def evaluation_peak(job: Job) -> int:
    """Return the peak of the longest batch to evaluate, of all processes. Raises when memory runs out in one."""
    held_out = job.prepared.held_out
    assert held_out is not None, "there is something held out"
    return _in_all_processes(lambda: try_longest_evaluation(job.trainer(), held_out.lengths))


def _in_all_processes(attempt: Callable[[], int]) -> int:
    """Return the highest peak of all processes, so that all decide alike. Raises when one ran out of memory."""
    peak = 0
    try:
        peak = attempt()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    peaks = _of_all_processes(peak)
    if min(peaks) == 0:
        raise MemoryError
    return max(peaks)


def _of_all_processes(value: int) -> list[int]:
    values = [value] * world_size()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def budget_of(job: Job) -> Budget:
    """Return --memory for each process, or what the device has; processes on one CPU share it."""
    given = job.arguments.run.memory
    device = "cuda" if job.prepared.base.model.device.type == "cuda" else "cpu"
    if given is not None:
        return Budget(device, parse_bytes(given), "--memory")
    machine = this_machine()
    if device == "cuda":
        return machine
    return replace(machine, bytes=machine.bytes // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def outside_bytes(budget: Budget) -> int:
    """Return what is in use on the device outside torch's tensors. A CPU's meter counts it by itself."""
    if budget.device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _change(job: Job, first: RunShape, wanted: RunShape, prepare: Callable[[Arguments], Prepared]) -> None:
    """Make the job what is wanted, starting from what it is."""
    job.changes.update(
        per_device_train_batch_size=wanted.batch,
        gradient_accumulation_steps=wanted.accumulation,
        activation_checkpointing=wanted.gradient_checkpointing,
    )
    if wanted.eval_batch < first.eval_batch:
        job.changes["per_device_eval_batch_size"] = wanted.eval_batch
    arguments = job.arguments
    max_length = wanted.longest if wanted.longest < first.longest else arguments.training.model_max_length
    base, lora = job.prepared.base, copy.copy(arguments.lora)
    lora.q_lora = lora.q_lora or wanted.method == "qlora"
    lora.double_quant = lora.double_quant or (lora.q_lora and wanted.double_quant)
    is_held_so = (
        base.kind != "dense" or not lora.q_lora
    ) and lora.double_quant == arguments.lora.double_quant
    if max_length == arguments.training.model_max_length and is_held_so:
        return
    training = copy.copy(arguments.training)
    training.model_max_length = max_length
    job.arguments = replace(arguments, training=training, lora=lora)
    # The old base must be gone before the new one comes.
    del job.prepared
    gc.collect()
    job.prepared = prepare(job.arguments)
