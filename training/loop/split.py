"""A micro-batch in smaller pieces: what a run does when one didn't fit into memory."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from manylora.training.loop.loss import IGNORED

Batch = Mapping[str, Tensor]


def rows_of(batch: Batch) -> int:
    """Return the number of rows."""
    return batch["input_ids"].shape[0]


def in_parts(batch: Batch, rows: int | None) -> list[Batch]:
    """Return ``batch`` as it is, or in pieces if only so many rows fit into memory at once."""
    return [batch] if rows is None or rows_of(batch) <= rows else list(pieces(batch, rows))


def pieces(batch: Batch, rows: int) -> Iterator[dict[str, Tensor]]:
    """Yield ``batch`` in pieces of at most ``rows`` rows, each cut to its own longest row.

    The loss is a sum over trained tokens, so the pieces' losses and gradients add up to the whole's.
    """
    for first in range(0, rows_of(batch), rows):
        piece = {name: value[first : first + rows] for name, value in batch.items()}
        yield _without_padding(piece)


def _without_padding(piece: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = piece.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return piece
    used = mask.bool() | (piece["labels"] != IGNORED)
    width = int(used.any(0).nonzero().max()) + 1 if bool(used.any()) else mask.shape[1]
    return {name: value[:, :width] for name, value in piece.items()}
