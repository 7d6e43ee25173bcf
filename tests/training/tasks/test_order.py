"""A task's rows come in the order in which transformers' Trainer takes them."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from manylora.training.errors import InvalidArgument
from manylora.training.tasks.order import DataOrder


class _Seen(torch.nn.Module):
    """Keeps the rows that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows: list[list[int]] = []

    def forward(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        self.rows.append(row.tolist())
        return {"loss": self.weight * 0}


@pytest.mark.parametrize(
    ("accumulation", "drop_last", "data_seed"), [(1, False, 7), (1, True, 7), (3, False, 7), (3, True, 3)]
)
def test_the_order_is_that_of_transformers(
    tmp_path: Path, accumulation: int, drop_last: bool, data_seed: int
) -> None:
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_drop_last=drop_last,
        dataloader_pin_memory=False,
        seed=7,
        data_seed=data_seed,
    )
    model = _Seen()
    Trainer(model=model, args=args, train_dataset=[{"row": number} for number in range(22)]).train()
    order = DataOrder.of(args, 22)
    steps = 2 * order.steps_per_epoch
    assert [rows for step in range(steps) for rows in order.window(step)] == model.rows


def test_windows_depend_on_the_step_alone() -> None:
    forwards, anew = DataOrder(30, 4, 2, seed=1), DataOrder(30, 4, 2, seed=1)
    seen = [forwards.window(step) for step in range(12)]
    assert anew.window(9) == seen[9]
    assert anew.window(2) == seen[2]


def test_too_few_rows_for_a_whole_batch_are_refused(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=8, dataloader_drop_last=True
    )
    with pytest.raises(InvalidArgument, match="dataloader_drop_last"):
        DataOrder.of(args, 5)
