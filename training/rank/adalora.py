"""AdaLoRA (2303.10512) by peft: a rank budget that shrinks while training, spent where gradients say it matters.

``--rank_schedule adalora:12:8`` starts every module with rank 12 and ends with 8 on average. peft's masks rows of rank
(its E becomes 0) and never makes them smaller, so memory is that of the first rank until the end; what is saved is a
plain LoRA of the rows that are left (training/rank/folding.py).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from manylora.adapters.durable import make_ordinary
from manylora.training.bases.quantized import forbid_merging
from manylora.training.bases.quiet import quiet_peft
from manylora.training.bases.targets import choose_targets
from manylora.training.bases.tokens import train_in_float32, trained_tokens
from manylora.training.errors import InvalidArgument
from manylora.training.rank.budget import AdaLoraBudget
from manylora.training.rank.folding import adalora_layers, save_folded
from manylora.training.rank.policy import Moment, ParameterGroup

if TYPE_CHECKING:
    from peft import AdaLoraConfig, PeftModel

    from manylora.training.bases.settings import LoraSettings
    from manylora.training.bases.types import Base

PATTERN_FILE, VALUES_FILE = "rank_state.json", "rank_state.safetensors"
_TABLES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLoraRank:
    """The policy of a run with AdaLoRA."""

    def __init__(self, budget: AdaLoraBudget) -> None:
        self.budget = budget
        self._config: AdaLoraConfig | None = None

    @property
    def initial_rank(self) -> int:
        """The first rank; the LoRA settings' alpha belongs to it."""
        return self.budget.first_rank

    @property
    def final_rank(self) -> int:
        """The first rank, which memory is taken for until the end."""
        return self.budget.first_rank

    @property
    def rank(self) -> int:
        """The largest rank that a module was left at the last cut."""
        pattern = self._config and self._config.rank_pattern
        return max(sum(kept) for kept in pattern.values()) if pattern else self.budget.first_rank

    def attach(self, base: "Base", lora: "LoraSettings", total_steps: int) -> "PeftModel":
        """Put AdaLoRA on the base. Raises InvalidArgument for settings that AdaLoRA doesn't know."""
        from peft import AdaLoraConfig, TaskType, get_peft_model

        self._refuse(lora)
        targets, _ = choose_targets(base.model, lora.targets)
        config = AdaLoraConfig(
            task_type=TaskType.CAUSAL_LM,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(targets),
            bias=lora.bias,
            revision=base.revision,
            **self.budget.peft_fields(total_steps),
            **trained_tokens(base, lora),
        )
        try:
            with quiet_peft():
                model = get_peft_model(base.model, config)
        except ValueError as error:
            raise InvalidArgument(
                f"--rank_schedule {self.budget}: AdaLoRA takes linear layers only; change --lora_target_modules "
                f"({str(error).splitlines()[0]})."
            ) from None
        config.base_model_name_or_path = base.name
        forbid_merging(model)
        train_in_float32(model, base.dtype)
        if base.kind == "nf4":
            base.model.enable_input_require_grads()
        return model

    def prepare(self, model: "PeftModel") -> None:
        """Change nothing."""
        self._config = _config(model)

    def optimizer_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[ParameterGroup]:
        """Return the groups as they are."""
        return [dict(group) for group in groups]

    def scheduler(self, scheduler: LRScheduler) -> None:
        """Take any scheduler."""

    def before_step(self, model: "PeftModel", at: Moment) -> bool:
        """Change nothing."""
        return False

    def penalty(self, model: "PeftModel") -> Tensor:
        """Return the weighted mean distance of AAᵀ and BᵀB from the identity (section 3.1), which keeps them like the
        singular vectors that they stand for."""
        distances = []
        for _, layer in adalora_layers(model):
            for factor in (layer.lora_A[model.active_adapter], layer.lora_B[model.active_adapter].T):
                identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
                distances.append(torch.linalg.norm(factor @ factor.T - identity))
        weight: float = _config(model).orth_reg_weight
        return torch.stack(distances).mean() * weight

    def after_backward(self, model: "PeftModel", at: Moment) -> None:
        """Rate the rows of rank by the step's gradients, and cut the budget if it is time."""
        # A step that the loop took back has no gradients: as zeros, they scale all ratings alike.
        for parameter in _trained(model).values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        model.base_model.update_and_allocate(at.step + 1)

    def save(self, model: "PeftModel", directory: Path, *, resumable: bool) -> None:
        """Write a plain LoRA of the rows that are left."""
        save_folded(model, directory)
        if resumable:
            allocator = model.base_model.rankallocator
            values = {f"value/{name}": p.detach() for name, p in _trained(model).items()}
            for table in _TABLES:
                values |= {f"{table}/{name}": tensor for name, tensor in getattr(allocator, table).items()}
            save_file({name: value.contiguous() for name, value in values.items()}, directory / VALUES_FILE)
            make_ordinary(directory / VALUES_FILE)
            state = {"schedule": str(self.budget), "rank_pattern": _config(model).rank_pattern}
            (directory / PATTERN_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def restore(self, model: "PeftModel", directory: Path) -> None:
        """Load the three factors, the importance tables and the mask. Raises InvalidArgument unless they fit."""
        pattern, values = self._read_state(directory)
        trained = _trained(model)
        saved = _under("value/", values)
        if {name: value.shape for name, value in saved.items()} != {
            name: p.shape for name, p in trained.items()
        }:
            raise InvalidArgument(
                f"{directory / VALUES_FILE} doesn't fit this run's adapter; go on with the targets and base that it "
                "was made with."
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])
        allocator = model.base_model.rankallocator
        devices = {name: p.device for name, p in model.base_model.model.named_parameters()}
        for table in _TABLES:
            rows = _under(f"{table}/", values)
            setattr(allocator, table, {name: value.to(devices[name]) for name, value in rows.items()})
        _config(model).rank_pattern = pattern

    def _read_state(self, directory: Path) -> tuple[dict[str, list[bool]] | None, dict[str, Tensor]]:
        try:
            state = json.loads((directory / PATTERN_FILE).read_text(encoding="utf-8"))
            schedule, pattern = state["schedule"], state["rank_pattern"]
            values = load_file(directory / VALUES_FILE)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            raise InvalidArgument(
                f"{directory} isn't a whole checkpoint of a run with --rank_schedule {self.budget}; go on from "
                "another, or start anew with --from_adapter."
            ) from None
        if schedule != str(self.budget):
            raise InvalidArgument(
                f"{directory} was trained with --rank_schedule {schedule}, this run has {self.budget}; "
                "go on with the same schedule."
            )
        return pattern, values

    def _refuse(self, lora: "LoraSettings") -> None:
        asked = {
            "--use_dora": lora.use_dora,
            "--use_rslora": lora.use_rslora,
            f"--init_lora_weights {lora.init}": lora.init != "default",
        }
        for flag, given in asked.items():
            if given:
                raise InvalidArgument(
                    f"--rank_schedule {self.budget}: AdaLoRA has a form of its own and doesn't go with {flag}; "
                    "leave one of them out."
                )


def _config(model: "PeftModel") -> "AdaLoraConfig":
    return model.peft_config[model.active_adapter]


def _trained(model: "PeftModel") -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _under(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
