"""`manylora bench kernels`: rates of the native kernels beside what the machine gives, by shape and number of rows.

GOP/s (a multiply-add is two), GB/s of what must be read at least once, and the larger of their shares of limits that
are measured before and after (limits.py). Products are timed by themselves, the rounding of activations included,
with weights streamed from memory; a tenth of the times lies below the one that counts, so that what else runs is felt
little. Attention and adapters are the backend's own ops over all layers of a decoder.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from manylora.loadtest.bench.limits import STREAMED, Limits, Work, measure_limits, timed
from manylora.loadtest.bench.op_rates import LINEAR_OPS, op_seconds, op_work
from manylora.loadtest.material.checkpoints import QWEN25_0_5B, BaseShape
from manylora.loadtest.material.decode_steps import decode_step, place_adapters
from manylora.loadtest.material.engines import served
from manylora.loadtest.material.environment import environment, headline
from manylora.loadtest.material.random_model import config_of, random_weights
from manylora.loadtest.material.text_table import text_table
from manylora.quant.dense import DenseTensor
from manylora.quant.int8 import GROUP, Int8Tensor
from manylora.quant.nf4 import BLOCKSIZE, Nf4Tensor
from manylora.server.kernels.backend import WeightSource
from manylora.server.kernels.cpu.backend import ACTIVATIONS, HEAD_GROUP, Activations, CpuBackend
from manylora.server.kernels.cpu.library import Kernels, Unavailable, open_kernels
from manylora.server.kernels.cpu.pack import SPLIT_MOST, PackedMatrix, SplitTensor, pack
from manylora.server.kernels.step import AdapterRanges
from manylora.server.model.decoder import Decoder
from manylora.server.model.served import ServedModel

SHAPES = ("128x896", "896x896", "4864x896", "896x4864")
"""Linear layers of Qwen2.5-0.5B: out x in."""
ROWS = (1, 4, 8, 32, 128, 512)
FORMS = ("nf4", "int8", "bf16")
PARTS = ("linear", "head", "attention", "lora")
FEW_ROWS = 64
"""Up to so many rows weights come from memory; with more, the time goes into products, and fewer matrices will do."""
MOST_KV_TOKENS = 1 << 16
"""Tokens that attention is measured over in one step, at most."""
SMALL_VOCABULARY = 512
"""Of the decoder whose attention and adapters are measured: its head is not."""


BODY = replace(QWEN25_0_5B, vocab_size=SMALL_VOCABULARY)


class NoKernels(ValueError):
    """There are no native kernels here. One line."""


@dataclass(frozen=True, slots=True)
class KernelsBench:
    """What to measure."""

    parts: tuple[str, ...] = PARTS
    forms: tuple[str, ...] = FORMS
    shapes: tuple[str, ...] = SHAPES
    rows: tuple[int, ...] = ROWS
    times: int = 7
    """How often everything is gone through."""
    level: str | None = None
    threads: int | None = None
    context: int = 1024
    rank: int = 16
    base: BaseShape = BODY
    """Of the decoder whose attention and adapters are measured."""
    head: tuple[int, int] = (151_936, 896)
    activations: Activations = "int8"
    """What 4- and 8-bit weights are multiplied by."""


@dataclass(frozen=True, slots=True)
class Rate:
    """One operation's rate."""

    name: str
    rows: int
    work: Work
    seconds: float

    def cells(self, limits: Limits) -> list[str]:
        """Return the table's row."""
        memory, arithmetic = limits.bounds(self.work)
        return [
            self.name,
            str(self.rows),
            f"{1e6 * self.seconds:.0f}",
            f"{2 * self.work.multiply_adds / self.seconds / 1e9:.0f}",
            f"{self.work.nbytes / self.seconds / 1e9:.1f}",
            f"{limits.share(self.work, self.seconds):.0%}",
            "memory" if memory > arithmetic else "arithmetic",
        ]


def open_native(bench: KernelsBench) -> Kernels:
    """Open the kernels. Raises NoKernels."""
    kernels = open_kernels(bench.level, bench.threads)
    if isinstance(kernels, Unavailable):
        raise NoKernels(kernels.reason)
    return kernels


def run_kernels(bench: KernelsBench, kernels: Kernels) -> Iterator[Rate]:
    """Yield one rate after the other. Raises ValueError for a shape that is none."""
    shapes = [_shape(text) for text in bench.shapes]
    if "linear" in bench.parts:
        for form in bench.forms:
            for shape in shapes:
                yield from linear_rates(kernels, form, shape, bench)
    if "head" in bench.parts:
        yield from linear_rates(kernels, "head", bench.head, bench)
    if "attention" in bench.parts or "lora" in bench.parts:
        yield from op_rates(kernels, bench)


def _shape(text: str) -> tuple[int, int]:
    try:
        out, wide = map(int, text.split("x"))
    except ValueError:
        raise ValueError(f"{text!r} is no shape as 4864x896: out x in") from None
    return out, wide


def activations_named(name: str) -> Activations:
    """Return the activations of that name. Raises ValueError with those that there are."""
    for each in ACTIVATIONS:
        if each == name:
            return each
    raise ValueError(f"--activations {name}: there are {', '.join(ACTIVATIONS)}")


def random_source(form: str, out: int, wide: int) -> WeightSource:
    """Return a matrix of a form, its codes drawn at random."""
    if form == "nf4":
        codes = torch.randint(0, 256, (out * wide // 2,), dtype=torch.uint8)
        return Nf4Tensor(codes, torch.rand(out * wide // BLOCKSIZE), (out, wide))
    if form == "head":
        codes = torch.randint(-SPLIT_MOST, SPLIT_MOST + 1, (out, wide), dtype=torch.int8)
        return SplitTensor(Int8Tensor(codes, torch.rand(out, -(-wide // HEAD_GROUP)), HEAD_GROUP))
    if form == "int8":
        codes = torch.randint(-127, 128, (out, wide), dtype=torch.int8)
        return Int8Tensor(codes, torch.rand(out, -(-wide // GROUP)), GROUP)
    return DenseTensor(torch.randn(out, wide, dtype=torch.bfloat16))


def linear_rates(kernels: Kernels, form: str, shape: tuple[int, int], bench: KernelsBench) -> Iterator[Rate]:
    """Yield the rates of a shape, over as many matrices as no cache keeps."""
    first = pack(random_source(form, *shape), None, kernels)
    more = max(0, math.ceil(STREAMED / first.nbytes) - 1)
    matrices: list[PackedMatrix] = [
        first,
        *(pack(random_source(form, *shape), None, kernels) for _ in range(more)),
    ]
    structures = [matrix.structure(ACTIVATIONS[bench.activations]) for matrix in matrices]
    addresses = [ctypes.addressof(structure) for structure in structures]
    for count in bench.rows:
        x, y = torch.randn(count, shape[1]), torch.empty(count, shape[0])
        some = addresses if count <= FEW_ROWS else addresses[: max(1, len(addresses) // 8)]
        calls = [partial(kernels.call, "linear", at, x.data_ptr(), count, y.data_ptr()) for at in some]
        products = math.prod(shape) * count
        real = form == "bf16" or bench.activations == "bfloat16"
        work = Work(first.nbytes, real=products) if real else Work(first.nbytes, products)
        yield Rate(f"{form} {shape[0]}x{shape[1]}", count, work, timed(calls, bench.times))


def op_rates(kernels: Kernels, bench: KernelsBench) -> Iterator[Rate]:
    """Yield the rates of attention and adapters: rows that decode, each with an adapter of its own, and a prompt."""
    most = max(rows for rows in (1, *bench.rows) if rows * bench.context <= MOST_KV_TOKENS)
    models = _served(kernels, bench, most)
    if "attention" in bench.parts:
        for model in models:
            yield from _attention_rates(model, bench, most)
    if "lora" in bench.parts:
        adapters = place_adapters(models[0], [bench.rank] * most)
        for rows in bench.rows:
            if rows <= most:
                yield _adapters_rate(models[0], bench, adapters[:rows])


def _served(kernels: Kernels, bench: KernelsBench, rows: int) -> list[ServedModel]:
    """Return a decoder for each type of keys and values. They share the weights."""
    config, first = config_of(bench.base), CpuBackend(kernels, torch.bfloat16)
    weights = random_weights(config, first, nf4=True)
    backends = (first, CpuBackend(kernels, torch.bfloat16, kv_dtype=torch.int8))
    decoders = (Decoder(config, weights, backend) for backend in backends)
    return [served(decoder, rows, bench.context, rows * bench.rank) for decoder in decoders]


def _attention_rates(model: ServedModel, bench: KernelsBench, most: int) -> Iterator[Rate]:
    kept = str(model.decoder.backend.kv_dtype).removeprefix("torch.")
    tokens = min(512, bench.context)
    steps = [
        (f"attention, {kept}, context {bench.context}", rows, decode_step(model, rows, bench.context, []))
        for rows in bench.rows
        if rows <= most
    ]
    prompt = decode_step(model, 1, bench.context, [], tokens)
    for name, rows, step in (*steps, (f"attention, {kept}, prompt to {bench.context}", tokens, prompt)):
        work, seconds = op_work(model, step), op_seconds(model, step, bench.times)
        yield Rate(name, rows, work["attend"], seconds["attend"])


def _adapters_rate(model: ServedModel, bench: KernelsBench, adapters: Sequence[AdapterRanges]) -> Rate:
    works, times = [], []
    for used in ([], adapters):
        step = decode_step(model, len(adapters), bench.context, used)
        works.append(sum((op_work(model, step)[op] for op in LINEAR_OPS), Work(0)))
        seconds = op_seconds(model, step, bench.times)
        times.append(sum(seconds[op] for op in LINEAR_OPS))
    extra = Work(works[1].nbytes - works[0].nbytes, 0, works[1].real - works[0].real)
    name = f"adapters of rank {bench.rank}, each its own"
    return Rate(name, len(adapters), extra, max(times[1] - times[0], 1e-9))


def kernels_text(kernels: Kernels, limits: Limits, rates: list[Rate]) -> str:
    """Return the report for people."""
    head = ("", "rows", "µs", "GOP/s", "GB/s", "of the limit", "limit")
    return (
        f"{headline()}\n{kernels.level}, {kernels.threads} threads: {limits}\n\n"
        f"{text_table(head, [rate.cells(limits) for rate in rates])}\n\n"
        "attention and adapters: of all layers together; adapters: what they add to the linear layers"
    )


def kernels_json(
    bench: KernelsBench, kernels: Kernels, limits: Limits, rates: list[Rate]
) -> dict[str, object]:
    """Return the report as JSON values."""
    return {
        "bench": "kernels",
        "settings": {
            "parts": bench.parts,
            "context": bench.context,
            "rank": bench.rank,
            "times": bench.times,
            "activations": bench.activations,
        },
        "environment": environment(),
        "level": kernels.level,
        "threads": kernels.threads,
        "limits": limits.to_json(),
        "rates": [
            {
                "name": rate.name,
                "rows": rate.rows,
                "seconds": rate.seconds,
                "bytes": rate.work.nbytes,
                "multiply_adds": rate.work.multiply_adds,
                "share": limits.share(rate.work, rate.seconds),
            }
            for rate in rates
        ],
    }


def measure(bench: KernelsBench) -> tuple[Kernels, Limits, list[Rate]]:
    """Measure everything. Raises NoKernels, ValueError."""
    kernels = open_native(bench)
    before = measure_limits(kernels, bench.times)
    rates = list(run_kernels(bench, kernels))
    return kernels, before.best(measure_limits(kernels, bench.times)), rates
