"""Times one decode step of the decoder on random weights, beside its base's bare matmuls in plain torch, and by op.

A step ends with its rows' logits, and where the backend samples another time with greedy tokens instead, which is what
most benchmarks ask of a server. Run it with ``python -m manylora.loadtest.lab.decoder_step``, pinned to as many cores
as it has threads. It measures no engine and no HTTP: `manylora bench engine` does.
"""

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from manylora.loadtest.material.checkpoints import SHAPES
from manylora.loadtest.material.decode_steps import decode_step, place_adapters
from manylora.loadtest.material.engines import served, torch_threads_kept
from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.random_model import (
    DTYPES,
    QUANTIZATIONS,
    ModelChoice,
    build_decoder,
)
from manylora.loadtest.material.text_table import text_table
from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.plain.linear import PlainLinear
from manylora.server.kernels.sampling import SamplingColumns
from manylora.server.kernels.step import StepBatch
from manylora.server.model.served import ServedModel

OPS = (
    "begin_step",
    "embed",
    "attn_in",
    "attend",
    "attn_out",
    "mlp_in",
    "mlp_out",
    "hidden",
    "logits",
    "finite",
)
WARM_UP = 2


@dataclass
class Clock:
    """Seconds spent in each op of a backend since the last reset."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def wrap(self, backend: AnyBackend) -> None:
        """Time every op of ``backend`` from here on."""
        for name in OPS:
            setattr(backend, name, self._timed(name, getattr(backend, name)))

    def _timed(self, name: str, op: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            began = time.perf_counter()
            result = op(*args)
            self.seconds[name] += time.perf_counter() - began
            return result

        return call


def run_step(model: ServedModel, step: StepBatch, columns: SamplingColumns | None = None) -> None:
    """Compute a step to its end, and sample as ``columns`` say."""
    logits = model.collect(model.launch(step, columns)).logits
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)


@torch.inference_mode()
def bare_matmuls(model: ServedModel, rows: int) -> None:
    """Multiply ``rows`` rows by every matrix of the base, and do nothing else."""
    weights, backend = model.decoder.weights, model.decoder.backend
    inputs: dict[int, Tensor] = {}
    matrices = [each for layer in weights.layers for each in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    for linear in (*matrices, weights.head):
        width = linear.shape[1]
        if width not in inputs:
            inputs[width] = torch.ones(rows, width, dtype=backend.dtype, device=backend.device)
        assert isinstance(linear, PlainLinear)
        out = linear(inputs[width])
    if out.is_cuda:
        torch.cuda.synchronize(out.device)


def median_ms(call: Callable[[], None], repeats: int) -> float:
    """Return the median time of ``call`` in ms, after calls that don't count."""
    times = []
    for number in range(repeats + WARM_UP):
        began = time.perf_counter()
        call()
        if number >= WARM_UP:
            times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def time_choice(choice: ModelChoice, options: argparse.Namespace, clock: Clock | None) -> list[list[str]]:
    """Return the table's rows of one weight format."""
    with torch_threads_kept():
        return _time_choice(choice, options, clock)


def _time_choice(choice: ModelChoice, options: argparse.Namespace, clock: Clock | None) -> list[list[str]]:
    most, table = max(options.rows), []
    model = served(build_decoder(choice), most, options.context, most * options.rank)
    adapters = place_adapters(model, [options.rank] * most)
    if clock is not None:
        clock.wrap(model.decoder.backend)
    plain = isinstance(model.decoder.backend, PlainBackend)
    for rows in options.rows:
        floor = median_ms(partial(bare_matmuls, model, rows), options.repeats) if plain else math.nan
        for count in (0, min(rows, options.adapters)):
            step = decode_step(model, rows, options.context, adapters[:count])
            if clock is not None:
                clock.seconds.clear()
            spent = median_ms(partial(run_step, model, step), options.repeats)
            cells = [choice.quantization, str(rows), str(count)]
            cells += [f"{floor:.1f}", f"{spent:.1f}", f"{spent / floor:.2f}", "-"]
            if model.decoder.backend.sampling is not None and clock is None:
                greedy = partial(run_step, model, step, SamplingColumns.greedy(rows))
                cells[-1] = f"{median_ms(greedy, options.repeats):.1f}"
            if clock is not None:
                calls = options.repeats + WARM_UP
                cells += [f"{1000 * clock.seconds[name] / calls:.1f}" for name in OPS]
            table.append(cells)
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-0.5b", help=f"{', '.join(SHAPES)}, or a directory")
    parser.add_argument("--quantization", nargs="+", default=QUANTIZATIONS, choices=QUANTIZATIONS)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernels", default="plain", help="plain, auto, or a level of the native ones")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="show the ms of each op")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = Clock() if options.profile else None
    rows = []
    for quantization in options.quantization:
        choice = ModelChoice(options.model, quantization, options.dtype, options.device, options.kernels)
        rows += time_choice(choice, options, clock)
    print(f"A decode step, median ms: context {options.context}, rank {options.rank}")  # noqa: T201  # the result
    print(headline(), end="\n\n")  # noqa: T201  # the result
    head = [
        "weights",
        "rows",
        "adapters",
        "matmuls",
        "step",
        "ratio",
        "greedy tokens",
        *(OPS if clock else ()),
    ]
    print(text_table(head, rows))  # noqa: T201  # the result


if __name__ == "__main__":
    main()
