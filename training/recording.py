"""Fills in a run's record: what it started from, and what came of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from manylora.training.arguments import Arguments
from manylora.training.data.files import data_fingerprint, parse_data_path
from manylora.training.loop.checkpoints import step_of
from manylora.training.loop.trainer import LoraTrainer
from manylora.training.preparation import Prepared
from manylora.training.report.record import (
    BaseFacts,
    DataFacts,
    EvaluationFacts,
    FileFacts,
    History,
    MemoryFacts,
    Results,
    RunRecord,
)
from manylora.training.report.surroundings import package_versions, this_machine

SECRET = "•••"
SECRETS = ("admin_key", "hub_token")


def now() -> str:
    """Return the time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class PublishedBest:
    """The best checkpoint, where it is what a run publishes."""

    step: int
    sentence: str
    """Which step of how many, and what was best about it."""


def published_best(trainer: LoraTrainer) -> PublishedBest | None:
    """Return the checkpoint that was loaded when training ended; None where the last step's adapter is published."""
    state, args = trainer.state, trainer.args
    if not args.load_best_model_at_end or not state.best_model_checkpoint:
        return None
    step = step_of(Path(state.best_model_checkpoint))
    metric = str(args.metric_for_best_model).replace("_", " ")
    value = "" if state.best_metric is None else f" ({state.best_metric:.4g})"
    return PublishedBest(
        step, f"the checkpoint of step {step} of {state.max_steps}, the best by {metric}{value}"
    )


def start_record(
    arguments: Arguments,
    prepared: Prepared,
    planned: Mapping[str, float],
    changes: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Return the record of a run that hasn't begun. ``changes`` are training arguments that were settled since."""
    training, base = arguments.training, prepared.base
    return RunRecord(
        name=arguments.run.adapter_name or training.run_name or Path(training.output_dir).resolve().name,
        outcome="started",
        command=("manylora", "train", *without_secrets(arguments.command)),
        arguments={**_values(arguments), **(changes or {})},
        versions=package_versions(),
        seeds={"seed": training.seed, "data_seed": training.data_seed or training.seed},
        machine=this_machine(),
        base=BaseFacts(
            base.name,
            base.kind,
            str(base.dtype).removeprefix("torch."),
            base.fingerprint,
            prepared.servable.sentence(),
            base.notes,
        ),
        started=now(),
        data=DataFacts(
            files=_files(arguments.data.data_path),
            eval_files=_files(arguments.data.eval_data_path),
            sentences=tuple(prepared.train.report.sentences()),
            check_summary="" if prepared.check is None else " ".join(prepared.check.sentences()[:1]),
            check_html="" if prepared.check is None else prepared.check.html_section(),
        ),
        memory=MemoryFacts(planned=dict(planned)),
    )


def finish_record(
    record: RunRecord,
    trainer: LoraTrainer,
    history: History,
    metrics: Mapping[str, float],
    evaluation: EvaluationFacts,
    peak_gib: float | None,
    outcome: str,
) -> RunRecord:
    """Return the record with what came out."""
    seconds = metrics.get("train_runtime")
    seen = trainer.state.num_input_tokens_seen
    state, best = trainer.state, published_best(trainer)
    results = Results(
        train_loss=metrics.get("train_loss"),
        eval_loss=metrics.get("eval_loss"),
        perplexity=metrics.get("eval_perplexity"),
        train_seconds=seconds,
        steps=state.global_step,
        tokens_per_second=seen / seconds if seconds and seen else None,
        peak_memory_gib=peak_gib,
        # ZeRO-3 leaves a parameter without values, and its size beside it.
        trained_parameters=sum(
            getattr(each, "ds_numel", each.numel())
            for each in trainer.model.parameters()
            if each.requires_grad
        ),
        final_rank=trainer.policy.rank,
        best_checkpoint=state.best_model_checkpoint,
        published_step=None if best is None else best.step,
        adapter=str(Path(trainer.args.output_dir).resolve()),
    )
    memory = dataclasses.replace(record.memory, measured_peak_gib=peak_gib)
    return dataclasses.replace(
        record, outcome=outcome, history=history, evaluation=evaluation, results=results, memory=memory
    )


def without_secrets(words: Sequence[str]) -> tuple[str, ...]:
    """Return the command line with keys and tokens blotted out."""
    found = list(words)
    for position, word in enumerate(words):
        name, equals, _ = word.lstrip("-").replace("-", "_").partition("=")
        if word.startswith("--") and name in SECRETS:
            if equals:
                found[position] = f"{word.split('=', 1)[0]}={SECRET}"
            elif position + 1 < len(found):
                found[position + 1] = SECRET
    return tuple(found)


def _values(arguments: Arguments) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in (arguments.model, arguments.data, arguments.lora, arguments.run, arguments.training):
        for field in dataclasses.fields(part):
            values[field.name] = getattr(part, field.name)
    for name in SECRETS:
        if values.get(name):
            values[name] = SECRET
    if arguments.learning_rate_auto:
        values["learning_rate_auto"] = True
    return values


def _files(paths: Sequence[str]) -> tuple[FileFacts, ...]:
    hashes = data_fingerprint(paths)
    found = []
    for path in map(parse_data_path, paths):
        found.append(FileFacts(path.path, hashes[path.path], path.share))
    return tuple(found)
