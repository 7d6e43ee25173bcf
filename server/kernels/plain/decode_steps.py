"""Steps that only decode, in fixed shapes: so that a GPU can be given the whole of one at once.

Issued op by op, such a step takes a GPU as long for one row as for thirty-two: what it takes is being told. So rows and
contexts are padded to a few sizes; what a step says is copied into arrays that stay where they are, and all else is
derived from them on the device; and the work of a size, once recorded, is played back (cuda_graph.py).

Rows of padding are sequences of one token in the null block with no adapter. A step that is something else, or whose
adapters no table holds, or that reads an adapter's own vocabulary, is not for here. With or without recording the same
ops see the same shapes, so that answers are the same to the bit.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from manylora.server.kernels.plain.attention import AttentionPlan, row_group
from manylora.server.kernels.plain.invariance import MatmulLimits
from manylora.server.kernels.plain.lora_table import (
    LoraTable,
    TableForm,
    TableLora,
    lay_out_table,
    padded_weights,
)
from manylora.server.kernels.plain.mirrored import Mirrored
from manylora.server.kernels.plain.output_table import MirroredOutputs
from manylora.server.kernels.plain.plan import PlainPlan, StepTensors
from manylora.server.kernels.plain.rotary import angles
from manylora.server.kernels.plain.vocabulary import NO_VOCABULARY
from manylora.server.kernels.step import NULL_BLOCK, AttentionMetadata, Ints, StepAdapters, StepBatch

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LENGTHS = tuple(64 * factor << power for power in range(16) for factor in (2, 3))
"""Tokens of a step's longest context."""
FEW_KEYS, MOST_PADDING = 1 << 18, 4
"""A step of more keys with its padding isn't for here if they are so many times those of its contexts: one long context
makes all rows long."""
MOST_RECORDED = 48
"""Sizes whose work is kept recorded; those that were used longest ago go first."""
NOTHING = StepBatch(
    np.zeros(0, dtype=np.int32),
    AttentionMetadata.of_rows([], [], [], 1),
    StepAdapters.of_rows([]),
    np.zeros(0, dtype=np.int32),
)
log = logging.getLogger(__name__)

Call: TypeAlias = Callable[[], None]
Record: TypeAlias = Callable[[Call], Call]
"""Return a call that does again what the given one, which was called before, does on a device. Raises RuntimeError."""
Compute: TypeAlias = Callable[[PlainPlan], tuple[Tensor, Tensor]]
"""Return the logits of all rows of a plan, and which are finite."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """What steps with the same recorded work have in common."""

    rows: int
    length: int
    lora: TableForm


class DecodeSteps:
    """The sizes of one model's steps, each made when it is first met."""

    def __init__(
        self,
        compute: Compute,
        device: torch.device,
        dtype: torch.dtype,
        limits: MatmulLimits,
        fused: torch.dtype | None,
        record: Record | None,
    ) -> None:
        """``fused``: see plan_attention; ``record``: None: nothing is recorded, the ops are issued each time."""
        self._compute = compute
        self._device = device
        self._dtype = dtype
        self._limits = limits
        self._fused = fused
        self._record = record
        self._owner: tuple[object, object, object] | None = None
        self._steps: OrderedDict[StepSize, FixedStep] = OrderedDict()
        self._outputs: Outputs | None = None
        self._laid_out: tuple[StepAdapters, int] | None = None
        """What ``_table`` is of: a step's adapters, and the arena's gains as they were."""
        self._table: LoraTable | None = None

    def take(self, plan: PlainPlan, logits_rows: Ints) -> "tuple[Tensor, Tensor] | None":
        """Begin a step: return float32 logits [T, vocab] and bool [T] finite; None: it isn't one for here.

        Both are overwritten by the next step.
        """
        if plan.vocabulary:
            return None
        self._be_of(plan)
        size = self._size(plan, logits_rows)
        if size is None or self._table is None:
            return None
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = self._begin(plan, size)
        self._steps.move_to_end(size)
        step.fill(plan.batch, self._table)
        if step.again is None or not self._play(step.again):
            step.run()
            self._try_to_record(step)
        return step.outputs.of(len(plan.batch.token_ids))

    def _be_of(self, plan: PlainPlan) -> None:
        """Forget what was made for another model or other memory."""
        owner = (plan.weights, plan.kv, plan.arena)
        if self._owner is None or any(a is not b for a, b in zip(self._owner, owner, strict=True)):
            self._owner, self._outputs, self._laid_out = owner, None, None
            self._steps.clear()

    def _size(self, plan: PlainPlan, logits_rows: Ints) -> StepSize | None:
        batch = plan.batch
        count, attention = len(batch.token_ids), batch.attention
        alone = count == len(attention.context_lens) == len(logits_rows) and not len(batch.state_rows)
        if not count or not alone or (np.diff(attention.query_start) != 1).any():
            return None
        if (np.diff(logits_rows) != 1).any():
            return None
        laid_out = batch.adapters, plan.arena.output_rows.changes
        if self._laid_out is None or self._laid_out[0] is not laid_out[0] or self._laid_out[1] != laid_out[1]:
            self._laid_out = laid_out
            self._table = lay_out_table(batch.adapters, plan.arena.rows, self._limits, plan.arena.output_rows)
        rows = next((each for each in ROWS if each >= max(count, self._limits.least_rows)), None)
        longest = int(attention.context_lens.max())
        length = next((each for each in LENGTHS if each >= longest), None)
        if rows is None or length is None or self._table is None:
            return None
        if rows * length > max(FEW_KEYS, MOST_PADDING * int(attention.context_lens.sum())):
            return None
        return StepSize(rows, length, self._table.form)

    def _begin(self, plan: PlainPlan, size: StepSize) -> "FixedStep":
        while len(self._steps) >= MOST_RECORDED:
            self._steps.popitem(last=False)
        if self._outputs is None or len(self._outputs.finite) < size.rows:
            # Recorded work writes to the outputs that there were.
            self._steps.clear()
            rows = next(each for each in ROWS if each >= max(size.rows, 32)) if size.rows <= 32 else ROWS[-1]
            self._outputs = Outputs.of_size(rows, plan.weights.head.shape[0], self._device)
        return FixedStep(self._compute, plan, size, self._dtype, self._limits, self._fused, self._outputs)

    def _play(self, again: Call) -> bool:
        """Play a recording back. Return False where that is refused: nothing recorded is played from then on."""
        try:
            again()
        except RuntimeError as error:
            log.warning("decode steps are issued op by op from now on: one can't be played back: %s", error)
            self._record = None
            for step in self._steps.values():
                step.again = None
            return False
        return True

    def _try_to_record(self, step: "FixedStep") -> None:
        if self._record is None:
            return
        try:
            step.again = self._record(step.run)
        except RuntimeError as error:
            log.warning("decode steps are issued op by op from now on: they can't be recorded: %s", error)
            self._record = None


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where steps of all sizes leave what they computed."""

    logits: Tensor
    """float32 [rows, vocab]"""
    finite: Tensor
    """bool [rows]"""
    on_host: Tensor
    """The same, where the engine reads it without asking the device."""

    @classmethod
    def of_size(cls, rows: int, vocab: int, device: torch.device) -> "Outputs":
        """Make them."""
        finite = torch.zeros(rows, dtype=torch.bool, device=device)
        logits = torch.zeros(rows, vocab, dtype=torch.float32, device=device)
        on_host = torch.zeros(rows, dtype=torch.bool).pin_memory() if device.type == "cuda" else finite
        return cls(logits, finite, on_host)

    def of(self, count: int) -> tuple[Tensor, Tensor]:
        """Return those of the first rows, ``finite`` on the host: to be read once the device is done."""
        if self.on_host is not self.finite:
            self.on_host.copy_(self.finite, non_blocking=True)
        return self.logits[:count], self.on_host[:count]


class FixedStep:
    """A size: arrays that stay where they are, and the work on them."""

    def __init__(
        self,
        compute: Compute,
        plan: PlainPlan,
        size: StepSize,
        dtype: torch.dtype,
        limits: MatmulLimits,
        fused: torch.dtype | None,
        outputs: Outputs,
    ) -> None:
        self.outputs = outputs
        self.again: Call | None = None
        """Plays the recorded work back; None: it isn't recorded."""
        self._compute = compute
        self._model = plan.weights, plan.kv, plan.arena
        self._size, self._dtype, self._limits, self._fused = size, dtype, limits, fused
        self._blocks = -(-size.length // plan.kv.block_size)
        device = outputs.finite.device
        modules = len(size.lora.modules)
        self._numbers = Mirrored((size.rows * (3 + self._blocks),), torch.int32, device)
        """Ids, positions, slots and block tables."""
        self._rows = Mirrored((modules, size.lora.columns), torch.int32, device)
        self._weights = Mirrored((size.rows, modules, size.lora.columns), torch.float32, device)
        self._outputs = MirroredOutputs(size.lora.outputs, size.rows, modules, device)
        self._table: LoraTable | None = None

    def fill(self, batch: StepBatch, table: LoraTable) -> None:
        """Say what the step is."""
        rows, attention = self._size.rows, batch.attention
        columns, grid = np.split(self._numbers.host, [3 * rows])
        columns, grid = columns.reshape(3, rows), grid.reshape(rows, self._blocks)
        count, width = len(batch.token_ids), min(self._blocks, attention.block_tables.shape[1])
        columns[:, count:] = 0
        columns[:, :count] = batch.token_ids, attention.positions, attention.slots
        grid[:] = NULL_BLOCK
        grid[:count, :width] = attention.block_tables[:, :width]
        self._numbers.send()
        if table is not self._table and table.form.modules:
            self._rows.host[:] = table.rows
            self._weights.host[:] = padded_weights(table.weights, rows)
            self._rows.send()
            self._weights.send()
            self._outputs.fill(table.outputs)
        self._table = table

    def run(self) -> None:
        """Compute the step; leave what came out in ``outputs``."""
        weights, kv, arena = self._model
        logits, finite = self._compute(PlainPlan(NOTHING, weights, kv, arena, NO_VOCABULARY, self._derive))
        self.outputs.logits[: self._size.rows].copy_(logits)
        self.outputs.finite[: self._size.rows].copy_(finite)

    def _derive(self) -> StepTensors:
        weights, kv, arena = self._model
        rows, length = self._size.rows, self._size.length
        numbers = self._numbers.device.long()
        ids, positions, slots = numbers[: 3 * rows].view(3, rows)
        tables = numbers[3 * rows :].view(rows, self._blocks)
        windows = {layer.window for layer in weights.layers}
        group = row_group(None, positions, tables, length, kv.block_size, windows, self._fused)
        lora = None
        if self._size.lora.modules:
            of_step = self._rows.device, self._weights.device, self._outputs.on_device()
            lora = TableLora.of(self._size.lora, *of_step, arena.rows, self._dtype, self._limits)
        return StepTensors(rows, ids, AttentionPlan(slots, (group,), ()), lora, *angles(weights, positions))
