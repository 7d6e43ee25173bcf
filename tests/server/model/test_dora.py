"""DoRA by the decoder: peft's outputs on the weights that are served, in one batch with LoRA, mixtures and the base."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from manylora.adapters.reader import read_adapter
from manylora.adapters.types import AdapterWeights, BaseModules, ModuleShape
from manylora.loadtest.material.checkpoints import ALL_LINEAR, AdapterShape, write_adapter
from manylora.loadtest.material.peft_mixture import summed
from manylora.loadtest.material.quiet import advice_off
from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.cpu.backend import Activations, CpuBackend
from manylora.server.kernels.cpu.library import Kernels, open_kernels
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.step import WeightedAdapters
from manylora.server.model.config import FUSED
from manylora.server.model.decoder_base import DecoderBase
from manylora.server.model.served import ServedModel
from tests.server.model.models import save_model
from tests.server.model.peft_models import nf4_model
from tests.server.model.steps import CPU, Stream, all_logits, load, place, step
from tests.server.model.test_devices import FORMATS, save

IDS = [(7 * place + 3) % 300 for place in range(40)]
SHAPES = (
    AdapterShape(8, 16.0, ALL_LINEAR, 1, dora=True),
    AdapterShape(4, 8.0, ("q_proj", "v_proj", "down_proj"), 2),
    AdapterShape(3, 5.0, ("k_proj", "o_proj", "up_proj"), 3, rslora=True, dora=True),
)
USES: Sequence[tuple[tuple[int, float], ...]] = (
    (),
    ((0, 1.0),),
    ((1, 1.0),),
    ((2, 1.0),),
    ((0, 0.7), (1, -0.4), (2, 1.5)),
    ((2, -0.5),),
)
NEAR = {"int8": 0.05, "bfloat16": 0.03}
"""Of logits by native kernels, relative, by what weights are multiplied by."""


def write_all(directory: Path, base: Path) -> list[Path]:
    return [write_adapter(directory / str(number), base, shape) for number, shape in enumerate(SHAPES)]


def modules_of(model: ServedModel) -> BaseModules:
    config = model.decoder.config
    return {path: ModuleShape(*shape, config.has_bias(path)) for path, shape in config.base_modules().items()}


def read(model: ServedModel, path: Path) -> AdapterWeights:
    dtype, base = model.decoder.backend.dtype, DecoderBase(model.decoder)
    return read_adapter(path, modules_of(model), max_rank=64, dtype=dtype, base=base).weights


def answers(model: ServedModel, paths: Sequence[Path], *, together: bool = True) -> list[Tensor]:
    placed = place(model, [read(model, path) for path in paths])
    uses: list[WeightedAdapters] = [tuple((placed[part], weight) for part, weight in use) for use in USES]
    streams = [Stream(number, IDS, use) for number, use in enumerate(uses)]
    if together:
        step(model, [(stream, 25 + stream.number) for stream in streams])
        step(model, [(stream, 15 - stream.number) for stream in streams])
    else:
        for stream in streams:
            step(model, [(stream, 40)])
    return [all_logits(stream) for stream in streams]


@torch.no_grad()
def by_peft(model: PreTrainedModel, paths: Sequence[Path]) -> list[Tensor]:
    with advice_off():
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), paths[0], adapter_name="0")
        for number, path in enumerate(paths[1:], 1):
            adapted.load_adapter(path, adapter_name=str(number))
        found = [model(torch.tensor([IDS])).logits[0].float()]
        for use in USES[1:]:
            with summed(adapted, [(str(part), weight) for part, weight in use]) as mixed:
                found.append(mixed(torch.tensor([IDS])).logits[0].float())
    return found


def assert_pefts(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).abs().max()) <= 1e-4
        assert torch.equal(mine.argmax(-1), other.argmax(-1))
    ends = [logits[-1] for logits in ours]
    assert all(float((a - b).abs().max()) > 0.01 for n, a in enumerate(ends) for b in ends[:n])


@pytest.mark.parametrize("family", ["qwen2", "llama-linear", "qwen3"])
def test_a_mixed_batch_gives_what_peft_gives_and_each_keeps_its_bits(family: str, tmp_path: Path) -> None:
    """With biases in some matrices or in all: those of the base aren't scaled."""
    theirs = save_model(family, tmp_path / "base")
    paths = write_all(tmp_path, tmp_path / "base")
    ours = answers(load(tmp_path / "base"), paths)
    assert_pefts(ours, by_peft(theirs, paths))
    alone = answers(load(tmp_path / "base"), paths, together=False)
    assert all(map(torch.equal, ours, alone))


@pytest.mark.parametrize("double_quant", [False, True])
def test_on_a_base_in_nf4_lengths_are_of_what_is_served(tmp_path: Path, double_quant: bool) -> None:
    save_model("qwen2", tmp_path / "base")
    paths = write_all(tmp_path, tmp_path / "base")
    model = load(tmp_path / "base", quantization="nf4", double_quant=double_quant)
    theirs = by_peft(nf4_model(tmp_path / "base", double_quant=double_quant), paths)
    ours = answers(model, paths)
    assert_pefts(ours, theirs)
    dense = load(tmp_path / "base")
    other, own = (read(each, paths[0]).gains for each in (dense, model))
    assert any(float((other[path] - gain).abs().max()) > 1e-3 for path, gain in own.items())


@pytest.mark.parametrize("activations", ["int8", "bfloat16"])
def test_native_kernels_answer_as_plain_torch_does(activations: Activations, tmp_path: Path) -> None:
    kernels = open_kernels(threads=2)
    if not isinstance(kernels, Kernels):
        pytest.skip(kernels.reason)
    save_model("llama-linear", tmp_path / "base")
    paths = write_all(tmp_path, tmp_path / "base")
    plain = answers(load(tmp_path / "base", quantization="nf4"), paths)
    backend = CpuBackend(kernels, torch.float32, activations)
    ours, alone = (
        answers(load(tmp_path / "base", quantization="nf4", backend=backend), paths, together=together)
        for together in (True, False)
    )
    for mine, other in zip(ours, plain, strict=True):
        assert float((mine - other).norm() / other.norm()) < NEAR[activations]
    assert all(map(torch.equal, ours, alone))


def backends() -> list[tuple[AnyBackend, float]]:
    found: list[tuple[AnyBackend, float]] = [
        (PlainBackend(CPU, torch.float32), 0.0),
        (PlainBackend(CPU, torch.bfloat16), 5e-3),
    ]
    kernels = open_kernels(threads=2)
    if isinstance(kernels, Kernels):
        # Of NF4's sixteen values the bytes are rounded; dense ones are bfloat16.
        found += [
            (CpuBackend(kernels, torch.float32), 0.01),
            (CpuBackend(kernels, torch.float32, "bfloat16"), 5e-3),
        ]
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_that_are_multiplied_by(name: str, tmp_path: Path) -> None:
    """Times the identity, in pieces from any row on."""
    save(name, tmp_path)
    exact: dict[tuple[int, str], Tensor] = {}
    for backend, near in backends():
        model = load(tmp_path, quantization="none" if name == "dense" else "auto", backend=backend)
        for number, layer in enumerate(model.decoder.weights.layers[:2]):
            for fused in FUSED:
                weight = getattr(layer, fused)
                rows = torch.cat(list(backend.rows(weight, 0, weight.shape[0])))
                assert rows.shape == weight.shape
                assert rows.dtype == torch.float32
                wanted = exact.setdefault((number, fused), rows)
                assert float((rows - wanted).norm() / wanted.norm()) <= near
                part = torch.cat(list(backend.rows(weight, 40, 77)))
                assert torch.equal(part, rows[40:77])
                if isinstance(backend, PlainBackend) and weight.bias is None:
                    product = weight(torch.eye(weight.shape[1], dtype=backend.dtype)).T.float()
                    # bitsandbytes' kernel rounds a weight more than once.
                    assert float((product - rows).norm() / rows.norm()) <= near
