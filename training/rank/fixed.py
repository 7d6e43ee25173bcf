"""A rank that stays what it is: plain peft."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from training.rank.policy import Moment, ParameterGroup
from training.rank.weights import load_adapter_values

if TYPE_CHECKING:
    from peft import PeftModel

    from training.bases.load import Base
    from training.bases.lora import LoraSettings


@dataclass(frozen=True, slots=True)
class FixedRank:
    """The policy of a run without a rank schedule."""

    rank: int

    @property
    def initial_rank(self) -> int:
        """The one rank."""
        return self.rank

    @property
    def final_rank(self) -> int:
        """The one rank."""
        return self.rank

    def attach(self, base: "Base", lora: "LoraSettings", total_steps: int) -> "PeftModel | None":
        """Leave it to training.bases.lora.attach."""
        return None

    def prepare(self, model: "PeftModel") -> None:
        """Change nothing."""

    def optimizer_groups(self, groups: Sequence[ParameterGroup]) -> list[ParameterGroup]:
        """Return the groups as they are."""
        return list(groups)

    def scheduler(self, scheduler: LRScheduler) -> None:
        """Take any scheduler."""

    def before_step(self, model: "PeftModel", at: Moment) -> bool:
        """Change nothing."""
        return False

    def penalty(self, model: "PeftModel") -> Tensor | None:
        """Return None."""
        return None

    def after_backward(self, model: "PeftModel", at: Moment) -> None:
        """Change nothing."""

    def save(self, model: "PeftModel", directory: Path, *, resumable: bool) -> None:
        """Write the adapter; nothing else is needed to go on."""
        model.save_pretrained(directory)

    def restore(self, model: "PeftModel", directory: Path) -> None:
        """Load the adapter's values. Raises InvalidArgument unless they fit exactly."""
        load_adapter_values(model, directory)
