"""Holds decode steps that are recorded and played back against the same steps issued op by op: bit for bit.

On a CPU, where nothing is recorded, playing back is calling again: the same code, and a check of what goes in.
`make gpu-check` runs it; alone, ``python -m manylora.loadtest.checks.recorded_steps --device cuda``.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from manylora.adapters.reader import read_adapter
from manylora.adapters.types import ModuleShape
from manylora.loadtest.checks.exactness import Outcome, prompt, shape_of
from manylora.loadtest.material.by_hand import Row, load, place, step
from manylora.loadtest.material.checkpoints import ALL_LINEAR, AdapterShape, write_adapter, write_base
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.plain.cuda_graph import CudaRecorder
from manylora.server.kernels.plain.decode_steps import Call, Record
from manylora.server.model.decoder_base import DecoderBase
from manylora.server.model.loader import Quantization
from manylora.server.model.served import ServedModel

FORMS: tuple[tuple[torch.dtype, Quantization], ...] = (
    (torch.float32, "none"),
    (torch.bfloat16, "none"),
    (torch.bfloat16, "nf4"),
    (torch.bfloat16, "int8"),
)
PROMPTS = (3, 61, 120, 17, 64)
DECODES = 24
"""Long enough for contexts to outgrow a size, and for rows to come and go."""


class Counted:
    """A recorder that counts how often what it recorded is played."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self.recorded = 0
        self.played = 0

    def __call__(self, call: Call) -> Call:
        """Record ``call``."""
        play = self._record(call)
        self.recorded += 1

        def again() -> None:
            self.played += 1
            play()

        return again


def check_recorded(scratch: Path, device: torch.device) -> Iterator[Outcome]:
    """Run the same steps recorded and op by op, in several types and weight formats."""
    record: Callable[[Call], Call] = CudaRecorder(device) if device.type == "cuda" else _call_again
    base = write_base(scratch / "recorded", shape_of("qwen2"), seed=6)
    shapes = (
        AdapterShape(8, 16.0, ALL_LINEAR, 1, dora=True),
        AdapterShape(16, 16.0, ("q_proj", "down_proj"), 2),
    )
    paths = [write_adapter(scratch / f"recorded{each.seed}", base, each) for each in shapes]
    for dtype, quantization in FORMS:
        counted = Counted(record)
        found = []
        for recorder in (counted, None):
            backend = PlainBackend(device, dtype, record=recorder, fixed_decodes=True)
            found.append(_logits(load(base, backend, len(PROMPTS), quantization), paths))
        equal = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        finite = all(bool(each.isfinite().all()) for each in found[0])
        yield Outcome(
            f"recorded decode steps, {str(dtype).removeprefix('torch.')}, {quantization}: the bits of op by op",
            equal and finite and counted.played > counted.recorded,
            f"{counted.recorded} recorded, {counted.played} played back",
        )


def _call_again(call: Call) -> Call:
    return call


def _logits(model: ServedModel, paths: list[Path]) -> list[Tensor]:
    """Bring prompts in and decode them; return each row's logits. The last row is there every other eight steps."""
    backend, config = model.decoder.backend, model.decoder.config
    modules = {name: ModuleShape(out, wide) for name, (out, wide) in config.base_modules().items()}
    base = DecoderBase(model.decoder)
    one, two = place(
        model,
        [read_adapter(path, modules, max_rank=16, dtype=backend.dtype, base=base).weights for path in paths],
    )
    uses = [(), ((one, 1.0),), ((two, 1.0),), ((one, 0.7), (two, 0.3)), ((one, 1.0),)]
    rows = [
        Row(number, prompt(length + DECODES, number), used)
        for number, (length, used) in enumerate(zip(PROMPTS, uses, strict=True))
    ]
    step(model, list(zip(rows, PROMPTS, strict=True)))
    for turn in range(DECODES):
        step(model, [(row, 1) for row in rows[: len(rows) - turn // 8 % 2]])
    return [row.all_logits() for row in rows]


def main() -> None:
    """Check, and say so; exit status 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    with tempfile.TemporaryDirectory(prefix="manylora-check-") as scratch:
        outcomes = list(check_recorded(Path(scratch), torch.device(parser.parse_args().device)))
    for outcome in outcomes:
        print(f"{'pass' if outcome.passed else 'FAIL'}  {outcome.name} ({outcome.detail})")  # noqa: T201  # the result
    sys.exit(int(not all(outcome.passed for outcome in outcomes)))


if __name__ == "__main__":
    main()
