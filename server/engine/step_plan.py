"""What a step is to be: its rows, the arena's changes, and the draft that the scheduler fills. Integers only."""

from dataclasses import dataclass, field
from typing import NamedTuple

from manylora.server.engine.activation import AdapterKey
from manylora.server.engine.adapter_cache import ArenaChange
from manylora.server.engine.pace import Allowance
from manylora.server.engine.sequence import LiveRequest, Sequence

LOGPROB_CHUNK = 256
"""Prompt tokens a step when each needs its logits: a row of 150,000 floats takes 0.6 MB."""
LOGPROB_COST = 3
"""Prompt tokens that one of these takes the time of."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step and of the queue."""

    max_running: int = 256
    max_step_tokens: int = 2048
    adapter_timeout: float = 30.0
    """Seconds that a request may wait for its adapters."""
    max_overtakes: int = 64
    """Times that a request waiting for rows may be overtaken."""
    max_step_context: int = 8192
    """Tokens that a step's decodes attend to: each client's request has one sequence in every step, and further ones
    as far as this goes."""


class ScheduledRow(NamedTuple):
    """Tokens [start, start + length) of a sequence; ``samples`` when its next token comes out of them."""

    sequence: Sequence
    start: int
    length: int
    samples: bool

    @property
    def cost(self) -> int:
        """How much of a step's budget it takes."""
        return self.length * (LOGPROB_COST if self.sequence.wants_prompt_logprobs else 1)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to do in one step, changes of the arena first."""

    rows: tuple[ScheduledRow, ...]
    changes: tuple[ArenaChange, ...]
    admitted: tuple[LiveRequest, ...]
    preempted: tuple[Sequence, ...]
    expired: tuple[LiveRequest, ...]
    """Waited too long for their adapters."""
    loads: frozenset[int]
    """Adapters to be read from disk."""


@dataclass(slots=True)
class Draft:
    """A step while it is being decided."""

    budget: int
    """Tokens that it still has room for."""
    allowance: Allowance = field(default_factory=Allowance.everything)
    rows: dict[int, ScheduledRow] = field(default_factory=dict)
    """By number of the sequence."""
    changes: list[ArenaChange] = field(default_factory=list)
    admitted: list[LiveRequest] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    expired: list[LiveRequest] = field(default_factory=list)
    head: LiveRequest | None = None
    """The first request that finds no rows: nobody behind it may take rows."""
    filled: set[int] = field(default_factory=set)
    """Adapters whose rows will be filled before this step."""
    in_pieces: bool = False
    """Whether some of the changes take several steps: what uses their adapters has no part in this one."""

    @property
    def full(self) -> bool:
        """Whether no further chunk has a place."""
        return self.budget <= 0 or self.allowance.spent

    def add(self, sequence: Sequence) -> None:
        """Let the sequence compute what has a place: its next token, or a chunk of what it has to compute."""
        start = sequence.num_computed_tokens
        left = len(sequence.token_ids) - start
        length = left if left == 1 else sequence.stages.alike(start, min(left, self._most(sequence, start)))
        samples = sequence.pooling is None and length == left
        row = ScheduledRow(sequence, start, length, samples)
        self.rows[sequence.number] = row
        self.budget -= row.cost
        if left > 1:
            self.allowance.take(start, row.cost)

    def _most(self, sequence: Sequence, start: int) -> int:
        """Return how many tokens a chunk may have that begins there."""
        most = max(1, min(self.budget, self.allowance.tokens(start)))
        if sequence.wants_prompt_logprobs:
            most = min(LOGPROB_CHUNK, -(-most // LOGPROB_COST))
        return most

    def drop(self, sequence: Sequence) -> None:
        """Take the sequence out again, if it is in."""
        row = self.rows.pop(sequence.number, None)
        if row is not None:
            self.budget += row.cost
            if sequence.num_to_compute > 1:
                self.allowance.give_back(row.start, row.cost)

    def plan(self, loads: frozenset[int]) -> StepPlan:
        """Return what has been decided."""
        return StepPlan(
            tuple(sorted(self.rows.values(), key=_place)),
            tuple(self.changes),
            tuple(self.admitted),
            tuple(self.preempted),
            tuple(self.expired),
            loads,
        )


def _place(row: ScheduledRow) -> tuple[bool, AdapterKey]:
    """Return what rows are in order of: decodes first, and those of the same adapters together."""
    return row.length > 1, row.sequence.stages.at(row.start)
