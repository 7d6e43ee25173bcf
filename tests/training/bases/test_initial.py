"""Starts that are taken from the base equal peft's, which changes the base for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from manylora.training.bases.initial import dense_weight, lora_layers
from manylora.training.bases.lora import LoraSettings, attach
from tests.training.bases.making import IDS, load

RANK = 4
TARGETS = ("q_proj", "o_proj", "down_proj")


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    torch.autograd.backward(loss)
    return loss.detach(), {name: each.grad for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_first_step_is_that_of_peft(init: str, dense_dir: Path) -> None:
    config = LoraConfig(
        r=RANK, lora_alpha=16, target_modules=list(TARGETS), init_lora_weights=init, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(load(dense_dir).model, config)
    ours = attach(load(dense_dir), LoraSettings(r=RANK, init=init, targets=TARGETS))
    expected_loss, expected = loss_and_gradients(theirs)
    loss, gradients = loss_and_gradients(ours)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_loftq_starts_with_the_best_factors_of_its_rank(dense_dir: Path) -> None:
    """No matrix of rank r is nearer to what quantisation took away (Eckart and Young)."""
    base = load(dense_dir, q_lora=True)
    whole = load(dense_dir).model
    model = attach(base, LoraSettings(r=RANK, init="loftq", targets=TARGETS))
    for path, layer in lora_layers(model):
        error = dense_weight(whole.get_submodule(path)) - dense_weight(layer.get_base_layer())
        left = (error - layer.get_delta_weight("default")).norm()
        best = torch.linalg.svdvals(error)[RANK:].norm()
        torch.testing.assert_close(left, best, rtol=1e-3, atol=0)
