"""Evaluation loss: the mean over trained tokens of the whole set, so that it doesn't depend on the batches."""

import math
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from manylora.training.loop.loss import token_losses
from manylora.training.loop.split import rows_of

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
            sums, counts = _row_losses(trainer, batch)
            # Rows that were added to even out the last batches of several processes are dropped again here.
            sums, counts = trainer.accelerator.gather_for_metrics((sums, counts))
            total += sums.double().sum().cpu()
            tokens += int(counts.sum())
            rows += len(counts)
    finally:
        model.train(was_training)
    loss = float(total) / max(tokens, 1)
    metrics = {
        f"{prefix}_loss": loss,
        f"{prefix}_perplexity": math.exp(min(loss, LARGEST_EXPONENT)) if loss == loss else math.nan,
        f"{prefix}_tokens": float(tokens),
    }
    return EvalLoopOutput(predictions=(), label_ids=None, metrics=metrics, num_samples=rows)


@torch.no_grad()
def _row_losses(trainer: "LoraTrainer", batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's summed loss, float32 [B], and its trained tokens, int64 [B]."""
    inputs = trainer._prepare_inputs(batch)
    with trainer.accelerator.autocast():
        losses, owner = token_losses(trainer.model, inputs)
    zeros = torch.zeros(rows_of(inputs), device=losses.device)
    sums = zeros.index_add(0, owner, losses)
    counts = torch.bincount(owner, minlength=rows_of(inputs))
    return sums, counts
