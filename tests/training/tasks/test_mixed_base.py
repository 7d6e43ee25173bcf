"""The pass over all tasks' rows: every family's attention, windows too, and adapters of every start."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training.arguments import TrainingArguments
from manylora.training.bases.initial import ADAPTER, lora_layers
from manylora.training.bases.load import Base, BaseSettings, load_base
from manylora.training.bases.lora import LoraSettings, attach
from manylora.training.loop.loss import token_losses
from manylora.training.tasks.batch import mix
from manylora.training.tasks.mixed_base import MixedBase
from manylora.training.tasks.skeleton import skeleton
from tests.training.loop.making import items

ROWS = [items(3, seed=seed, longest=40) for seed in range(4)]
SETTINGS = (
    LoraSettings(r=4, targets=("q_proj", "v_proj"), dropout=0.0),
    LoraSettings(r=8, alpha=32, dropout=0.0, use_rslora=True),
    LoraSettings(r=2, init="pissa", dropout=0.0),
    LoraSettings(r=6, targets=("down_proj",), dropout=0.0),
)


def load(directory: Path, family: str, *, q_lora: bool, window: int | None) -> Base:
    path = write_base(directory / family, replace(TINY, family=family))
    base = load_base(BaseSettings(str(path), q_lora=q_lora, dtype="fp32"))
    if window is not None:
        base.model.config.sliding_window = window
        for layer in base.model.model.layers:
            layer.self_attn.sliding_window = window
    return base


@pytest.mark.parametrize(
    ("family", "q_lora", "window"),
    [("qwen2", True, None), ("qwen3", False, None), ("llama", False, None), ("mistral", False, 7)],
)
def test_losses_and_gradients_are_those_of_each_adapter_alone(
    tmp_path: Path, family: str, q_lora: bool, window: int | None
) -> None:
    base = load(tmp_path, family, q_lora=q_lora, window=window)
    models = [attach(replace(base, model=skeleton(base.model)), each) for each in SETTINGS]
    expected = []
    means: list[list[float]] = []
    for model, rows in zip(models, ROWS, strict=True):
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_B[ADAPTER].weight, std=0.05)
        losses_of_rows = [token_losses(model, _batch(row))[0] for row in rows]
        means.append([float(losses.detach().mean()) for losses in losses_of_rows])
        alone = torch.stack([losses.sum() for losses in losses_of_rows]).sum()
        torch.autograd.backward(alone)
        expected.append((alone.detach(), [each.grad for each in model.parameters() if each.grad is not None]))
        model.zero_grad()
    mixed = MixedBase(base, models, TrainingArguments(str(tmp_path), use_cpu=True))
    losses = mixed.backward(mix(ROWS), [1.0] * 4, [0] * 4, [0.0] * 4)
    for found, model, (loss, gradients) in zip(losses.sums, models, expected, strict=True):
        torch.testing.assert_close(found, loss)
        own = [each.grad for each in model.parameters() if each.grad is not None]
        for gradient, wanted in zip(own, gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)
    again = mixed.evaluate(mix(ROWS))
    torch.testing.assert_close(again.sums, losses.sums)
    for task, mean in enumerate(means):
        assert again.rows(task) == pytest.approx(mean, rel=1e-4)


def _batch(row: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"]])
    return {"input_ids": ids, "labels": torch.tensor([row["labels"]]), "attention_mask": torch.ones_like(ids)}


def test_no_two_layers_draw_the_same_dropout(tmp_path: Path) -> None:
    base = load(tmp_path, "llama", q_lora=False, window=None)
    lora = LoraSettings(r=4, targets=("k_proj", "v_proj"), dropout=0.5)
    model = attach(replace(base, model=skeleton(base.model)), lora)
    for _, layer in lora_layers(model):
        torch.nn.init.constant_(layer.lora_A[ADAPTER].weight, 0.1)
        torch.nn.init.constant_(layer.lora_B[ADAPTER].weight, 0.1)
    mixed = MixedBase(base, [model], TrainingArguments(str(tmp_path), use_cpu=True))
    # Two layers that see the same input, and are the same but for what dropout leaves out of it.
    attention = base.model.get_submodule("model.layers.0.self_attn")
    keys, values = attention.get_submodule("k_proj"), attention.get_submodule("v_proj")
    keys.load_state_dict(values.state_dict())
    seen: list[torch.Tensor] = []
    for each in (keys, values):
        each.register_forward_hook(lambda _, inputs, output: seen.append(output.detach().clone()))
    mixed.evaluate(mix([ROWS[0]]))
    torch.testing.assert_close(seen[0], seen[1])
    seen.clear()
    mixed.backward(mix([ROWS[0]]), [1.0], [7], [0.0])
    assert not torch.allclose(seen[0], seen[1])


def test_skeletons_share_every_weight_and_change_nothing_of_the_base(tmp_path: Path) -> None:
    base = load(tmp_path, "qwen2", q_lora=True, window=None)
    before = [name for name, _ in base.model.named_modules()]
    own = skeleton(base.model)
    model = attach(replace(base, model=own), LoraSettings(r=4))
    assert [name for name, _ in base.model.named_modules()] == before
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    shared = {each.data_ptr() for each in base.model.parameters()}
    frozen = [each for each in model.parameters() if not each.requires_grad]
    assert {each.data_ptr() for each in frozen} == shared
    weight = base.model.get_submodule("model.layers.0.self_attn.q_proj").weight
    assert own.get_submodule("model.layers.0.self_attn.q_proj").base_layer.weight is weight
