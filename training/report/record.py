"""What is kept of a run: everything that its report shows and that doing it again needs. Also written as run.json."""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manylora.adapters.durable import make_ordinary
from manylora.training.evaluate.evaluation import Sample
from manylora.training.report.surroundings import Machine

RECORD_FORMAT = 1
"""Raised when a field changes its meaning."""


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base model that was trained on."""

    name: str
    kind: str
    """dense, nf4, gptq or awq."""
    dtype: str
    fingerprint: str
    """sha256 over its configuration and weight files."""
    servable: str = ""
    """The sentence that says whether the server takes the adapter, and why."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One data file."""

    path: str
    sha256: str
    share: float | None = None


@dataclass(frozen=True, slots=True)
class DataFacts:
    """The data, what reading it said, and what its check found."""

    files: tuple[FileFacts, ...] = ()
    eval_files: tuple[FileFacts, ...] = ()
    sentences: tuple[str, ...] = ()
    check_summary: str = ""
    check_html: str = ""
    """The section that the data check writes for a report: HTML that has escaped whatever it quotes."""


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """GiB that were planned, part by part, and that were used at most."""

    planned: Mapping[str, float] = field(default_factory=dict)
    measured_peak_gib: float | None = None

    @property
    def planned_gib(self) -> float:
        """The plan's sum."""
        return sum(self.planned.values())


@dataclass(frozen=True, slots=True)
class Event:
    """Something worth knowing that happened at a step: a back-off, a batch that was split, a rank that grew."""

    step: int
    kind: str
    sentence: str


@dataclass(frozen=True, slots=True)
class RankChange:
    """From this step on the adapter has this rank."""

    step: int
    rank: int
    trained_parameters: int | None = None


@dataclass(frozen=True, slots=True)
class History:
    """What a run has logged, from its first step on, however often it was resumed."""

    log: tuple[Mapping[str, float], ...] = ()
    """transformers' log entries: step, epoch, and loss, learning_rate, grad_norm or eval_…"""
    ranks: tuple[RankChange, ...] = ()
    events: tuple[Event, ...] = ()

    def series(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) of every finite value logged as ``key``, in order of the steps.

        One for a step, the first: what comes later at the same step is another model, the best checkpoint's.
        """
        found: dict[float, float] = {}
        for entry in self.log:
            if key in entry and "step" in entry and math.isfinite(entry[key]):
                found.setdefault(float(entry["step"]), float(entry[key]))
        return sorted(found.items())


@dataclass(frozen=True, slots=True)
class SearchFacts:
    """The search for a learning rate before the run (--learning_rate auto). No steps: there was none."""

    rate: float | None = None
    """What was chosen."""
    steps: int = 0
    """Of all its short runs together."""
    seconds: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()
    """The range test: (rate, smoothed loss)."""
    trials: tuple[tuple[float, int, float], ...] = ()
    """(rate, steps, held-out loss)."""

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> "SearchFacts":
        """Read them from JSON, where an infinite loss is None."""
        rows = {
            name: tuple(tuple(math.inf if one is None else one for one in row) for row in kept.get(name, ()))
            for name in ("curve", "trials")
        }
        return cls(**{**kept, **rows})


@dataclass(frozen=True, slots=True)
class EvaluationFacts:
    """The held-out set's scores through the served base: without the adapter and with it."""

    kind: str = ""
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True)
class Results:
    """What came out. None: not measured."""

    train_loss: float | None = None
    eval_loss: float | None = None
    perplexity: float | None = None
    train_seconds: float | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    peak_memory_gib: float | None = None
    trained_parameters: int | None = None
    final_rank: int | None = None
    best_checkpoint: str | None = None
    adapter: str | None = None
    """The directory of the trained adapter."""
    published_step: int | None = None
    """Of the best checkpoint, where that is the adapter; None: the last step's is."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One adapter's run."""

    name: str
    """Of the adapter: what its report is headed with."""
    outcome: str
    """One sentence: finished, stopped early, diverged, interrupted."""
    command: tuple[str, ...]
    """The command line, word by word."""
    arguments: Mapping[str, Any]
    """Every argument with its value, defaults too."""
    versions: Mapping[str, str]
    seeds: Mapping[str, int]
    machine: Machine
    base: BaseFacts
    started: str = ""
    """ISO 8601, UTC."""
    data: DataFacts = DataFacts()
    memory: MemoryFacts = MemoryFacts()
    history: History = History()
    evaluation: EvaluationFacts = EvaluationFacts()
    search: SearchFacts = SearchFacts()
    results: Results = Results()

    def to_json(self) -> str:
        """Return the record as strict JSON: what isn't finite is null, paths are strings."""
        content = {"format": RECORD_FORMAT, **dataclasses.asdict(self)}
        return json.dumps(plain(content), ensure_ascii=False, indent=1, allow_nan=False)

    def write(self, path: Path) -> None:
        """Write run.json: whole or not at all."""
        write_whole(path, self.to_json())


def plain(value: Any) -> Any:
    """Return ``value`` as what strict JSON has: anything foreign as its text, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    item = getattr(value, "item", None)  # numpy's and torch's scalars
    if callable(item) and getattr(value, "ndim", None) == 0:
        return plain(item())
    return str(value)


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name beside it, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        make_ordinary(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
