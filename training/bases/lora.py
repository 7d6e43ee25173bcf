"""LoRA on a base: what was asked for, held against what the base can take, and peft's model of it."""

from typing import TYPE_CHECKING

from manylora.training.bases.groups import ParameterGroup, lora_parameter_groups
from manylora.training.bases.initial import start_from_base, start_from_error
from manylora.training.bases.quantized import forbid_merging
from manylora.training.bases.quiet import quiet_peft
from manylora.training.bases.servable import Servable, servable
from manylora.training.bases.settings import LoraSettings
from manylora.training.bases.targets import choose_targets, token_module_names
from manylora.training.bases.tokens import train_in_float32, trained_tokens
from manylora.training.bases.types import Base
from manylora.training.errors import InvalidArgument

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["LoraSettings", "ParameterGroup", "Servable", "attach", "lora_parameter_groups", "servable"]


def attach(base: Base, lora: LoraSettings) -> "PeftModel":
    """Put LoRA on the base, which changes it in place, and return peft's model.

    The factors are float32 whatever the base's type. Raises InvalidArgument for what this base can't take.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    _refuse(base, lora)
    targets, _ = choose_targets(base.model, lora.targets)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.alpha,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        lora_dropout=lora.used_dropout,
        target_modules=list(targets),
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=_peft_init(lora),
        revision=base.revision,
        alora_invocation_tokens=list(lora.invocation) or None,
        **trained_tokens(base, lora),
    )
    with quiet_peft():
        model = get_peft_model(base.model, config)
    config.base_model_name_or_path = base.name
    forbid_merging(model)
    train_in_float32(model, base.dtype)
    if lora.starts_from_base:
        start_from_base(model, lora.init)
    elif lora.init == "loftq":
        start_from_error(model, base)
    if base.kind == "nf4":
        # peft does it for all others. Checkpointing that re-enters needs an input with a gradient in each block.
        base.model.enable_input_require_grads()
    return model


def attach_notes(base: Base, lora: LoraSettings) -> tuple[str, ...]:
    """Return sentences for the user on what was decided about the adapter. Raises InvalidArgument as attach does."""
    _refuse(base, lora)
    targets, notes = choose_targets(base.model, lora.targets)
    if lora.used_dropout != lora.dropout:
        notes += (
            f"--init_lora_weights {lora.init} puts part of the base into the factors: they get no dropout",
        )
    return (f"LoRA on {', '.join(targets)}", *notes)


def _peft_init(lora: LoraSettings) -> bool | str:
    return lora.init if lora.init in ("gaussian", "orthogonal") else True


def _refuse(base: Base, lora: LoraSettings) -> None:
    paths = [path for path, _ in base.model.named_modules()]
    for name in lora.modules_to_save:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise InvalidArgument(f"--modules_to_save: this base has no module {name!r}")
    at_tokens = set(token_module_names(base.model)) & {name.rpartition(".")[2] for name in lora.targets}
    if at_tokens and (lora.starts_from_base or lora.init == "loftq"):
        raise InvalidArgument(
            f"--init_lora_weights {lora.init} is for linear layers of the blocks, not for {', '.join(at_tokens)}"
        )
    if lora.init == "orthogonal" and base.kind != "dense":
        raise InvalidArgument(
            f"--init_lora_weights orthogonal needs a 16-bit base; on {base.kind} take default or gaussian"
        )
    if lora.init == "loftq" and not base.from_16bit:
        why = {
            "dense": "this base isn't quantised: add --q_lora",
            "nf4": "the files of this base hold NF4 only: give the 16-bit model it was made from, with --q_lora",
        }.get(
            base.kind,
            f"the files of this base hold {base.kind.upper()} only, and their 16-bit weights are elsewhere",
        )
        raise InvalidArgument(
            f"--init_lora_weights loftq makes up for quantisation from the 16-bit weights, but {why}"
        )
