"""The last rows that a run trained on, kept so that they can be asked again."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from manylora.training.loop.split import rows_of

MOST_ROWS = 8


class LastRows:
    """The last ``MOST_ROWS`` rows, in the micro-batches they came in."""

    def __init__(self) -> None:
        self._batches: list[Mapping[str, Tensor]] = []

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Keep the rows of a micro-batch, and forget the oldest."""
        # Copies: a slice would keep the whole batch.
        self._batches.append({name: value[-MOST_ROWS:].clone() for name, value in batch.items()})
        while sum(map(rows_of, self._batches[1:])) >= MOST_ROWS:
            del self._batches[0]

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return iter(self._batches)
