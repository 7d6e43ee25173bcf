"""A GPTQ copy of a 16-bit checkpoint, packed by our own quant/: codes rounded to nearest, no calibration data.

    python -m manylora.loadtest.material.gptq_copy demo/base /tmp/demo-base-gptq-int4

It is what the guide's …-Chat-Int4 models are in format, not in quality: GPTQ proper chooses codes by calibration.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from manylora.loadtest.material.checkpoints import linear_shapes
from manylora.quant.checkpoint import Checkpoint
from manylora.quant.gptq import quantize_gptq_nearest

GROUP = 128


def write_gptq_copy(source: Path, target: Path, group_size: int = GROUP, bits: int = 4) -> Path:
    """Write the checkpoint in ``source`` to ``target`` with the linear layers of its blocks in GPTQ; return ``target``.

    Embeddings, norms and head stay as they are, in float16 as GPTQ checkpoints have them. ``target`` must not exist.
    Memory: the whole packed model. Raises ValueError for sizes that groups or words don't divide.
    """
    target.mkdir(parents=True)
    linears = linear_shapes(source)
    _check_sizes(linears, group_size, bits)
    checkpoint = Checkpoint(source)
    tensors: dict[str, Tensor] = {}
    for name in sorted(checkpoint.names()):
        path, _, kind = name.rpartition(".")
        tensor = checkpoint.read(name)
        if path in linears and kind == "weight":
            packed = quantize_gptq_nearest(tensor, group_size, bits)
            parts = {each: getattr(packed, each) for each in ("qweight", "qzeros", "scales", "g_idx")}
            tensors |= {f"{path}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = tensor.half()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    config |= {"dtype": "float16", "quantization_config": _section(group_size, bits)}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return target


def _section(group_size: int, bits: int) -> Mapping[str, object]:
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": False,
    }


def _check_sizes(linears: Mapping[str, tuple[int, int]], group_size: int, bits: int) -> None:
    per_word = 32 // bits
    for path, (out, wide) in linears.items():
        if (group_size != -1 and wide % group_size) or wide % per_word or out % per_word:
            raise ValueError(
                f"{path} is [{out}, {wide}], which groups of {group_size} or words of {per_word} codes don't divide"
            )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="directory of a 16-bit checkpoint")
    parser.add_argument("target", type=Path, help="directory to write, not there yet")
    parser.add_argument("--group-size", type=int, default=GROUP, help="inputs that share a scale; -1: all")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    write_gptq_copy(asked.source, asked.target, asked.group_size, asked.bits)


if __name__ == "__main__":
    main()
