"""Bar of vocabularies: adapters that change embedding and head, or bring tokens, exact beside everything else."""

from pathlib import Path

import torch

from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.checks.vocabulary_exactness import check_vocabularies
from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.choose import PLAIN, choose_backend
from manylora.server.kernels.plain import PlainBackend

CPU = torch.device("cpu")
NEAR, EXACT = 0.25, 1e-4
"""How far logits, which go from -6 to 6, may be from peft's in float32: by native kernels, and by torch."""


async def vocabularies(directory: Path, kernels: str = PLAIN) -> Report:
    """Run the bar in ``directory``."""
    report = Report(f"8. Vocabularies: every kind that peft writes, beside each other, kernels: {kernels}")
    backend: AnyBackend = PlainBackend(CPU, torch.float32)
    if kernels != PLAIN:
        backend = choose_backend(CPU, torch.bfloat16, kernels, threads=2)
    limit = EXACT if isinstance(backend, PlainBackend) else NEAR
    for tied in (True, False):
        where = directory / ("tied" if tied else "untied")
        for outcome in check_vocabularies(where, backend, limit, tied=tied):
            report.check(outcome.name, outcome.detail, outcome.passed)
    return report
