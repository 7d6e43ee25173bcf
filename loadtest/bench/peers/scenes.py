"""What the peers are asked, what counts of their answers, and the bars that manylora is held to beside them. Pure."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from manylora.loadtest.material.text_table import milliseconds, text_table

Report = Mapping[str, Any]
Models = Literal["base", "one", "own"]
Figure = Literal["ms", "decode", "total", "first"]
OURS, LLAMA, VLLM, PEFT = "manylora", "llama.cpp", "vLLM", "peft"
PEERS = (OURS, LLAMA, VLLM, PEFT)
UNITS: Mapping[Figure, str] = {
    "ms": "ms a token",
    "decode": "tokens/s, decoding",
    "total": "tokens/s, prompts included",
    "first": "first token, ms",
}


@dataclass(frozen=True, slots=True)
class Scene:
    """A load: streams in a closed loop."""

    name: str
    streams: int
    models: Models
    figures: tuple[Figure, ...]
    input_tokens: int = 64
    output_tokens: int = 64
    peers: tuple[str, ...] = PEERS
    """Who is asked: others can't, or it would say nothing."""


SCENES = (
    Scene("1, base", 1, "base", ("ms",)),
    Scene("1, adapter", 1, "one", ("ms",)),
    Scene("8, base", 8, "base", ("decode",)),
    Scene("8, one adapter", 8, "one", ("decode",)),
    Scene("8, each its own", 8, "own", ("total", "decode")),
    Scene("32, base", 32, "base", ("decode",), peers=(OURS, VLLM, PEFT)),
    Scene("32, each its own", 32, "own", ("decode",), peers=(OURS, PEFT)),
    Scene("first of 1,024, adapter", 1, "one", ("first",), 1024, 2, (OURS, LLAMA, VLLM)),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One peer's figures in one scene; NaN where it has none."""

    seconds_per_token: float
    """Of a stream, median, after the first token."""
    total: float
    """Tokens a second of all streams, prompts included."""
    first: float
    """Seconds, median."""
    streams: int
    errors: int

    @classmethod
    def of_serve(cls, report: Report, streams: int) -> "Measured":
        """Take the figures of a `bench serve`."""
        each = [sample["between_tokens_seconds"] for sample in report["samples"] if sample["error"] is None]
        between = [value for value in each if value is not None]
        return cls(
            statistics.median(between) if between else math.nan,
            float(report["tokens_per_second"]),
            _number(report["first_token_seconds"]["p50"]),
            streams,
            sum(report["errors"].values()),
        )

    @classmethod
    def of_peft(cls, report: Report, streams: int) -> "Measured":
        """Take the figures of a `bench peft`: one batch from prompt to end, so it has no more than a total."""
        return cls(math.nan, float(report["tokens_per_second"]), math.nan, streams, 0)

    def figure(self, name: Figure) -> float:
        """Return a figure in its unit."""
        return {
            "ms": 1000 * self.seconds_per_token,
            "decode": self.streams / self.seconds_per_token,
            "total": self.total,
            "first": 1000 * self.first,
        }[name]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


Results = Mapping[tuple[str, str], Measured]
"""By peer and scene."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What manylora is to reach in a scene: its figure beside the best of others'."""

    scene: str
    figure: Figure
    against: tuple[tuple[str, str], ...]
    """Peers and scenes."""
    limit: float
    at_most: bool = False
    """Whether the ratio of the figures (ours by theirs) must not be over ``limit``; else how many times as fast ours is
    must not be under it."""

    def ratio(self, results: Results) -> float:
        """Return the ratio; NaN where one side is missing."""
        ours = results.get((OURS, self.scene))
        theirs = [results[key].figure(self.figure) for key in self.against if key in results]
        theirs = [value for value in theirs if not math.isnan(value)]
        if ours is None or not theirs:
            return math.nan
        mine = ours.figure(self.figure)
        shorter_is_better = self.figure in ("ms", "first")
        best = min(theirs) if shorter_is_better else max(theirs)
        return best / mine if shorter_is_better and not self.at_most else mine / best

    def met(self, ratio: float) -> bool:
        """Whether a ratio reaches it."""
        return ratio <= self.limit if self.at_most else ratio >= self.limit

    def cells(self, results: Results) -> list[str]:
        """Return the table's row."""
        ratio = self.ratio(results)
        beside = ", ".join(
            peer if scene == self.scene else f"{peer}'s {scene}" for peer, scene in self.against
        )
        shown = "–" if math.isnan(ratio) else f"{ratio:.2f}"
        verdict = "–" if math.isnan(ratio) else "met" if self.met(ratio) else "missed"
        sign = "≤" if self.at_most else "≥"
        return [self.scene, UNITS[self.figure], beside, shown, f"{sign} {self.limit:g}", verdict]


def _both(scene: str) -> tuple[tuple[str, str], ...]:
    return (LLAMA, scene), (VLLM, scene)


BARS = (
    Bar("1, base", "ms", ((LLAMA, "1, base"),), 0.70, at_most=True),
    Bar("1, adapter", "ms", ((LLAMA, "1, adapter"),), 0.70, at_most=True),
    Bar("8, base", "decode", _both("8, base"), 2.7),
    Bar("8, one adapter", "decode", _both("8, one adapter"), 3.0),
    Bar("8, each its own", "total", ((VLLM, "8, each its own"),), 5.0),
    Bar("8, each its own", "total", ((LLAMA, "8, each its own"),), 4.5),
    Bar("8, each its own", "decode", ((OURS, "8, base"),), 0.80),
    Bar("32, base", "decode", ((VLLM, "32, base"),), 1.9),
    Bar("32, each its own", "decode", ((OURS, "32, base"),), 0.75),
    Bar("first of 1,024, adapter", "first", ((VLLM, "first of 1,024, adapter"),), 9.0),
    Bar("first of 1,024, adapter", "first", ((LLAMA, "first of 1,024, adapter"),), 2.0),
)


def figures_table(results: Results, peers: tuple[str, ...], scenes: tuple[Scene, ...]) -> str:
    """Return what each peer gave."""
    rows = []
    for scene in scenes:
        for figure in dict.fromkeys((*scene.figures, *(("total",) if PEFT in peers else ()))):
            cells = [
                _shown(results[peer, scene.name].figure(figure)) if (peer, scene.name) in results else "–"
                for peer in peers
            ]
            rows.append([f"{scene.name}: {UNITS[figure]}", *cells])
    return text_table(["streams", *peers], rows)


def bars_table(results: Results) -> str:
    """Return the bars and how near they are."""
    head = ("streams", "figure", "beside", "ratio", "bar", "")
    return text_table(head, [bar.cells(results) for bar in BARS if (OURS, bar.scene) in results])


def _shown(value: float) -> str:
    return milliseconds(value / 1000)
