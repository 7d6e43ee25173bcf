"""MATMUL_LIMITS on this machine: within them a row's bits depend on neither its company nor zeros among its terms.

They were measured, not proved. Where one doesn't hold, raise it (least_rows, least_columns) or lower it (most_depth)
in server/kernels/plain/invariance.py until it does: everything that promises equal bits follows from that table.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.server.kernels.plain.invariance import MATMUL_LIMITS, STRICT, hold_mkl

MOST_ROWS = 520
ROWS = (1, 2, 3, 5, 16, 17, 31, 33, 64, 100, 129, 256, 513)
# (K, N): small and odd ones, heads and ranks, hidden and MLP sizes of small models, more depth than any cache block.
SHAPES = (
    (8, 896),
    (20, 17),
    (64, 64),
    (96, 100),
    (128, 384),
    (200, 33),
    (704, 256),
    (896, 1152),
    (4864, 128),
)
SLOW = {torch.float16}  # emulated


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def advice(dtype: torch.dtype, limit: str, what: str) -> str:
    return (
        f"{what} in {dtype} on {platform.processor() or platform.machine()} with "
        f"{torch.backends.cpu.get_cpu_capability()}: {limit} of MATMUL_LIMITS[{dtype}] doesn't hold here. "
        "Change it in server/kernels/plain/invariance.py until this test passes."
    )


def cases(dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    limits = MATMUL_LIMITS[dtype]
    generator = torch.Generator().manual_seed(0)
    for depth, wanted in SHAPES:
        if dtype in SLOW and depth * wanted > 100_000:
            continue
        columns = max(wanted, limits.least_columns)
        x = torch.randn(MOST_ROWS, depth, generator=generator).to(dtype)
        yield depth, columns, x, (torch.randn(columns, depth, generator=generator) * 0.05).to(dtype)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", MATMUL_LIMITS)
def test_rows_do_not_depend_on_their_number(dtype: torch.dtype, count: int) -> None:
    # Two threads on a busy machine wait for each other: fewer cases.
    chosen = ROWS if count == 1 else (17, 129, 513)
    with threads(count):
        for depth, columns, x, weight in cases(dtype):
            whole = F.linear(x, weight)
            for rows in chosen:
                if rows < MATMUL_LIMITS[dtype].least_rows:
                    continue
                for first in (0, 7):
                    part = F.linear(x[first : first + rows], weight)
                    assert torch.equal(part, whole[first : first + rows]), advice(
                        dtype,
                        "least_rows or least_columns",
                        f"{rows} rows, K = {depth}, N = {columns} differ",
                    )


@pytest.mark.parametrize("dtype", MATMUL_LIMITS)
def test_rows_added_in_place_do_not_depend_on_their_number(dtype: torch.dtype) -> None:
    """The form that adds adapters: out += x B."""
    limits = MATMUL_LIMITS[dtype]
    generator = torch.Generator().manual_seed(1)
    for depth, columns in ((4, 64), (16, 300), (64, 128), (limits.most_depth, 256)):
        x = torch.randn(MOST_ROWS, depth, generator=generator).to(dtype)
        b = torch.randn(depth, columns, generator=generator).to(dtype)
        base = torch.randn(MOST_ROWS, columns, generator=generator).to(dtype)
        whole = base.clone().addmm_(x, b)
        for rows in ROWS:
            if rows < limits.least_rows:
                continue
            part = base[:rows].clone().addmm_(x[:rows], b)
            assert torch.equal(part, whole[:rows]), advice(
                dtype, "least_rows", f"{rows} added rows, K = {depth}, N = {columns} differ"
            )


@pytest.mark.parametrize("dtype", MATMUL_LIMITS)
def test_zeros_among_the_terms_change_nothing(dtype: torch.dtype) -> None:
    """An adapter's columns among those of others, and a context's keys among masked ones."""
    limits = MATMUL_LIMITS[dtype]
    generator = torch.Generator().manual_seed(2)
    rows = max(limits.least_rows, 2)
    columns = max(limits.least_columns, 96)
    for used in (4, 8, 16, 24, 64, limits.most_depth):
        x = torch.randn(rows, used, generator=generator).to(dtype)
        b = torch.randn(used, columns, generator=generator).to(dtype)
        base = torch.randn(rows, columns, generator=generator).to(dtype)
        alone = base.clone().addmm_(x, b)
        for depth in range(used, limits.most_depth + 1, 20):
            for first in {0, (depth - used) // 2, depth - used}:
                wide = torch.zeros(rows, depth, dtype=dtype)
                wide[:, first : first + used] = x
                others = torch.randn(depth, columns, generator=generator).to(dtype)
                others[first : first + used] = b
                among = base.clone().addmm_(wide, others)
                assert torch.equal(among, alone), advice(
                    dtype, "most_depth", f"{used} terms at {first} of {depth} differ"
                )


@pytest.mark.parametrize("dtype", [dtype for dtype in MATMUL_LIMITS if dtype not in SLOW])
def test_zeros_between_the_terms_change_nothing(dtype: torch.dtype) -> None:
    """A mixture's parts lie apart in a piece, others' between them. One sum in 100,000 tells, so many are made."""
    limits = MATMUL_LIMITS[dtype]
    generator = torch.Generator().manual_seed(4)
    rows, columns, grain = max(limits.least_rows, 8), 20_000, limits.grain
    for used in (6, 16, 32, 62):
        x = torch.randn(rows, used, generator=generator).to(dtype)
        b = torch.randn(used, columns, generator=generator).to(dtype)
        base = torch.randn(rows, columns, generator=generator).to(dtype)
        alone = base.clone().addmm_(x, b)
        half = used // 2 // grain * grain
        for first, second in ((0, half + grain), (3 * grain, half + 8 * grain), (16, half + 49 * grain)):
            places = [*range(first, first + half), *range(second, second + used - half)]
            wide = torch.zeros(rows, limits.most_depth, dtype=dtype)
            others = torch.randn(limits.most_depth, columns, generator=generator).to(dtype)
            wide[:, places], others[places] = x, b
            among = base.clone().addmm_(wide, others)
            assert torch.equal(among, alone), advice(
                dtype, "grain or most_depth", f"{used} terms in two parts at {first} and {second} differ"
            )


def test_batched_products_of_attention_do_not_depend_on_their_number() -> None:
    """Scores and weighted values are float32 products in a batch, one matrix for each sequence and KV head."""
    limits = MATMUL_LIMITS[torch.float32]
    generator = torch.Generator().manual_seed(3)
    for dim in (32, 64, 128):
        q = torch.randn(12, 64, dim, generator=generator)
        k = torch.randn(12, dim, 320, generator=generator)
        whole = torch.bmm(q, k)
        for batch in (1, 2, 5):
            for rows in (limits.least_rows, 17, 33):
                for keys in (64, 128, 192):
                    part = torch.bmm(q[:batch, :rows], k[:batch, :, :keys])
                    assert torch.equal(part, whole[:batch, :rows, :keys]), advice(
                        torch.float32, "least_rows", f"{batch} products of {rows} × {keys}, D = {dim}, differ"
                    )


@pytest.mark.parametrize(
    ("vendor", "before", "after"),
    [
        ("GenuineIntel", None, "AVX512,STRICT"),
        ("GenuineIntel", "AUTO", "AUTO"),
        ("AuthenticAMD", None, None),
        (None, None, None),
    ],
)
def test_mkl_is_asked_for_its_strict_mode_on_intels_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str | None, before: str | None, after: str | None
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv(STRICT, raising=False)
    if before is not None:
        monkeypatch.setenv(STRICT, before)
    if vendor is not None:
        (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    hold_mkl(tmp_path / "cpuinfo")
    assert os.environ.get(STRICT) == after
