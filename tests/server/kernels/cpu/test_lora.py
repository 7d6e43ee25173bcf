"""Native LoRA by token against reference.py, and that a token's bits are its own."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.library import Kernels, open_kernels
from manylora.server.kernels.reference import lora
from manylora.server.kernels.step import LoraSpan, RankRange

ARENA = 120
# Ranges (start, rank) of an arena with rows between them that are nobody's.
RANGES = ((0, 8), (8, 16), (24, 1), (30, 37), (70, 4), (80, 5))


@dataclass
class Module:
    """A and B of a module as the arena holds them; rows outside RANGES are NaN."""

    a: Tensor
    """bfloat16 [ARENA, in]"""
    b: Tensor
    """bfloat16 [ARENA, blocks * 32]: a range's rows are its [blocks, rank, 32]"""
    outputs: int

    def wide(self) -> Tensor:
        """B as [ARENA, out]."""
        wide = self.b.clone()
        for start, rank in RANGES:
            own = self.b[start : start + rank].view(-1, rank, 32)
            wide[start : start + rank] = own.transpose(0, 1).flatten(1)
        return wide[:, : self.outputs]


def make_module(inputs: int, outputs: int, seed: int) -> Module:
    draw = torch.Generator().manual_seed(seed)
    blocks = -(-outputs // 32)
    a = torch.full((ARENA, inputs), math.nan, dtype=torch.bfloat16)
    b = torch.full((ARENA, blocks * 32), math.nan, dtype=torch.bfloat16)
    for start, rank in RANGES:
        a[start : start + rank] = (torch.randn(rank, inputs, generator=draw) / inputs**0.5).bfloat16()
        b[start : start + rank] = torch.randn(rank, blocks * 32, generator=draw).bfloat16()
    return Module(a, b, outputs)


Use = tuple[tuple[int, float], ...]
"""What a token uses: (index in RANGES, weight), in order."""


@dataclass
class Layout:
    """A step's jobs, and what they point to."""

    jobs: abi.Jobs
    kept: list[object] = field(default_factory=list)


def lay_out(uses: Sequence[Use]) -> Layout:
    """A job for each range and place in a token's order: first all firsts, then all seconds."""
    kept: list[object] = []
    jobs: list[abi.Job] = []
    place = 0
    for nth in range(max(map(len, uses), default=0)):
        for number, (start, rank) in enumerate(RANGES):
            found = [t for t, use in enumerate(uses) if nth < len(use) and use[nth][0] == number]
            if not found:
                continue
            tokens = torch.tensor(found, dtype=torch.int32)
            weights = torch.tensor([uses[t][nth][1] for t in found])
            places = torch.arange(len(found), dtype=torch.int32) * rank + place
            place += len(found) * rank
            kept += [tokens, weights, places]
            pointers = (tokens.data_ptr(), weights.data_ptr(), places.data_ptr())
            jobs.append(abi.Job(start, rank, len(found), 0, *pointers))
    array = (abi.Job * max(1, len(jobs)))(*jobs)
    return Layout(abi.Jobs(len(jobs), place, ctypes.addressof(array)), [*kept, array])


def add(
    kernels: Kernels, x: Tensor, modules: Sequence[Module], uses: Sequence[Sequence[Use]]
) -> list[Tensor]:
    """Return the modules' deltas [T, out], each with its own uses."""
    layouts = [lay_out(use) for use in uses]
    count = len(modules)
    pairs = (abi.Pair * count)(*[abi.Pair(m.a.data_ptr(), m.b.data_ptr(), 0, 1) for m in modules])
    jobs = (abi.Jobs * count)(*[layout.jobs for layout in layouts])
    shrunk = [torch.full((max(1, layout.jobs.width),), math.nan) for layout in layouts]
    y = [torch.zeros(len(x), module.outputs) for module in modules]
    outputs = torch.tensor([module.outputs for module in modules], dtype=torch.int32)
    shrunk_at, y_at = ((ctypes.c_void_p * count)(*[t.data_ptr() for t in each]) for each in (shrunk, y))
    arrays = [ctypes.addressof(each) for each in (pairs, jobs, shrunk_at, y_at)]
    kernels.call(
        "lora_rows", count, arrays[0], arrays[1], x.data_ptr(), x.shape[1], arrays[2],
        outputs.data_ptr(), arrays[3],
    )  # fmt: skip
    return y


def expected(x: Tensor, module: Module, uses: Sequence[Use]) -> Tensor:
    spans = [
        LoraSpan(token, 1, tuple(({"m": RankRange(*RANGES[number])}, weight) for number, weight in use))
        for token, use in enumerate(uses)
    ]
    return lora(x, module.a, module.wide(), "m", spans)


def mixed(tokens: int, seed: int) -> list[Use]:
    """Base, one adapter, mixtures in either order, adapters met by many tokens and by one."""
    kinds: tuple[Use, ...] = (
        (),
        ((0, 1.0),),
        ((1, 0.7), (3, -0.25)),
        ((3, 0.3), (1, 1.0)),
        ((2, 2.0),),
        ((5, 1.0), (4, 0.5), (0, 0.1)),
        ((1, 1.0),),
    )
    draw = torch.randint(len(kinds), (tokens,), generator=torch.Generator().manual_seed(seed))
    return [kinds[kind] for kind in draw.tolist()]


@pytest.mark.parametrize("inputs", [64, 100, 896])
@pytest.mark.parametrize("tokens", [1, 3, 5, 70])
def test_three_modules_of_one_input_get_what_the_reference_gives(
    kernels: Kernels, inputs: int, tokens: int
) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, inputs)
    modules = [make_module(inputs, outputs, outputs) for outputs in (96, 33, 7)]
    uses = [mixed(tokens, seed) for seed in range(3)]
    for module, use, found in zip(modules, uses, add(kernels, x, modules, uses), strict=True):
        torch.testing.assert_close(found, expected(x, module, use), rtol=1e-5, atol=2e-5)


def test_a_long_prompt_gets_what_the_reference_gives(kernels: Kernels) -> None:
    x = torch.randn(300, 128)
    module, uses = make_module(128, 64, 1), [((3, 0.5), (1, 1.0))] * 300
    [found] = add(kernels, x, [module], [uses])
    torch.testing.assert_close(found, expected(x, module, uses), rtol=1e-5, atol=2e-5)


def test_a_tokens_bits_do_not_depend_on_its_company_or_the_number_of_threads(kernels: Kernels) -> None:
    torch.manual_seed(0)
    x = torch.randn(70, 100)
    module = make_module(100, 80, 0)
    alone = open_kernels(kernels.level, threads=1)
    assert isinstance(alone, Kernels)
    for seed in range(3):
        uses = mixed(70, seed)
        [found] = add(kernels, x, [module], [uses])
        assert torch.equal(add(alone, x, [module], [uses])[0], found)
        for token in range(70):
            [own] = add(kernels, x[token : token + 1].clone(), [module], [uses[token : token + 1]])
            assert torch.equal(own[0], found[token]), token
        order = torch.randperm(70)
        [shuffled] = add(kernels, x[order], [module], [[uses[t] for t in order.tolist()]])
        assert torch.equal(shuffled, found[order])


def test_anothers_fault_is_not_felt(kernels: Kernels) -> None:
    """Neither an adapter's nor a token's; that of a token's own adapter is."""
    torch.manual_seed(0)
    x, uses = torch.randn(40, 96), mixed(40, 4)
    module = make_module(96, 64, 0)
    [clean] = add(kernels, x, [module], [uses])
    assert clean.isfinite().all()
    users = torch.tensor([any(number == 1 for number, _ in use) for use in uses])
    start, rank = RANGES[1]
    for matrix in (module.a, module.b):
        kept = matrix[start : start + rank].clone()
        matrix[start : start + rank] = math.inf
        [found] = add(kernels, x, [module], [uses])
        assert torch.equal(found[~users], clean[~users])
        assert not found[users].isfinite().any()
        matrix[start : start + rank] = kept
    x[6] = math.nan
    [found] = add(kernels, x, [module], [uses])
    others = torch.arange(40) != 6
    assert torch.equal(found[others], clean[others])
