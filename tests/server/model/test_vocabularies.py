"""Adapters that change embedding and head, by decoder and engine: against peft, and against themselves alone."""

from pathlib import Path

import pytest
import torch

from manylora.loadtest.checks.vocabulary_exactness import check_vocabularies
from manylora.server.kernels.choose import choose_backend
from manylora.server.kernels.cpu.backend import CpuBackend
from manylora.server.kernels.plain import PlainBackend

CPU = torch.device("cpu")
NATIVE_TOLERANCE = 0.25
"""Of logits of a spread of 5 by 8-bit activations, beside peft in float32."""


@pytest.mark.parametrize("tied", [True, False])
def test_every_kind_is_pefts_in_one_batch(tmp_path: Path, tied: bool) -> None:
    found = list(check_vocabularies(tmp_path, PlainBackend(CPU, torch.float32), 1e-4, tied=tied))
    assert len(found) > 20
    assert all(outcome.passed for outcome in found), [each for each in found if not each.passed]


@pytest.mark.parametrize("tied", [True, False])
def test_native_kernels_are_near_and_keep_everybodys_bits(tmp_path: Path, tied: bool) -> None:
    backend = choose_backend(CPU, torch.bfloat16, threads=2)
    if not isinstance(backend, CpuBackend):
        pytest.skip("no native kernels here")
    found = list(check_vocabularies(tmp_path, backend, NATIVE_TOLERANCE, tied=tied))
    assert all(outcome.passed for outcome in found), [each for each in found if not each.passed]


def test_rows_keep_their_bits_in_company_in_bfloat16(tmp_path: Path) -> None:
    found = list(check_vocabularies(tmp_path, PlainBackend(CPU, torch.bfloat16), 1.0, tied=True))
    alone = [outcome for outcome in found if "peft" not in outcome.name]
    assert len(alone) == 2
    assert all(outcome.passed for outcome in alone), alone
