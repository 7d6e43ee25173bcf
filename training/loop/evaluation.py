"""Evaluation loss: the mean over trained tokens of the whole set, so that it doesn't depend on the batches."""

import math
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from manylora.training.errors import DoesNotFit
from manylora.training.loop.loss import token_losses
from manylora.training.loop.out_of_memory import is_out_of_memory
from manylora.training.loop.split import Batch, in_parts, rows_of

if TYPE_CHECKING:
    from manylora.training.loop.trainer import LoraTrainer

LARGEST_EXPONENT = 700.0
"""exp of more overflows a float64."""


def evaluate_loss(trainer: "LoraTrainer", loader: DataLoader[object], prefix: str) -> EvalLoopOutput:
    """Return the loss (nats per trained token) and perplexity over ``loader``, as transformers wants them."""
    model = trainer.model
    was_training = model.training
    model.eval()
    total, tokens, rows = torch.zeros((), dtype=torch.float64), 0, 0
    try:
        for batch in loader:
            sums, counts = row_losses(trainer, batch)
            # Rows that were added to even out the last batches of several processes are dropped again here.
            sums, counts = trainer.accelerator.gather_for_metrics((sums, counts))
            total += sums.double().sum().cpu()
            tokens += int(counts.sum())
            rows += len(counts)
    finally:
        model.train(was_training)
    # Without a trained token nothing was judged, and 0 would be the best of all losses.
    loss = float(total) / tokens if tokens else math.nan
    metrics = {
        f"{prefix}_loss": loss,
        f"{prefix}_perplexity": math.exp(min(loss, LARGEST_EXPONENT)) if loss == loss else math.nan,
        f"{prefix}_tokens": float(tokens),
    }
    return EvalLoopOutput(predictions=(), label_ids=None, metrics=metrics, num_samples=rows)


def row_losses(trainer: "LoraTrainer", batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's summed loss, float32 [B], and its trained tokens, int64 [B]; in pieces once memory has run out.

    Raises DoesNotFit when one row is too much.
    """
    inputs = trainer._prepare_inputs(batch)
    while True:
        try:
            found = [_of_piece(trainer, part) for part in in_parts(inputs, trainer.eval_rows)]
            sums, counts = zip(*found, strict=True)
            return torch.cat(sums), torch.cat(counts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block, so that the error's frames, which hold tensors, are gone.
        _use_smaller_pieces(trainer, inputs)


def _use_smaller_pieces(trainer: "LoraTrainer", inputs: Batch) -> None:
    rows = min(rows_of(inputs), trainer.eval_rows or rows_of(inputs))
    # Where parameters are in shards every pass needs all processes, and one can't make two of it alone.
    sharded = trainer.args.world_size > 1 and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    if rows == 1 or sharded:
        raise DoesNotFit(
            f"out of memory while evaluating {rows} rows of {inputs['input_ids'].shape[1]} tokens: give a smaller"
            " --per_device_eval_batch_size, --q_lora, or shorter rows to evaluate on"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trainer.eval_rows = rows // 2
    trainer.events.say(
        trainer.state.global_step,
        "split",
        f"out of memory while evaluating {rows} rows at once: going on with {trainer.eval_rows}; the loss stays what it"
        " is",
    )


@torch.no_grad()
def _of_piece(trainer: "LoraTrainer", inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    with trainer.accelerator.autocast():
        losses, owner = token_losses(trainer.model, inputs)
    zeros = torch.zeros(rows_of(inputs), device=losses.device)
    sums = zeros.index_add(0, owner, losses)
    counts = torch.bincount(owner, minlength=rows_of(inputs))
    return sums, counts
