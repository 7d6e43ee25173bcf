"""A run of a few steps with transformers' own Trainer, for what listens to it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

ROWS = 32


class Line(nn.Module):
    """y = w x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the squared error."""
        return {"loss": ((self.weight * x - y) ** 2).mean(), "out": self.weight * x}


def tiny_trainer(
    directory: Path, *callbacks: TrainerCallback, kind: type[Trainer] = Trainer, **arguments: Any
) -> Trainer:
    """A trainer of 8 steps that logs each and evaluates every fourth."""
    rows = [{"x": torch.tensor(float(i % 3)), "y": torch.tensor(2.0 * (i % 3))} for i in range(ROWS)]
    settings: dict[str, Any] = {
        "max_steps": 8,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "report_to": [],
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "label_names": ["y"],
    }
    args = TrainingArguments(output_dir=str(directory), **(settings | arguments))
    return kind(model=Line(), args=args, train_dataset=rows, eval_dataset=rows[:8], callbacks=[*callbacks])
