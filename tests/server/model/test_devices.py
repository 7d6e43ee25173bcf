"""The same code on other devices: a step on CUDA, and what must hold for that where there is none.

On torch's meta device every op runs without values, and one that mixes it with a tensor of the CPU fails. So a
step there shows that nothing of a model, its metadata or its caches stays on the CPU unasked.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.step import AttentionMetadata, StepAdapters, StepBatch, WeightedAdapters
from manylora.server.model.decoder import Decoder
from manylora.server.model.loader import Quantization, load_weights
from manylora.server.model.served import ServedModel
from tests.quant.packers import awq_tensors, gptq_tensors, nearest_codes
from tests.server.model.models import save_model
from tests.server.model.peft_models import nf4_model
from tests.server.model.quantized_models import save_quantized
from tests.server.model.steps import BLOCK, CPU, ints, place, random_adapter

META = torch.device("meta")
NO_CUDA = "torch sees no CUDA device"
FORMATS = ("dense", "nf4", "gptq", "awq")


def save(name: str, directory: Path) -> None:
    """Write a small model with every switch that a family has, in a format."""
    quantize = partial(nearest_codes, bits=4, group_size=32)
    section = {"quant_method": name, "bits": 4, "group_size": 32, "zero_point": True}
    if name == "dense":
        save_model("qwen3", directory)
    elif name == "nf4":
        save_model("qwen2-window", directory / "base")
        nf4_model(directory / "base", double_quant=True).save_pretrained(directory)
    else:
        pack = awq_tensors if name == "awq" else partial(gptq_tensors, zero_offset=1)
        save_quantized("llama3", directory, section, quantize, pack)


def load_on(
    directory: Path, device: torch.device, dtype: torch.dtype, quantization: Quantization = "auto"
) -> ServedModel:
    backend = PlainBackend(device, dtype)
    config, weights, _ = load_weights(directory, backend, quantization=quantization)
    decoder = Decoder(config, weights, backend)
    return ServedModel(decoder, decoder.new_kv(20, BLOCK), decoder.new_arena(128))


def mixed_step(model: ServedModel, adapters: Sequence[WeightedAdapters]) -> Tensor:
    """A prompt of 40 tokens from its start and a decode of the 20th token, in blocks out of order."""
    tables, positions, rows = ints([[4, 2, 3], [9, 6, 0]]), ints([*range(40), 19]), ints([0] * 40 + [1])
    slots = tables[rows, positions // BLOCK] * BLOCK + positions % BLOCK
    metadata = AttentionMetadata(positions, slots, ints([0, 40, 41]), ints([40, 20]), tables)
    batch = StepBatch(ints(range(41)), metadata, StepAdapters.of_rows(adapters), ints([39, 40]))
    return model(batch).logits


def adapters_for(model: ServedModel) -> list[WeightedAdapters]:
    config = model.decoder.config
    one, two = place(
        model,
        [random_adapter(config, 8, 1, outputs=True), random_adapter(config, 4, 2, ("q_proj", "o_proj"))],
    )
    return [((one, 1.0),), ((one, 0.5), (two, 0.5))]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_makes_nothing_on_another_device(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(name, tmp_path)
    model = load_on(tmp_path, META, dtype, "none" if name == "dense" else "auto")
    logits = mixed_step(model, adapters_for(model))
    assert logits.device.type == "meta"
    assert logits.shape == (2, 320)
    assert logits.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("quantization", ["auto", "none"])
def test_cuda_gives_what_the_cpu_gives(name: str, quantization: Quantization, tmp_path: Path) -> None:
    """For dense weights "auto" quantises on the device."""
    if name != "dense":
        quantization = "auto"
    save(name, tmp_path)
    logits = []
    for device in (CPU, torch.device("cuda")):
        model = load_on(tmp_path, device, torch.float32, quantization)
        logits.append(mixed_step(model, adapters_for(model)).cpu())
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-3
