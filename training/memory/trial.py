"""One optimiser step on the longest real batch, and an evaluation of the longest held-out one, before the run.

Everything is put back as it was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manylora.training.loop.loss import token_losses, trained_token_loss
from manylora.training.memory.meter import PeakMeter
from manylora.training.random_states import RandomStates

if TYPE_CHECKING:
    from manylora.training.loop.trainer import LoraTrainer

LossFunction = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def try_batch(
    model: nn.Module,
    make_optimizer: Callable[[Sequence[nn.Parameter]], Optimizer],
    batch: Mapping[str, Tensor],
    loss_function: LossFunction,
) -> int:
    """Return the peak in bytes (PeakMeter's) of a step on ``batch`` and of a second backward pass.

    The second meets the optimiser's state, as every step but a run's first does. Whatever happens, an out-of-memory
    error included, the model's trained values, its gradients (none), its mode and the random states are what they were.
    """
    trained = [each for each in model.parameters() if each.requires_grad]
    device = next(model.parameters()).device
    with _put_back(model, trained), PeakMeter(device) as meter:
        model.train()
        optimizer = make_optimizer(trained)
        for _ in range(2):
            loss_function(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return meter.peak_bytes


@contextmanager
def _put_back(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    values = [each.detach().to("cpu", copy=True) for each in trained]
    mode, states = model.training, RandomStates.now()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        model.train(mode)
        states.put_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def try_longest(trainer: "LoraTrainer", lengths: Sequence[int]) -> int:
    """Try the longest micro-batch that the trainer could meet and return the peak in bytes (PeakMeter's).

    ``lengths`` are those of the trainer's rows. Raises what a run would when memory runs out.
    """
    args = trainer.args
    if args.activation_checkpointing:
        # transformers turns it on when training starts.
        trainer.model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    rows = longest_rows(trainer.train_dataset, lengths, args.per_device_train_batch_size)
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    kind, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    prepared = _AsPrepared(trainer.model, trainer.accelerator.autocast)

    def loss(_: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        total, count = trained_token_loss(prepared, inputs)
        return total / max(count, 1)

    return try_batch(trainer.model, lambda trained: kind(trained, **options), batch, loss)


def try_longest_evaluation(trainer: "LoraTrainer", lengths: Sequence[int]) -> int:
    """Evaluate the longest batch that could be held out and return the peak in bytes (PeakMeter's).

    As try_longest; the batch is evaluated whole, and raises what it raises when it doesn't fit.
    """
    model, rows = trainer.model, trainer.args.per_device_eval_batch_size
    batch = trainer._prepare_inputs(trainer.data_collator(longest_rows(trainer.eval_dataset, lengths, rows)))
    prepared = _AsPrepared(model, trainer.accelerator.autocast)
    with _put_back(model, ()), torch.no_grad(), PeakMeter(next(model.parameters()).device) as meter:
        model.eval()
        token_losses(prepared, batch)
        return meter.peak_bytes


def longest_rows(dataset: Any, lengths: Sequence[int], count: int) -> list[Mapping[str, Any]]:
    """Return the ``count`` longest rows."""
    longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[:count]
    return [dataset[index] for index in longest]


class _AsPrepared(nn.Module):
    """The model as accelerate's ``prepare`` makes it for a run: under autocast, its outputs in float32."""

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.module = model
        self.autocast = autocast

    def forward(self, *args: Any, **named: Any) -> Any:
        """Run the model."""
        from accelerate.utils.operations import convert_to_fp32

        with self.autocast():
            outputs = self.module(*args, **named)
        return convert_to_fp32(outputs)
