"""Which linear layers get LoRA: all of the blocks, or those that were named, in this family's names."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from manylora.training.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIRST_QWEN_NAMES = {
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "c_proj": ("o_proj", "down_proj"),
    "w1": ("up_proj",),
    "w2": ("gate_proj",),
}
"""The first Qwen's layers, which its finetune.py names by default, and the same layers of later families. Its c_proj is
the name of both the attention's and the MLP's output; w2 is the half of its MLP that goes through SiLU."""


def linear_names(model: "PreTrainedModel") -> tuple[str, ...]:
    """Return the last names of the linear layers inside the blocks, in their order, without embedding and head."""
    head = model.get_output_embeddings()
    names = [
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    return tuple(dict.fromkeys(names))


def choose_targets(
    model: "PreTrainedModel", wanted: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the target modules and sentences on what was translated. Nothing wanted: every linear layer of the blocks.

    Raises InvalidArgument for a name that no module of the base has.
    """
    own = linear_names(model)
    if not wanted:
        return own, ()
    if set(wanted) == set(FIRST_QWEN_NAMES) and not any(_is_module(model, name) for name in wanted):
        return own, (
            f"{' '.join(wanted)}, all linear layers of the first Qwen's blocks, are here {', '.join(own)}",
        )
    targets: list[str] = []
    translated: list[str] = []
    for name in wanted:
        if not _is_module(model, name) and name in FIRST_QWEN_NAMES:
            meant = tuple(each for each in FIRST_QWEN_NAMES[name] if each in own)
            if meant:
                translated.append(f"{name} → {', '.join(meant)}")
                targets += meant
                continue
        if not _is_module(model, name):
            raise InvalidArgument(
                f"--lora_target_modules: this base has no module {name!r}; its linear layers are {', '.join(own)}"
            )
        targets.append(name)
    notes = (
        (f"the first Qwen's module names mean this family's: {'; '.join(translated)}",) if translated else ()
    )
    return tuple(dict.fromkeys(targets)), notes


def token_module_names(model: "PreTrainedModel") -> tuple[str, str]:
    """Return the last names of the embedding and the head."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [next(path for path, each in model.named_modules() if each is module) for module in wanted]
    return paths[0].rpartition(".")[2], paths[1].rpartition(".")[2]


def _is_module(model: "PreTrainedModel", name: str) -> bool:
    """Whether LoRA can be put on a module whose path is ``name`` or ends with it."""
    return any(
        (path == name or path.endswith(f".{name}")) and isinstance(module, (nn.Linear, nn.Embedding))
        for path, module in model.named_modules()
    )
