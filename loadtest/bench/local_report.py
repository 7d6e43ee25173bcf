"""What `bench engine` and `bench peft` measured, as plain text and as JSON. Imports neither typer nor rich."""

from dataclasses import asdict

from manylora.loadtest.bench.engine import EngineBench, EngineResult
from manylora.loadtest.bench.peft import PeftBench, PeftResult
from manylora.loadtest.bench.workload import Workload
from manylora.loadtest.material.environment import environment, headline
from manylora.loadtest.material.text_table import milliseconds


def engine_text(bench: EngineBench, result: EngineResult) -> str:
    """Return the report of `bench engine`."""
    sampling = "greedy"
    if bench.temperature > 0:
        sampling = f"temperature {bench.temperature:g}, top_p {bench.top_p:g}"
    choice, decode = bench.model, result.decode
    return "\n".join(
        [
            f"engine: {choice.source}, {choice.quantization}, {choice.dtype}, {choice.device}; "
            f"{_what(bench.workload)}; {bench.adapters} adapters of rank {bench.rank}; {sampling}",
            headline(),
            "",
            f"{result.tokens_per_second:.1f} tokens/s: {result.output_tokens} tokens of {result.requests} requests in "
            f"{result.seconds:.1f} s, prompts included",
            f"a decode step of {bench.workload.streams} streams: p50 {milliseconds(decode.total.p50)} ms, "
            f"p99 {milliseconds(decode.total.p99)} ms over {decode.steps} steps, which took on average",
            "",
            decode.table(),
            "",
            f"overhead (all but the model and copies of adapters): {100 * decode.overhead:.1f} % of a decode step, "
            f"{100 * result.every.overhead:.1f} % of all {result.every.steps} steps",
        ]
    )


def engine_json(bench: EngineBench, result: EngineResult) -> dict[str, object]:
    """Return the report of `bench engine` as JSON values."""
    return {
        "bench": "engine",
        "settings": _settings(bench),
        "environment": environment(),
        "requests": result.requests,
        "output_tokens": result.output_tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "decode_steps": result.decode.to_json(),
        "all_steps": result.every.to_json(),
    }


def peft_text(bench: PeftBench, result: PeftResult) -> str:
    """Return the report of `bench peft`."""
    choice = bench.model
    step = result.seconds / result.batches / bench.workload.output_tokens
    return "\n".join(
        [
            f"peft: {choice.source}, {choice.quantization}, {choice.dtype}; {_what(bench.workload)}; "
            f"{len(bench.directories) or bench.adapters} adapters",
            result.how,
            headline(),
            "",
            f"{result.tokens_per_second:.1f} tokens/s: {result.output_tokens} tokens in {result.batches} batches, "
            f"{result.seconds:.1f} s, {milliseconds(step)} ms for each token of a row, prompts included",
        ]
    )


def peft_json(bench: PeftBench, result: PeftResult) -> dict[str, object]:
    """Return the report of `bench peft` as JSON values."""
    return {
        "bench": "peft",
        "settings": _settings(bench),
        "environment": environment(),
        "how": result.how,
        "batches": result.batches,
        "output_tokens": result.output_tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
    }


def _what(work: Workload) -> str:
    return (
        f"{work.streams} streams, {work.popularity}, prompts of {work.input_tokens} and answers of "
        f"{work.output_tokens} tokens"
    )


def _settings(bench: EngineBench | PeftBench) -> dict[str, object]:
    settings = asdict(bench)
    settings["workload"]["popularity"] = str(bench.workload.popularity)
    if isinstance(bench, PeftBench):
        settings["directories"] = [str(path) for path in bench.directories]
    return settings
