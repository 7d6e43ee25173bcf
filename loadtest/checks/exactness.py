"""Checks that the decoder and the engine are exact on a device: against transformers, peft, the CPU and themselves.

They run on small random models, in float32, so that a wrong answer can't hide in rounding. Needs torch, transformers,
peft, safetensors and numpy, nothing else; the test suite checks much more, on the CPU.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manylora.adapters.reader import read_adapter
from manylora.adapters.types import AdapterWeights, ModuleShape
from manylora.loadtest.bench.workload import token_prompt
from manylora.loadtest.material.by_hand import Row, load, place, step
from manylora.loadtest.material.checkpoints import (
    ALL_LINEAR,
    AdapterShape,
    BaseShape,
    write_adapter,
    write_base,
)
from manylora.loadtest.material.engines import EngineSizes, add_adapter, build_engine
from manylora.loadtest.material.peft_adapters import load_base
from manylora.loadtest.material.quiet import advice_off
from manylora.quant.nf4 import NestedScales, quantize_nf4
from manylora.server.engine.request import GenerationRequest, SamplingParams
from manylora.server.kernels.plain import PlainBackend
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_base import DecoderBase

TOLERANCE = 1e-4
"""Of logits in float32."""
FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
VOCABULARY = 320
LENGTHS = (1, 2, 17, 64, 65, 130)
RANKS = (4, 8, 16, 64)
TARGETS: tuple[tuple[str, ...], ...] = (
    ALL_LINEAR,
    ("q_proj", "v_proj"),
    ("o_proj", "down_proj"),
    ("gate_proj", "up_proj", "k_proj"),
)
DORA = (False, True, True, False)
"""Which of them scale the base's outputs too."""
NEW_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found."""

    name: str
    passed: bool
    detail: str


def shape_of(family: str) -> BaseShape:
    """Return the small shape that a family is checked on."""
    return BaseShape(family, VOCABULARY, 128, 192, 3, 4, 2, 512)


def prompt(length: int, number: int = 0) -> list[int]:
    """Return so many random token ids."""
    return list(token_prompt(number, length, VOCABULARY, length))


def check_family(family: str, scratch: Path, device: torch.device) -> Iterator[Outcome]:
    """Hold a family's logits against transformers, with adapters against peft, mixed against alone."""
    base = write_base(scratch / family, shape_of(family), seed=1)
    theirs = load_reference(base, device)
    model = load(base, PlainBackend(device, torch.float32), 1 + len(LENGTHS), "none")
    rows = [Row(number, prompt(length + 1)) for number, length in enumerate(LENGTHS)]
    step(model, [(row, len(row.tokens) - 1) for row in rows])
    step(model, [(row, 1) for row in rows])
    worst = max(difference(row.all_logits(), logits_of(theirs, row.tokens, device)) for row in rows)
    yield within(f"{family}: logits are transformers'", worst, TOLERANCE)

    paths = _adapters(scratch / family, base)
    ours = [read(path, model.decoder) for path in paths]
    placed = place(model, ours)
    uses = [(), *(((ranges, 1.0),) for ranges in placed)]
    alone = [Row(number, prompt(33), adapters) for number, adapters in enumerate(uses)]
    for row in alone:
        step(model, [(row, 33)])
    mixed = [Row(number, prompt(33), adapters) for number, adapters in enumerate(uses)]
    interleave(lambda work: step(model, work), mixed)
    worst = max(difference(a.all_logits(), b.all_logits()) for a, b in zip(alone, mixed, strict=True))
    # A CPU keeps every bit; cuBLAS picks its kernels by shape.
    yield within(f"{family}: a mixed batch gives what each gives alone", worst, least_difference(device))
    expected = _peft_logits(theirs, paths, prompt(33), device)
    worst = max(difference(row.all_logits(), peft) for row, peft in zip(mixed[1:], expected, strict=True))
    yield within(
        f"{family}: LoRA and DoRA of ranks {', '.join(map(str, RANKS))} give peft's logits", worst, TOLERANCE
    )
    apart = min(difference(a.all_logits(), b.all_logits()) for n, a in enumerate(alone) for b in alone[:n])
    yield Outcome(
        f"{family}: the adapters differ at all", apart > 100 * TOLERANCE, f"by {apart:.2g} at least"
    )


def check_nf4(scratch: Path, device: torch.device) -> Iterator[Outcome]:
    """Hold NF4 on the device against NF4 on the CPU: codes, scales, values, and a decoder's logits."""
    weight = torch.randn(193, 320, generator=torch.Generator().manual_seed(3))
    for double_quant in (False, True):
        here = quantize_nf4(weight, double_quant=double_quant)
        there = quantize_nf4(weight.to(device), double_quant=double_quant)
        name = "NF4, double quantised" if double_quant else "NF4"
        same = torch.equal(here.codes, there.codes.cpu())
        yield Outcome(f"{name}: codes are the CPU's", same, f"{here.codes.numel()} bytes")
        if isinstance(here.absmax, NestedScales):
            # The mean of the scales is summed in another order on another device.
            moved = here.to(device)
        else:
            moved = there
            same = torch.equal(here.scales(), there.scales().cpu())
            yield Outcome(f"{name}: scales are the CPU's", same, f"{here.scales().numel()} blocks")
        for dtype in (torch.float32, torch.bfloat16):
            same = torch.equal(here.dequantize(dtype), moved.dequantize(dtype).cpu())
            yield Outcome(f"{name}: values in {dtype} are the CPU's", same, f"{weight.numel()} values")
    base = write_base(scratch / "nf4", shape_of("qwen2"), seed=2)
    logits = []
    for where in (torch.device("cpu"), device):
        model = load(base, PlainBackend(where, torch.float32), 1, "nf4")
        row = Row(0, prompt(65))
        step(model, [(row, 65)])
        logits.append(row.all_logits().cpu())
    yield within("NF4: a decoder's logits are the CPU's", difference(*logits), TOLERANCE)


def check_engine(scratch: Path, device: torch.device) -> Iterator[Outcome]:
    """Hold a mixed batch of the engine, arriving at different times, against each request alone, token for token."""
    base = write_base(scratch / "engine", shape_of("qwen2"), seed=4)
    paths = _adapters(scratch / "engine", base)
    model = load(base, PlainBackend(device, torch.float32), 1, "none")
    adapters = [read(path, model.decoder) for path in paths]
    for name, sampling in (
        ("greedy", SamplingParams(temperature=0, max_tokens=NEW_TOKENS)),
        ("seeded, top_p 0.9", SamplingParams(top_p=0.9, seed=5, max_tokens=NEW_TOKENS)),
    ):
        requests = [
            GenerationRequest(
                request_id=str(number),
                prompt_token_ids=tuple(prompt(3 + 23 * number, number)),
                sampling=sampling,
                adapters=((number % (1 + len(adapters)), 1.0),) if number % (1 + len(adapters)) else (),
            )
            for number in range(10)
        ]
        mixed = _generate(model.decoder, adapters, requests)
        alone = [_generate(model.decoder, adapters, [request])[0] for request in requests]
        equal = sum(a == b for a, b in zip(mixed, alone, strict=True))
        told = f"{equal} of {len(requests)} requests"
        yield Outcome(f"engine, {name}: a mixed batch gives each its tokens", equal == len(requests), told)
        yield Outcome(
            f"engine, {name}: every answer is whole",
            all(len(tokens) == NEW_TOKENS for tokens in mixed),
            f"{NEW_TOKENS} tokens each",
        )


def _generate(
    decoder: Decoder, adapters: list[AdapterWeights], requests: list[GenerationRequest]
) -> list[list[int]]:
    """Run requests that arrive two steps apart; return their tokens."""
    engine = build_engine(
        decoder, EngineSizes(len(requests), 300, sum(RANKS) + sum(DORA), max_step_tokens=64)
    )
    for number, weights in enumerate(adapters):
        add_adapter(engine, number + 1, weights)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    waiting, turn = list(requests), 0
    while waiting or len(engine.requests):
        if waiting and turn % 2 == 0:
            engine.add_request(waiting.pop(0))
        engine.step()
        for output in engine.requests.take_outputs():
            if output.error is not None:
                raise output.error
            tokens[output.request_id] += output.token_ids
        turn += 1
    engine.check_integrity()
    return list(tokens.values())


def interleave(run: Callable[[list[tuple[Row, int]]], None], rows: list[Row]) -> None:
    """Compute rows token by token, each beginning one step after the one before, the last one in chunks."""
    turn = 0
    while any(row.computed < len(row.tokens) for row in rows):
        work = []
        for number, row in enumerate(rows):
            left = len(row.tokens) - row.computed
            if number <= turn and left:
                work.append((row, min(left, 11 if row is rows[-1] else 1)))
        run(work)
        turn += 1


def _adapters(directory: Path, base: Path) -> list[Path]:
    return [
        write_adapter(
            directory / f"adapter{seed}", base, AdapterShape(rank, 2.0 * rank, targets, seed, dora=dora)
        )
        for seed, (rank, targets, dora) in enumerate(zip(RANKS, TARGETS, DORA, strict=True))
    ]


def read(path: Path, decoder: Decoder) -> AdapterWeights:
    """Return an adapter's weights in float32, for that base."""
    modules = {name: ModuleShape(out, wide) for name, (out, wide) in decoder.config.base_modules().items()}
    base = DecoderBase(decoder)
    return read_adapter(path, modules, max_rank=max(RANKS), dtype=torch.float32, base=base).weights


def load_reference(base: Path, device: torch.device) -> Any:
    """Return the checkpoint as transformers loads it, in float32."""
    return load_base(base).to(device)


@torch.inference_mode()
def logits_of(model: Any, tokens: list[int], device: torch.device) -> Tensor:
    """Return the logits of all tokens by transformers' or peft's model, float32 [tokens, vocab]."""
    logits: Tensor = model(torch.tensor([tokens], device=device)).logits[0].float()
    return logits


def _peft_logits(model: Any, paths: list[Path], tokens: list[int], device: torch.device) -> list[Tensor]:
    from peft import PeftModel

    with advice_off():
        adapted = PeftModel.from_pretrained(model, paths[0], adapter_name="0")
        for number, path in enumerate(paths[1:], 1):
            adapted.load_adapter(path, adapter_name=str(number))
        found = []
        for number in range(len(paths)):
            adapted.set_adapter(str(number))
            found.append(logits_of(adapted.eval(), tokens, device))
        return found


def least_difference(device: torch.device) -> float:
    """Return how far the same row's logits may lie apart in different company: a CPU keeps every bit."""
    return 0.0 if device.type == "cpu" else TOLERANCE


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((one - other).abs().max())


def within(name: str, found: float, limit: float) -> Outcome:
    """Return the outcome of a check that allows ``limit``."""
    return Outcome(name, found <= limit, f"max |Δ| {found:.1e}, limit {limit:.0e}")
