"""What a check over many made-up cases has seen, and what was wrong."""

from collections import Counter
from dataclasses import dataclass, field

MOST_SHOWN = 50


@dataclass(slots=True)
class Findings:
    """Grows as the cases are gone through."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def report(self) -> int:
        """Print both, of what was wrong the first ones; return the exit status: 1 if anything was."""
        print(", ".join(f"{count:,} {what}" for what, count in sorted(self.counts.items())))  # noqa: T201  # the result
        for wrong in self.wrong[:MOST_SHOWN]:
            print(wrong)  # noqa: T201  # the result
        print(f"{len(self.wrong)} wrong")  # noqa: T201  # the result
        return 1 if self.wrong else 0
