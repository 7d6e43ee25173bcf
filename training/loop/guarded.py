"""What the trainer's guard looks at: each row's loss, the step's norm, the last rows and some held-out ones."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manylora.training.bases.initial import Residual
from manylora.training.errors import DoesNotFit
from manylora.training.loop.evaluation import row_losses
from manylora.training.loop.events import Events
from manylora.training.loop.guard import Rows
from manylora.training.loop.last_rows import MOST_ROWS, LastRows
from manylora.training.loop.masked import MaskedRows
from manylora.training.loop.split import pieces, rows_of
from manylora.training.loop.verdict import Verdict
from manylora.training.loop.watch import GuardSettings, Watch
from manylora.training.rank.policy import Moment

if TYPE_CHECKING:
    from manylora.training.loop.trainer import LoraTrainer

T = TypeVar("T")
HELD_OUT_ROWS = 32


class WindowRows:
    """The losses of a window's rows, summed up on the device that they were computed on."""

    def __init__(self) -> None:
        self.values: Tensor | None = None
        """float64 [4]: rows with a trained token, the sum of their losses and of the squares, rows without."""

    def add(self, losses: Tensor, owner: Tensor, rows: int) -> None:
        """Take in a micro-batch: every trained token's loss, float32 [N], and the row that it is in, int64 [N]."""
        found = losses.detach().double()
        counts = torch.bincount(owner, minlength=rows)
        means = torch.zeros(rows, dtype=torch.float64, device=found.device).index_add(0, owner, found)
        means = means / counts.clamp(min=1)
        trained = (counts > 0).sum()
        values = torch.stack([trained.double(), means.sum(), means.square().sum(), (rows - trained).double()])
        self.values = values if self.values is None else self.values + values


class GuardedTrainer(Trainer):
    """The part of LoraTrainer that looks at a step before it is taken."""

    events: Events
    watch: Watch
    masked: MaskedRows
    window_loss: float
    """This process's share of the loss of the step under way, or of the one just taken."""
    _window: list[Mapping[str, Tensor]]
    _rows: WindowRows
    _last_rows: LastRows
    micro_rows: int | None
    optimizer: Optimizer | None

    def moment(self) -> Moment:
        """Return where the run is."""
        assert self.optimizer is not None
        inner: Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return Moment(self.state.global_step, self.state.max_steps, inner, self.lr_scheduler)

    def start_watching(self, settings: GuardSettings) -> None:
        """Make the guard. Called when the trainer knows how its parameters are spread over processes."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        self.watch = Watch(self, settings, self.without_adapter, keeps_copies=not sharded)
        self.masked = MaskedRows()
        self._rows, self._last_rows = WindowRows(), LastRows()
        self.add_callback(_TellMasked(self))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Look at the step before it is taken."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        rows, masked, loss = self._seen_by_all()
        self.masked.add(masked, int(rows.count) + masked, self._note)
        for batch in self._window[-MOST_ROWS:]:
            self._last_rows.add(batch)
        if rows.count or masked == 0:
            value = None if norm is None else float(norm)
            self.watch.look(rows, value, loss=loss, scaled=self._scales_its_loss)
        elif not self.is_deepspeed_enabled:
            # Zeros would still move the weights by the optimiser's momentum and decay; what has no gradient stays.
            for parameter in self.model.parameters():
                parameter.grad = None
        return norm

    @property
    def step_is_skipped(self) -> bool:
        """Whether the gradients of the step under way overflowed in fp16 and are thrown away."""
        return bool(self.accelerator.optimizer_step_was_skipped)

    @property
    def _scales_its_loss(self) -> bool:
        return self.accelerator.scaler is not None or (self.is_deepspeed_enabled and self.args.fp16)

    def _seen_by_all(self) -> tuple[Rows, int, float]:
        """Return the rows of all processes, how many rows had no trained token, and the loss."""
        values = self._rows.values
        seen = torch.zeros(4, dtype=torch.float64, device=self.args.device) if values is None else values
        seen = torch.cat((seen, seen.new_tensor([self.window_loss])))
        if self.args.world_size > 1:
            # Not every accelerator has float64 reductions; sums of a step's rows need no more.
            reduced: Tensor = self.accelerator.reduce(seen.float().to(self.args.device), reduction="sum")
            seen = reduced.double()
        count, total, squares, masked, loss = seen.tolist()
        return Rows(count, total, squares), round(masked), loss / self.args.world_size

    def _note(self, sentence: str) -> None:
        self.events.say(self.state.global_step, "note", sentence)

    # --- what the guard asks

    @property
    def trained(self) -> nn.Module:
        """The model with the adapter."""
        model: nn.Module = self.model
        return model

    def recent_losses(self) -> list[float]:
        """Return the losses of the last rows, of all processes."""
        batches = list(self._last_rows)
        # A pass over shards takes all processes: one that has kept fewer batches goes through its last once more.
        passes = max(self._of_all([len(batches)]))
        losses = self._losses_of([*batches, *batches[-1:] * (passes - len(batches))])
        return [loss for each in self._of_all([losses]) for loss in each]

    def held_out_losses(self, most: int = HELD_OUT_ROWS) -> list[float]:
        """Return the losses of the first held-out rows, the same in each process."""
        rows: Any = self.eval_dataset
        if rows is None or isinstance(rows, dict) or not len(rows):
            return []
        count = min(most, len(rows))
        size = self.args.per_device_train_batch_size
        first = range(0, count, size)
        return self._losses_of(
            self.data_collator([rows[at] for at in range(start, min(start + size, count))]) for start in first
        )

    def agreed(self, verdict: Verdict) -> Verdict:
        """Return the first process's verdict."""
        if self.args.world_size == 1:
            return verdict
        found = [verdict]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def look_before_saving(self) -> None:
        """Let the guard look at what a checkpoint is to keep. Rows that don't fit into memory don't cost it."""
        try:
            self.watch.before_saving()
        except DoesNotFit:
            if self.args.world_size > 1:  # the others wait for this one's losses
                raise

    def _losses_of(self, batches: Iterable[Mapping[str, Tensor]]) -> list[float]:
        """Return each row's loss per trained token, without dropout; rows without a trained token are left out."""
        trainer = cast("LoraTrainer", self)  # what this is a part of
        was_training = self.model.training
        self.model.eval()
        found: list[float] = []
        try:
            for batch in batches:
                for piece in pieces(batch, self.micro_rows or rows_of(batch)):
                    sums, counts = row_losses(trainer, piece)
                    found += (sums[counts > 0] / counts[counts > 0]).tolist()
        finally:
            self.model.train(was_training)
        return found

    def _of_all(self, mine: list[T]) -> list[T]:
        """Return what all processes have, one after the other."""
        if self.args.world_size == 1:
            return mine
        gathered: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(gathered, mine)
        return [each for of_one in gathered for each in of_one]

    def without_adapter(self) -> AbstractContextManager[None]:
        """Have the base alone, for a while."""
        return adapter_off(self.model)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Have the base alone, for a while. peft's own switch changes what requires gradients, which shards don't take."""
    layers: list[Any] = [each for each in model.modules() if hasattr(each, "_disable_adapters")]
    before = [each._disable_adapters for each in layers]
    starts = [each for each in model.modules() if isinstance(each, Residual)]
    for each in layers:
        each._disable_adapters = True
    for start in starts:
        start.is_off = True
    try:
        yield
    finally:
        for start in starts:
            start.is_off = False
        for each, value in zip(layers, before, strict=True):
            each._disable_adapters = value


class _TellMasked(TrainerCallback):
    """Says at the end how many rows were skipped."""

    def __init__(self, trainer: GuardedTrainer) -> None:
        self._trainer = trainer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Say it."""
        sentence = self._trainer.masked.sentence()
        if sentence is not None:
            self._trainer.events.say(state.global_step, "note", sentence)
