"""Prints the golden figures of docs/models.md: ``python -m tests.server.model.report``.

Each is the largest |Δ logit| over a prompt of 130 tokens, computed in chunks, on a small random model of a family,
in float32, against transformers (with peft, bitsandbytes, or dequantised GPTQ and AWQ weights put in).
"""

import logging
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from manylora.adapters.types import AdapterWeights
from manylora.server.model.loader import Quantization
from tests.quant.packers import awq_tensors, gptq_tensors, nearest_codes
from tests.server.model.models import FAMILIES, save_model
from tests.server.model.peft_models import adapted, nf4_model
from tests.server.model.quantized_models import save_quantized
from tests.server.model.steps import Stream, all_logits, load, place, random_adapter, step

LENGTH, CHUNK = 130, 50
COLUMNS = ("float32", "adapter", "NF4", "NF4 double", "GPTQ 4", "GPTQ 8", "AWQ")


def difference(
    directory: Path,
    theirs: torch.nn.Module,
    quantization: Quantization = "none",
    double_quant: bool = False,
    adapter_rank: int | None = None,
) -> float:
    model = load(directory, quantization=quantization, double_quant=double_quant)
    stream = Stream(0, [(7 * n) % 320 for n in range(LENGTH)])
    if adapter_rank is not None:
        weights: AdapterWeights = random_adapter(model.decoder.config, adapter_rank, seed=1)
        stream.adapters = ((place(model, [weights])[0], 1.0),)
        theirs = adapted(theirs, weights)
    while stream.computed < LENGTH:
        step(model, [(stream, min(CHUNK, LENGTH - stream.computed))])
    with torch.no_grad():
        expected = theirs(torch.tensor([stream.tokens])).logits[0]
    return float((all_logits(stream) - expected).abs().max())


def figures(family: str, directory: Path) -> list[float]:
    base = directory / "base"
    theirs = save_model(family, base)
    row = [difference(base, theirs), difference(base, theirs, adapter_rank=16)]
    for double_quant in (False, True):
        nf4 = nf4_model(base, double_quant=double_quant)
        row.append(difference(base, nf4, "nf4", double_quant))
    for bits in (4, 8):
        section = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": True}
        quantize = partial(nearest_codes, group_size=32, bits=bits, desc_act=True)
        pack = partial(gptq_tensors, zero_offset=1)
        gptq = save_quantized(family, directory / f"gptq{bits}", section, quantize, pack)
        row.append(difference(directory / f"gptq{bits}", gptq, "auto"))
    section = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    quantize = partial(nearest_codes, group_size=32, bits=4)
    awq = save_quantized(family, directory / "awq", section, quantize, awq_tensors)
    return [*row, difference(directory / "awq", awq, "auto")]


def main() -> None:
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    lines = [f"{'family':14}" + "".join(f"{column:>12}" for column in COLUMNS)]
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            row = figures(family, Path(directory))
        lines.append(f"{family:14}" + "".join(f"{value:12.1e}" for value in row))
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
