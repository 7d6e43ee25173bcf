"""What `manylora bench serve` measured, as numbers, as a table and as JSON."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from manylora.loadtest.bench.fairness import Fairness
from manylora.loadtest.bench.goodput import Goodput
from manylora.loadtest.bench.open_loop import Lateness
from manylora.loadtest.bench.serve import Finished, Measured, ServeBench
from manylora.loadtest.material.environment import environment
from manylora.loadtest.material.summary import Spread
from manylora.loadtest.material.text_table import milliseconds, text_table

SHOWN = 3
"""Mismatches and error messages that are written out."""
EXCERPT = 60


@dataclass(frozen=True, slots=True)
class ServeReport:
    """The figures of a run. Latencies and tokens are of the requests that ended without an error."""

    bench: ServeBench
    measured: Measured
    first_token: Spread
    """Seconds from asking to the first text."""
    between_tokens: Spread
    """Seconds between one piece of text and the next."""
    end_to_end: Spread
    output_tokens: int
    prompt_tokens: Spread
    """Of each request, as usage says."""
    tokens_counted_by: str
    short: int
    """Answers of fewer tokens than asked for."""
    errors: Mapping[str, int]
    fairness: Fairness
    goodput: Goodput | None
    lateness: Lateness | None
    """Of an open loop."""

    @property
    def succeeded(self) -> int:
        """Requests without an error."""
        return self.end_to_end.count

    @property
    def tokens_per_second(self) -> float:
        """Output tokens a second of all streams together."""
        return self.output_tokens / self.measured.seconds

    @property
    def requests_per_second(self) -> float:
        """Finished requests a second."""
        return self.succeeded / self.measured.seconds

    @property
    def client_limit(self) -> str | None:
        """Why the load client is the limit, if it is."""
        late = None if self.lateness is None else self.lateness.verdict
        return late or self.measured.client.verdict(self.between_tokens.p50)

    @property
    def exit_status(self) -> int:
        """1 for a wrong answer, or when nothing succeeded."""
        return int(bool(self.measured.mismatches) or not self.succeeded)

    @classmethod
    def of(cls, bench: ServeBench, measured: Measured) -> "ServeReport":
        """Sum up."""
        answers = [each.answer for each in measured.finished]
        good = [answer for answer in answers if answer.error is None]
        with_usage = sum(answer.completion_tokens is not None for answer in good)
        asked = ((measured.models[each.planned.model], each.answer) for each in measured.finished)
        counted_by = "usage" if with_usage == len(good) else "usage, or pieces of text where it was missing"
        return cls(
            bench,
            measured,
            Spread.of(t for t in (answer.first_token_seconds for answer in good) if t is not None),
            Spread.of(gap for answer in good for gap in answer.gaps),
            Spread.of(answer.seconds for answer in good),
            sum(answer.output_tokens for answer in good),
            Spread.of(answer.prompt_tokens for answer in good if answer.prompt_tokens is not None),
            counted_by if with_usage else "pieces of text: the server gives no usage",
            sum(map(_is_short, measured.finished)),
            Counter(answer.error for answer in answers if answer.error is not None),
            Fairness.of(asked),
            None if bench.level is None else Goodput.of(bench.level, answers, measured.seconds),
            Lateness.of(answers),
        )

    def to_json(self) -> dict[str, object]:
        """Return settings, environment and figures as JSON values. The API key is left out."""
        measured = self.measured
        return {
            "bench": "serve",
            "settings": self._settings(),
            "client": environment(),
            "server": {
                "models": measured.models,
                "models_chosen_by": measured.chosen_by,
                "takes": asdict(measured.accepted),
            },
            "prompts_counted_by": measured.prompts_counted_by,
            "tokens_counted_by": self.tokens_counted_by,
            "seconds": measured.seconds,
            "requests": len(measured.finished),
            "succeeded": self.succeeded,
            "short_answers": self.short,
            "errors": dict(self.errors),
            "output_tokens": self.output_tokens,
            "tokens_per_second": self.tokens_per_second,
            "requests_per_second": self.requests_per_second,
            "prompt_tokens": self.prompt_tokens.to_json(),
            "first_token_seconds": self.first_token.to_json(),
            "between_tokens_seconds": self.between_tokens.to_json(),
            "end_to_end_seconds": self.end_to_end.to_json(),
            "fairness": self.fairness.to_json(),
            "goodput": None if self.goodput is None else _goodput_json(self.goodput),
            "lateness": None if self.lateness is None else self.lateness.to_json(),
            "samples": [self._sample(each) for each in measured.finished],
            "load_client": {**measured.client.to_json(), "is_the_limit": self.client_limit},
            "check": self._check_json() if self.bench.check else None,
        }

    def _check_json(self) -> dict[str, object]:
        measured = self.measured
        return {
            "asked_alone": measured.checked,
            "failed_alone": measured.alone_errors,
            "mismatches": [asdict(mismatch) for mismatch in measured.mismatches],
        }

    def _settings(self) -> dict[str, object]:
        settings = asdict(self.bench)
        settings["level"] = None if self.bench.level is None else str(self.bench.level)
        settings["workload"] = self.bench.workload.to_json()
        settings["api_key"] = None if self.bench.api_key is None else "given"
        settings["tokenizer"] = None if self.bench.tokenizer is None else str(self.bench.tokenizer)
        return settings

    def _sample(self, each: Finished) -> dict[str, object]:
        """Return one request's figures; times are seconds from the beginning of the run."""
        answer = each.answer
        return {
            "model": self.measured.models[each.planned.model],
            "asked": answer.asked - self.measured.began,
            "sent": answer.started - self.measured.began,
            "first_token_seconds": answer.first_token_seconds,
            "between_tokens_seconds": answer.seconds_per_token,
            "end_to_end_seconds": answer.seconds,
            "prompt_tokens": answer.prompt_tokens,
            "output_tokens": answer.output_tokens,
            "error": answer.error,
        }

    def text(self) -> str:
        """Return the report for people."""
        rows = [
            [name, *(milliseconds(value) for value in (spread.p50, spread.p90, spread.p99, spread.mean))]
            for name, spread in (
                ("time to first token", self.first_token),
                ("between tokens", self.between_tokens),
                ("end to end", self.end_to_end),
            )
        ]
        parts = [self._what(), text_table(["ms", "p50", "p90", "p99", "mean"], rows), self._totals()]
        return "\n\n".join([*parts, *self._served(), *self._remarks()])

    def _what(self) -> str:
        work, measured = self.bench.workload, self.measured
        shown = ", ".join(measured.models[:6]) + (" …" if len(measured.models) > 6 else "")
        loop = f"{work.streams} streams"
        if work.is_open:
            loop = f"open loop, {work.arrivals or 'at the times of the trace'}"
        sizes = f"prompts of about {work.input_tokens} tokens, {work.output_tokens} tokens out"
        if work.trace:
            sizes = f"{len(work.trace)} requests of a trace"
        elif work.lengths is not None:
            sizes = str(work.lengths)
        return (
            f"{loop}, {work.popularity} over {len(measured.models)} models ({measured.chosen_by}): {shown}\n"
            f"{sizes} (counted by {measured.prompts_counted_by}), temperature {self.bench.temperature:g}"
        )

    def _served(self) -> list[str]:
        """Say how the service level was kept, and how evenly."""
        lines = []
        if self.goodput is not None:
            good = self.goodput
            lines.append(
                f"goodput {good.per_second:.2f} requests/s: {good.met} of {good.requests} "
                f"({100 * good.attainment:.1f} %) kept to {good.level}"
            )
        worst = self.fairness.worst
        if worst is not None and len(self.fairness.shares) > 1:
            failed = f", {worst.failed} of {worst.requests} failed" if worst.failed else ""
            lines.append(
                f"fairness {self.fairness.index:.3f} (Jain's index over {len(self.fairness.shares)} models' tokens for "
                f"each second waited); worst {worst.model}: {worst.speed:.1f} tokens/s, first token "
                f"{milliseconds(worst.first_token.p50)} ms{failed}"
            )
        return ["\n".join(lines)] if lines else []

    def _totals(self) -> str:
        prompt = "" if not self.prompt_tokens.count else f", prompts of {self.prompt_tokens.mean:.0f} tokens"
        return (
            f"{self.tokens_per_second:.1f} tokens/s, {self.requests_per_second:.2f} requests/s: "
            f"{self.succeeded} of {len(self.measured.finished)} requests, {self.output_tokens} tokens "
            f"(counted by {self.tokens_counted_by}) in {self.measured.seconds:.1f} s{prompt}"
        )

    def _remarks(self) -> list[str]:
        remarks = []
        if self.short:
            why = "" if self.measured.accepted.ignore_eos else ": the server does not take ignore_eos"
            work = self.bench.workload
            asked = "asked for" if work.lengths or work.trace else f"{work.output_tokens} tokens"
            remarks.append(f"{self.short} answers were shorter than {asked}{why}")
        if self.errors:
            counts = ", ".join(f"{count} × {kind}" for kind, count in self.errors.items())
            messages = {a.error: a.error_message for a in (each.answer for each in self.measured.finished)}
            shown = [f"  {kind}: {messages[kind][:200]}" for kind in list(self.errors)[:SHOWN]]
            remarks.append("\n".join([f"errors: {counts}", *shown]))
        limit = self.client_limit
        load = self.measured.client
        late = (
            ""
            if self.lateness is None
            else (f"sent {milliseconds(self.lateness.seconds.p99)} ms late at p99, ")
        )
        lag = late + (
            f"event loop {milliseconds(load.lag.p90)} ms late at p90, {100 * load.cpu_share:.0f} % of a core"
        )
        remarks.append(f"client is the limit: {limit}" if limit else f"the client is not the limit: {lag}")
        return remarks + ([self._check()] if self.bench.check else [])

    def _check(self) -> str:
        measured = self.measured
        failed = f", {measured.alone_errors} failed alone" if measured.alone_errors else ""
        lines = [
            f"check: {measured.checked} distinct requests asked alone{failed}, "
            f"{len(measured.mismatches)} answers under load differ"
        ]
        for mismatch in measured.mismatches[:SHOWN]:
            at = _first_difference(mismatch.under_load, mismatch.alone)
            lines.append(f"  {mismatch.model}, prompt {mismatch.prompt}, from character {at}:")
            lines.append(f"    under load {mismatch.under_load[at : at + EXCERPT]!r}")
            lines.append(f"    alone      {mismatch.alone[at : at + EXCERPT]!r}")
        return "\n".join(lines)


def _is_short(each: Finished) -> bool:
    return each.answer.error is None and each.answer.output_tokens < each.planned.output_tokens


def _goodput_json(goodput: Goodput) -> dict[str, object]:
    return {
        "level": str(goodput.level),
        "met": goodput.met,
        "requests": goodput.requests,
        "requests_per_second": goodput.per_second,
        "attainment": goodput.attainment,
    }


def _first_difference(one: str, other: str) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
