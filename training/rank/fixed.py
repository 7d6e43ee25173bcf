"""A rank that stays what it is: plain peft."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from manylora.training.bases.save import load_adapter, save_adapter
from manylora.training.rank.policy import Moment, ParameterGroup

if TYPE_CHECKING:
    from peft import PeftModel

    from manylora.training.bases.settings import LoraSettings
    from manylora.training.bases.types import Base


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
        """Leave it to manylora.training.bases.lora.attach."""
        return None

    def prepare(self, model: "PeftModel") -> None:
        """Change nothing."""

    def optimizer_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[ParameterGroup]:
        """Return the groups as they are."""
        return [dict(group) for group in groups]

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
        save_adapter(model, directory)

    def restore(self, model: "PeftModel", directory: Path) -> None:
        """Load the adapter's values. Raises InvalidArgument unless they fit exactly."""
        load_adapter(model, directory)
