"""Gradients through frozen 4- and 8-bit weights equal autograd's through the same weights, dequantised."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manylora.quant.awq import AwqTensor
from manylora.quant.gptq import GptqTensor
from manylora.training.bases.initial import dense_weight
from manylora.training.bases.lora import LoraSettings, attach
from manylora.training.bases.quantized import QuantizedLinear
from tests.quant.packers import awq_tensors, gptq_tensors, random_codes
from tests.training.bases.making import IDS, load

WIDE, OUT, GROUP = 64, 40, 16
KINDS = ("nf4", "gptq", "gptq8", "gptq-reordered", "awq")


def gptq(bits: int, desc_act: bool) -> GptqTensor:
    codes = random_codes(WIDE, OUT, GROUP, bits, sym=False, desc_act=desc_act)
    return GptqTensor(**gptq_tensors(codes, 1), bits=bits, zero_offset=1)


def awq() -> AwqTensor:
    return AwqTensor(**awq_tensors(random_codes(WIDE, OUT, GROUP, 4, sym=False, desc_act=False)))


LAYERS: dict[str, Callable[[], GptqTensor | AwqTensor]] = {
    "gptq": lambda: gptq(4, False),
    "gptq8": lambda: gptq(8, False),
    "reordered": lambda: gptq(4, True),
    "awq": awq,
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_layer_is_a_linear_layer(kind: str, with_bias: bool) -> None:
    packed = LAYERS[kind]()
    bias = torch.randn(OUT) if with_bias else None
    layer = QuantizedLinear(packed, bias, torch.float32)
    x = torch.randn(3, 5, WIDE, requires_grad=True)
    grad = torch.randn(3, 5, OUT)
    layer(x).backward(grad)
    y = x.detach().clone().requires_grad_(True)
    expected = nn.functional.linear(y, packed.dequantize(torch.float32), bias)
    torch.autograd.backward(expected, grad)
    assert torch.equal(layer(x), expected)
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-5)


def test_autocast_computes_in_its_type() -> None:
    layer = QuantizedLinear(awq(), torch.randn(OUT), torch.float32)
    x = torch.randn(2, WIDE, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.autograd.backward(y.sum())
    assert isinstance(x.grad, Tensor)
    assert x.grad.dtype == torch.float32


def test_casting_a_model_leaves_the_scales_alone() -> None:
    layer = QuantizedLinear(awq(), None, torch.float32)
    before = layer.weight
    layer.to(torch.bfloat16)
    assert layer.get_parameter("scales").dtype == torch.float16
    assert torch.equal(layer.weight, before)


def unquantised(model: nn.Module) -> nn.Module:
    """Replace every packed layer by an nn.Linear of the same weight."""
    for path, layer in list(model.named_modules()):
        quantised = getattr(getattr(layer, "weight", None), "quant_state", None) is not None
        if not quantised and not isinstance(layer, QuantizedLinear):
            continue
        weight, bias = dense_weight(layer), layer.bias
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(bias, Tensor):
            plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        model.set_submodule(path, plain)
    return model


def trained_gradients(model: Any) -> dict[str, Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}


def with_lora(directory: Path, kind: str, *, plain: bool, use_dora: bool = False) -> Any:
    base = load(directory, q_lora=kind == "nf4")
    if plain:
        unquantised(base.model)
        base.model.is_loaded_in_4bit = False  # peft would look for bitsandbytes' layers
    model = attach(base, LoraSettings(r=4, dropout=0.0, use_dora=use_dora))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.train()


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_factors_equal_those_through_dense_weights(
    directories: dict[str, Path], kind: str, reentrant: bool | None
) -> None:
    gradients, losses = [], []
    for plain in (False, True):
        model = with_lora(directories[kind], kind, plain=plain)
        if reentrant is not None and not plain:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(trained_gradients(model))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["nf4", "gptq-reordered", "awq"])
def test_dora_sees_the_dequantised_weight(directories: dict[str, Path], kind: str) -> None:
    gradients = []
    for plain in (False, True):
        model = with_lora(directories[kind], kind, plain=plain, use_dora=True)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(trained_gradients(model))
    assert any("magnitude" in name for name in gradients[0])
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_an_evaluation_in_between_changes_no_gradient(directories: dict[str, Path]) -> None:
    """bitsandbytes repacks weights on some CPUs when it evaluates, and its kernel for that has no backward pass."""
    model = with_lora(directories["nf4"], "nf4", plain=False)
    model(input_ids=IDS, labels=IDS).loss.backward()
    before = trained_gradients(model)
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, gradient in trained_gradients(model).items():
        assert torch.equal(gradient, before[name]), name


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    layer = QuantizedLinear(awq(), None, torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, WIDE, requires_grad=True))
    assert not kept


def test_merging_into_a_packed_layer_is_refused(directories: dict[str, Path]) -> None:
    model = attach(load(directories["gptq"]), LoraSettings(r=4))
    with pytest.raises(NotImplementedError, match="manylora merge"):
        model.merge_and_unload()
