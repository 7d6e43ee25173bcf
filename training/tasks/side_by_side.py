"""The loop: in each round every task takes one optimiser step, their micro-batches going through the base together.

A task with fewer steps is done earlier and leaves the batches; one that diverges is stopped, and the others go on.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from manylora.training.errors import DoesNotFit
from manylora.training.loop.evaluation import LARGEST_EXPONENT
from manylora.training.loop.guard import Rows
from manylora.training.loop.out_of_memory import is_out_of_memory
from manylora.training.tasks.batch import MixedBatch, Row, mix
from manylora.training.tasks.member import Member, WindowLoss
from manylora.training.tasks.mixed_base import MixedBase

Window = list[list[Row]]
"""The micro-batches of one task's step."""


class Observer(Protocol):
    """Who is told what happens, between two rounds."""

    def logged(self, run: "SideBySide", member: Member, values: dict[str, float]) -> None:
        """Take in a task's loss, learning_rate and grad_norm, or an evaluation's eval_loss, …"""

    def round_done(self, run: "SideBySide") -> None:
        """Notice that every unfinished task has taken a step."""


@dataclass
class SideBySide:
    """Trains ``members``, whose models are those of ``base`` in the same order."""

    base: MixedBase
    members: Sequence[Member]
    observer: Observer
    rounds: int = 0
    """Done so far."""
    tokens: list[int] = field(init=False)
    """Of each task, that went through the base in training since this process began."""
    pieces: int = 1
    """Into how many a mixed batch is split, since a whole one didn't fit into memory."""
    eval_pieces: int = 1
    """The same of an evaluation's."""

    def __post_init__(self) -> None:
        self.tokens = [0] * len(self.members)
        for task, member in enumerate(self.members):
            member.losses_of = partial(self._losses_of, task)

    @property
    def total_rounds(self) -> int:
        """Rounds until the longest task is done."""
        return max(member.total_steps for member in self.members)

    def run(self) -> None:
        """Train until every task is finished. Raises DoesNotFit when one row of each task is too much."""
        while any(not member.finished for member in self.members):
            self._round()
        self.evaluate([member for member in self.members if not member.stopped])
        for member in self.members:
            member.hold_against_base()

    def evaluate(self, members: Sequence[Member]) -> None:
        """Judge the held-out rows of ``members``, mixed too, and log eval_loss and eval_perplexity."""
        chosen = [member if member in members and len(member.eval_rows) else None for member in self.members]
        sums = torch.zeros(len(self.members), dtype=torch.float64)
        counts = [0] * len(self.members)
        batches = [_eval_batches(member) if member is not None else [] for member in chosen]
        for at in range(max(map(len, batches))):
            rows = [
                [member.eval_rows[number] for number in own[at]]
                if member is not None and at < len(own)
                else []
                for member, own in zip(chosen, batches, strict=True)
            ]
            more, trained = self._judge(rows)
            sums += more
            counts = [count + new for count, new in zip(counts, trained, strict=True)]
        for member, total, count in zip(chosen, sums.tolist(), counts, strict=True):
            if member is not None:
                self._tell(member, _scores(total / count if count else math.nan, count))

    def _judge(self, rows: Sequence[Sequence[Row]]) -> tuple[torch.Tensor, list[int]]:
        """Return each task's summed loss, float64 [tasks], and trained tokens; in pieces once memory has run out."""
        while True:
            try:
                sums, counts = torch.zeros(len(rows), dtype=torch.float64), [0] * len(rows)
                for batch in _pieces(rows, self.eval_pieces):
                    sums += self.base.evaluate(batch).sums.double().cpu()
                    counts = [count + _trained(batch, task) for task, count in enumerate(counts)]
                return sums, counts
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the except block, so that the error's frames, which hold tensors, are gone.
            if self.eval_pieces >= sum(map(len, rows)):
                raise DoesNotFit(
                    "out of memory while evaluating one row at a time: add --q_lora, or evaluate on shorter rows"
                )
            self.eval_pieces *= 2
            self._say_split(f"evaluated rows are split in {self.eval_pieces} from now on")

    def _round(self) -> None:
        active = [not member.finished for member in self.members]
        windows = [
            member.open_window() if on else [] for member, on in zip(self.members, active, strict=True)
        ]
        losses = self._gradients(windows)
        self.rounds += 1
        for member, on, losses_of_it in zip(self.members, active, losses, strict=True):
            values = member.close_window(losses_of_it) if on else None
            if values is not None:
                self.observer.logged(self, member, values)
        due = [
            member
            for member, on in zip(self.members, active, strict=True)
            if on and member.evaluation_is_due()
        ]
        if due:
            self.evaluate(due)
        self.observer.round_done(self)

    def _losses_of(self, task: int, rows: Sequence[Row]) -> list[float]:
        """Return a task's losses on ``rows``, without dropout, in passes no larger than its micro-batches."""
        size = max(1, self.members[task].args.train_batch_size // self.pieces)
        found: list[float] = []
        for at in range(0, len(rows), size):
            batch = mix([rows[at : at + size] if other == task else [] for other in range(len(self.members))])
            with torch.no_grad():
                found += self.base.evaluate(batch).rows(task)
        return found

    def _gradients(self, windows: Sequence[Window]) -> list[WindowLoss]:
        """Leave each task's gradients in its parameters; return the losses. Starts anew, in pieces, out of memory."""
        while True:
            try:
                return self._accumulate(windows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the except block, so that the error's frames, which hold tensors, are gone.
            self._use_smaller_pieces(windows)

    def _accumulate(self, windows: Sequence[Window]) -> list[WindowLoss]:
        batches = [
            batch for rows_by_task in _micro_batches(windows) for batch in _pieces(rows_by_task, self.pieces)
        ]
        counts = [sum(_trained(batch, task) for batch in batches) for task in range(len(self.members))]
        weights = [1 / max(count, 1) for count in counts]
        smoothing = [member.args.label_smoothing_factor for member in self.members]
        sums = torch.zeros(len(windows), device=self.base.device)
        rows: list[list[float]] = [[] for _ in windows]
        for number, batch in enumerate(batches):
            seeds = [member.dropout_seed(number) for member in self.members]
            losses = self.base.backward(batch, weights, seeds, smoothing)
            sums += losses.sums
            for task, found in enumerate(rows):
                found.extend(losses.rows(task))
        for batch in batches:
            self.tokens = [
                seen + end - start for seen, (start, end) in zip(self.tokens, batch.spans, strict=True)
            ]
        return [
            WindowLoss(total * weight, Rows.of(found), sum(map(len, window)))
            for total, weight, found, window in zip(sums.tolist(), weights, rows, windows, strict=True)
        ]

    def _use_smaller_pieces(self, windows: Sequence[Window]) -> None:
        for member in self.members:
            member.optimizer.zero_grad()
        rows = max(sum(map(len, rows_by_task)) for rows_by_task in _micro_batches(windows))
        if self.pieces >= rows:
            raise DoesNotFit(
                "out of memory with one row at a time: add --gradient_checkpointing, --q_lora, or a smaller"
                " --model_max_length; `manylora plan` says what each saves"
            )
        self.pieces *= 2
        self._say_split(f"mixed batches are split in {self.pieces} from now on")

    def _say_split(self, what: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for member in self.members:
            if not member.stopped:
                member.events.say(
                    member.step, "split", f"out of memory: {what}; losses and steps stay what they are"
                )

    def _tell(self, member: Member, values: dict[str, float]) -> None:
        member.log(values)
        self.observer.logged(self, member, values)


def _trained(batch: MixedBatch, task: int) -> int:
    start, end = batch.trained_spans[task]
    return end - start


def _micro_batches(windows: Sequence[Window]) -> Iterator[list[list[Row]]]:
    """Yield the rows of every task, micro-batch by micro-batch; a task with fewer of them has none in the last."""
    for micro in range(max(map(len, windows))):
        yield [window[micro] if micro < len(window) else [] for window in windows]


def _pieces(rows_by_task: Sequence[Sequence[Row]], pieces: int) -> list[MixedBatch]:
    """Return a mixed batch in at most so many parts, each with its share of all rows in their order."""
    flat = [(task, row) for task, rows in enumerate(rows_by_task) for row in rows]
    size = -(-len(flat) // pieces)
    parts = [flat[start : start + size] for start in range(0, len(flat), size)]
    tasks = range(len(rows_by_task))
    return [mix([[row for task, row in part if task == wanted] for wanted in tasks]) for part in parts]


def _eval_batches(member: Member) -> list[range]:
    size = member.args.eval_batch_size
    return [range(at, min(at + size, len(member.eval_rows))) for at in range(0, len(member.eval_rows), size)]


def _scores(loss: float, tokens: int) -> dict[str, float]:
    perplexity = (
        float(torch.tensor(min(loss, LARGEST_EXPONENT), dtype=torch.float64).exp()) if loss == loss else loss
    )
    return {"eval_loss": loss, "eval_perplexity": perplexity, "eval_tokens": float(tokens)}
