"""Whether a run that ended did harm: the same rows, asked with the adapter and without it.

A run may end without having been stopped, and its last losses say nothing of what the base alone makes of such rows.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from manylora.training.errors import DoesNotFit
from manylora.training.loop.out_of_memory import is_out_of_memory
from manylora.training.loop.verdict import Verdict, compare


class Asked(Protocol):
    """A run whose rows can be asked."""

    def recent_losses(self) -> list[float]:
        """Return the losses of the last rows (nats per trained token), as the adapter is now."""

    def held_out_losses(self) -> list[float]:
        """Return those of some held-out rows, always the same; none where nothing is held out."""


def worse_than_base(run: Asked, base_alone: Callable[[], AbstractContextManager[None]]) -> str | None:
    """Return a sentence where the adapter clearly costs more than the base ``base_alone``; None where it doesn't.

    Held-out rows are asked, and where there are none the last ones that were trained on. None, too, where they don't
    fit into memory.
    """
    try:
        found = _held_against(run.held_out_losses, base_alone)
        which = "held-out"
        if not found.has_rows:
            found, which = _held_against(run.recent_losses, base_alone), "last"
    except DoesNotFit:
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    if not found.is_clearly_higher:
        return None
    cost = f"{found.now:.3g} nats a token" if math.isfinite(found.now) else "no number any more"
    return (
        f"worse than the base alone: its {found.rows} {which} rows cost {cost} with the adapter and {found.before:.3g}"
        " without it. Do not use it; train again with --learning_rate auto or a much lower rate"
    )


def _held_against(
    losses: Callable[[], list[float]], base_alone: Callable[[], AbstractContextManager[None]]
) -> Verdict:
    now = losses()
    if not now:
        return compare((), ())
    with base_alone():
        before = losses()
    return compare(before, now)
