"""`make gpu-check`: is manylora exact on this GPU, and how fast? Exit status 1 if a check fails.

Needs torch (2.11 or newer), transformers, peft, triton, numpy and safetensors, and what these bring; no network, no
server, nothing of the `manylora` command. Models are random and made here. ``--device cpu --small`` runs the same code
on the CPU in seconds; the test suite does that. bitsandbytes is used beside peft in NF4 where it is installed.
"""

import argparse
import gc
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from manylora.loadtest.bench.engine import EngineBench, run_engine
from manylora.loadtest.bench.local_report import engine_json, engine_text, peft_json, peft_text
from manylora.loadtest.bench.peft import PeftBench, run_peft
from manylora.loadtest.bench.popularity import Popularity
from manylora.loadtest.bench.workload import Workload
from manylora.loadtest.checks.activated_exactness import check_activated
from manylora.loadtest.checks.exactness import (
    FAMILIES,
    TOLERANCE,
    Outcome,
    check_engine,
    check_family,
    check_nf4,
)
from manylora.loadtest.checks.mixture_exactness import check_mixtures
from manylora.loadtest.checks.recorded_steps import check_recorded
from manylora.loadtest.checks.vocabulary_exactness import check_vocabularies
from manylora.loadtest.material.checkpoints import SHAPES
from manylora.loadtest.material.environment import environment, headline
from manylora.loadtest.material.random_model import QUANTIZATIONS, ModelChoice
from manylora.loadtest.material.text_table import text_table
from manylora.server.kernels.plain import PlainBackend
from manylora.server.model.loader import Quantization

DISTINCT = Popularity("distinct")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured after the checks."""

    shapes: Sequence[str]
    quantizations: Sequence[Quantization]
    streams: Sequence[int]
    tokens: int
    """Of each prompt and each answer."""
    adapters: int
    rank: int
    cuda_graphs: bool = True
    peft: bool = True


FULL = Plan(("qwen2.5-0.5b", "qwen2.5-7b"), QUANTIZATIONS, (1, 8, 32), 64, 8, 16)
SMALL = Plan(("tiny",), QUANTIZATIONS, (2,), 8, 2, 4)


def checks(device: torch.device) -> Iterator[Outcome]:
    """Run every check."""
    with tempfile.TemporaryDirectory(prefix="manylora-check-") as scratch:
        yield from check_recorded(Path(scratch), device)
        for family in FAMILIES:
            yield from check_family(family, Path(scratch), device)
        yield from check_nf4(Path(scratch), device)
        yield from check_engine(Path(scratch), device)
        yield from check_mixtures(Path(scratch), device)
        yield from check_activated(Path(scratch), device)
        plain = PlainBackend(device, torch.float32)
        yield from check_vocabularies(Path(scratch) / "vocabularies", plain, TOLERANCE, tied=True)


def benches(plan: Plan, device: str) -> Iterator[dict[str, object]]:
    """Run and print `bench engine` and `bench peft` for each shape and weight format; yield their reports."""
    for shape in plan.shapes:
        for quantization in plan.quantizations:
            for streams in plan.streams:
                choice = ModelChoice(shape, quantization, device=device, cuda_graphs=plan.cuda_graphs)
                yield _engine(plan, choice, streams)
                _free(device)
            if not plan.peft:
                continue
            if _can_peft(quantization):
                yield _peft(plan, ModelChoice(shape, quantization, device=device), max(plan.streams))
            else:
                _say(f"peft, {shape}, {quantization}: bitsandbytes is not installed\n")
            _free(device)


def _engine(plan: Plan, choice: ModelChoice, streams: int) -> dict[str, object]:
    bench = EngineBench(choice, _workload(plan, streams), plan.adapters, plan.rank, 0.8, 0.9)
    result = run_engine(bench)
    _say(engine_text(bench, result) + "\n")
    return engine_json(bench, result)


def _peft(plan: Plan, choice: ModelChoice, streams: int) -> dict[str, object]:
    bench = PeftBench(choice, _workload(plan, streams), plan.adapters, plan.rank, (), 0.8, 0.9)
    result = run_peft(bench)
    _say(peft_text(bench, result) + "\n")
    return peft_json(bench, result)


def _workload(plan: Plan, streams: int) -> Workload:
    return Workload(streams, DISTINCT, plan.tokens, plan.tokens, 2 * streams, 0, 0)


def _can_peft(quantization: Quantization) -> bool:
    return quantization == "none" or importlib.util.find_spec("bitsandbytes") is not None


def _plan(options: argparse.Namespace) -> Plan:
    plan = SMALL if options.small else FULL
    return replace(
        plan,
        shapes=options.shapes or plan.shapes,
        quantizations=options.quantizations,
        streams=options.streams or plan.streams,
        cuda_graphs=not options.no_cuda_graphs,
        peft=not options.no_peft,
    )


def _free(device: str) -> None:
    """Give memory back before the next model is made."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  # the result


def main() -> None:
    """Check, measure, and say so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, …, or cpu")
    parser.add_argument(
        "--small", action="store_true", help="measure a tiny model only: is everything there?"
    )
    parser.add_argument("--no-bench", action="store_true", help="only check")
    parser.add_argument("--no-checks", action="store_true", help="only measure")
    parser.add_argument("--no-peft", action="store_true", help="don't measure peft")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="measure steps issued op by op")
    parser.add_argument("--shapes", nargs="+", default=[], help=f"of {', '.join(SHAPES)}, to be measured")
    parser.add_argument("--quantizations", nargs="+", choices=QUANTIZATIONS, default=QUANTIZATIONS)
    parser.add_argument("--streams", nargs="+", type=int, default=[], help="to be measured")
    parser.add_argument("--json", type=Path, help="write outcomes and figures here")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(
            "manylora.loadtest.checks.gpu_check: no CUDA device; --device cpu --small tries the code on a CPU"
        )
    torch.set_float32_matmul_precision("highest")
    _say(headline() + "\n")
    outcomes = []
    for outcome in () if options.no_checks else checks(torch.device(options.device)):
        outcomes.append(outcome)
        _say(f"{'pass' if outcome.passed else 'FAIL'}  {outcome.name} ({outcome.detail})")
    failed = sum(not outcome.passed for outcome in outcomes)
    _say(
        "\n"
        + text_table(["checks", "number"], [["pass", f"{len(outcomes) - failed}"], ["FAIL", f"{failed}"]])
    )
    figures: list[dict[str, object]] = []
    if not options.no_bench:
        _say("")
        figures += benches(_plan(options), options.device)
    if options.json is not None:
        found = [{"name": each.name, "passed": each.passed, "detail": each.detail} for each in outcomes]
        report = {"environment": environment(), "checks": found, "figures": figures}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
