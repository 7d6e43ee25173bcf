"""Rows without a trained token, as a cut leaves them: counted, said once, and passed over by the loss."""

from collections.abc import Callable


class MaskedRows:
    """How many of the rows that a run has drawn had nothing to learn from."""

    def __init__(self) -> None:
        self.count = 0
        self.drawn = 0

    def add(self, masked: int, drawn: int, say: Callable[[str], None]) -> None:
        """Count a step's rows, and say it at the first one."""
        self.drawn += drawn
        if masked and not self.count:
            say(
                "a row has no trained token, most often since --model_max_length cut its answer off: such rows are"
                " skipped, they are no part of the loss; `manylora data check` lists them"
            )
        self.count += masked

    def sentence(self) -> str | None:
        """Say how many there were; None where there were none."""
        if not self.count:
            return None
        return (
            f"{self.count:,} of the {self.drawn:,} rows that were drawn had no trained token and were skipped"
        )
