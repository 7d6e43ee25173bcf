"""What the hostile bar makes of what was seen: promises kept or broken, and which kinds were about when."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manylora.loadtest.checks.bars.hostile.exchange import HUNG, NO_ANSWER
from manylora.loadtest.checks.bars.hostile.streams import Watch
from manylora.loadtest.checks.bars.quiet import MIB
from manylora.loadtest.checks.bars.report import Report

DOCUMENTED = frozenset(
    {100, 200, 201, 204, 307, 400, 401, 403, 404, 405, 408, 409, 413, 414, 429, 431, 503, 507}
)
"""What a hostile request may be answered with."""
OVERFLOWING = "huge adapters"
"""The kind whose own requests, and no others, may fail with 500, because their adapter's values aren't numbers."""
WORST = 8
"""How many of the worst gaps and kinds are told."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be felt."""

    gap_medians: float = 5.0
    """A gap between two tokens, in medians of its lane in the same run."""
    health_seconds: float = 0.5
    resident_bytes: int = 192 * MIB
    """By how much resident memory may be larger afterwards, apart from the processes that are kept."""
    workers: int = 12
    """Processes that the server keeps for adapters' templates and tokenizers: 4 and 8 at most."""
    worker_bytes: int = 64 * MIB
    """What one of them may hold while it waits."""
    descriptors: int = 8

    def came_back(self, before: "Usage", after: "Usage") -> bool:
        """Whether all that was taken has been given back."""
        kept = max(0, after.children - before.children)
        return (
            after.children <= self.workers
            and after.resident - before.resident <= self.resident_bytes + kept * self.worker_bytes
            and after.descriptors - before.descriptors <= self.descriptors
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """What a server and its children hold of the machine."""

    resident: int
    descriptors: int
    threads: int
    children: int


@dataclass(frozen=True, slots=True)
class Done:
    """How one exchange of a hostile client ended; see exchange.Outcome."""

    kind: str
    awaited: bool
    """Whether the client waited for the whole answer."""
    status: int
    code: str
    message: str
    size: int
    began: float
    ended: float

    @property
    def documented(self) -> bool:
        """Whether it may end so."""
        if self.status == NO_ANSWER:
            return not self.awaited
        if self.status == 500:
            return self.kind == OVERFLOWING and self.code == "step_failed" and "not finite" in self.message
        # What the server can't do for now says why.
        return self.status in DOCUMENTED and (self.status < 500 or bool(self.code))


def report_streams(
    report: Report,
    alone: Mapping[tuple[str, int], list[tuple[str, float]]],
    seen: Watch,
    limits: Limits,
) -> None:
    """Compare the streams' tokens with those alone, and their gaps with their median."""
    _report_tokens(report, alone, seen)
    lanes = sorted({name for name, _ in seen.streams})
    over, excused, worst = [], 0, 0.0
    for lane in lanes:
        median = seen.median_gap(lane)
        for begin, end in seen.gaps(lane):
            felt = end - begin - seen.stalled(begin, end)
            worst = max(worst, felt / median)
            if felt > limits.gap_medians * median:
                over.append(felt)
            elif end - begin > limits.gap_medians * median:
                excused += 1
    report.check(
        f"no gap between two tokens is over {limits.gap_medians:g} × the lane's median",
        f"{worst:.1f} ×; {len(over)} over it" + (f", the longest {1000 * max(over):.0f} ms" if over else ""),
        not over and bool(lanes),
    )
    if excused:
        report.note(f"{excused} gaps are over it only with the time in which the client itself stood still")
    medians = ", ".join(f"{lane} {1000 * seen.median_gap(lane):.1f}" for lane in lanes)
    report.note(f"median gaps in ms: {medians}")


def _report_tokens(
    report: Report, alone: Mapping[tuple[str, int], list[tuple[str, float]]], seen: Watch
) -> None:
    wrong, total = [], 0
    for key, streams in seen.streams.items():
        for stream in streams:
            total += 1
            found = stream.tokens()
            if found != alone[key]:
                same = [a == b for a, b in zip(found, alone[key], strict=False)]
                at = same.index(False) if False in same else len(same)
                wrong.append(f"{key[0]}: token {at} is {found[at] if at < len(found) else 'missing'}")
    report.share(
        "well-behaved streams: tokens and log probabilities are bit for bit those alone",
        total - len(wrong),
        total,
        wrong,
    )


def report_health(report: Report, seen: Watch, limits: Limits) -> None:
    """Judge /health."""
    waits = [end - begin - seen.stalled(begin, end) for begin, end, _ in seen.health]
    good = sum(
        status == 200 and wait <= limits.health_seconds
        for wait, (_, _, status) in zip(waits, seen.health, strict=True)
    )
    report.share(
        f"/health answers within {limits.health_seconds:g} s",
        good,
        len(waits),
        [f"the slowest after {max(waits):.2f} s" if waits else ""],
    )
    report.note(f"the slowest of {len(waits)} /health took {1000 * max(waits, default=0):.0f} ms")


def report_outcomes(report: Report, outcomes: Sequence[Done]) -> None:
    """Judge how the hostile exchanges ended."""
    wrong = [done for done in outcomes if not done.documented]
    hung = [done for done in outcomes if done.status == HUNG]
    counted = Counter(f"{done.kind}: {done.status} {done.code} {done.message[:90]}" for done in wrong)
    examples = [f"{count} × {what}" for what, count in counted.most_common(WORST)]
    report.share(
        "hostile requests end with a documented status", len(outcomes) - len(wrong), len(outcomes), examples
    )
    for example in examples[3:]:
        report.note(f"undocumented: {example}")
    report.check("none hangs", f"{len(hung)} hang", not hung and bool(outcomes))


def report_usage(report: Report, before: Usage, after: Usage, peak: int, limits: Limits) -> None:
    """Judge what the server keeps of the machine."""
    report.check(
        f"memory comes back, up to {limits.resident_bytes // MIB} MiB and {limits.worker_bytes // MIB} for each process"
        f" kept for templates, and descriptors up to {limits.descriptors}",
        f"{before.resident // MIB} MiB, {(after.resident - before.resident) / MIB:+.0f} MiB,"
        f" {after.children - before.children:+} processes;"
        f" {after.descriptors - before.descriptors:+} descriptors",
        limits.came_back(before, after),
    )
    report.note(
        f"resident memory in MiB: {before.resident // MIB} before, {peak // MIB} at its peak,"
        f" {after.resident // MIB} after;"
        f" threads {before.threads} and {after.threads}, child processes {before.children} and {after.children}"
    )


def note_kinds(report: Report, seen: Watch, outcomes: Sequence[Done]) -> None:
    """Tell each kind's statuses and slowest exchange, and who was about in the worst gaps."""
    by_kind: dict[str, list[Done]] = defaultdict(list)
    for done in outcomes:
        by_kind[done.kind].append(done)
    for kind in sorted(by_kind):
        counts = Counter(_shown(done.status) for done in by_kind[kind])
        slowest = max(done.ended - done.began for done in by_kind[kind])
        shown = ", ".join(f"{status} × {count}" for status, count in sorted(counts.items()))
        report.note(f"{kind}: {shown}; slowest {slowest:.1f} s")
    for what, spans in (("gap", _worst_gaps(seen)), ("/health", _worst(seen, [s[:2] for s in seen.health]))):
        for begin, end in spans:
            about = Counter(done.kind for done in outcomes if done.began < end and done.ended > begin)
            names = ", ".join(f"{kind} × {count}" for kind, count in about.most_common(6))
            report.note(f"{what} of {1000 * (end - begin):.0f} ms beside {names}")
    stalled = sum(end - begin for begin, end in seen.lags)
    report.note(
        f"the measuring client itself stood still for {stalled:.1f} s in all, in {len(seen.lags)} pieces"
    )


def _worst_gaps(seen: Watch) -> list[tuple[float, float]]:
    gaps = [gap for lane in {name for name, _ in seen.streams} for gap in seen.gaps(lane)]
    return _worst(seen, gaps)


def _worst(seen: Watch, spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the longest spans, of those that overlap only the longest."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans, key=lambda span: span[0] - span[1] + seen.stalled(*span)):
        if all(end <= other[0] or begin >= other[1] for other in found):
            found.append((begin, end))
        if len(found) == WORST:
            break
    return found


def _shown(status: int) -> str:
    return {NO_ANSWER: "left", HUNG: "hung", -2: "not connected"}.get(status, str(status))
