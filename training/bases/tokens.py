"""Chat tokens on a base that was never a chat model: asked of its tokenizer, never of its name.

A tokenizer without a chat template gets ChatML. A control token of the template (<|im_start|>, …) that the tokenizer
would cut into pieces is added as one token, and its new embedding is trained with the adapter: embedding
and head whole on a 16-bit base, as Qwen's script does; the new rows alone on a 4-bit one, where both as a whole would
outweigh the base.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manylora.training.bases.settings import LoraSettings
from manylora.training.bases.targets import token_module_names
from manylora.training.bases.types import Base

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
END = "<|im_end|>"
_CONTROL = re.compile(r"<\|[^|<>\s]+\|>")
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True, slots=True)
class ChatSetup:
    """What was done so that the base can be trained on conversations."""

    new_tokens: tuple[str, ...] = ()
    """For LoraSettings.new_tokens."""
    notes: tuple[str, ...] = ()


def prepare_chat(base: Base) -> ChatSetup:
    """Make the base's tokenizer able to write conversations, and its embedding as large as that needs.

    Call it before ``attach``, when there are conversations to train on. It changes nothing on a chat model.
    """
    tokenizer: Any = base.tokenizer
    notes: list[str] = []
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML
        notes.append("the tokenizer has no chat template (this is no chat model): ChatML is used and saved")
    new = _missing_tokens(tokenizer)
    if new:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(new)}, replace_extra_special_tokens=False
        )
        grow_embedding(base.model, len(tokenizer))
        notes.append(
            f"tokens that are new to the base, so that their embeddings are trained too: {', '.join(new)}"
        )
    if tokenizer.chat_template == CHATML and tokenizer.eos_token != END:
        tokenizer.eos_token = END
        base.model.config.eos_token_id = base.model.generation_config.eos_token_id = tokenizer.eos_token_id
    return ChatSetup(new, tuple(notes))


def trained_tokens(base: Base, lora: LoraSettings) -> dict[str, object]:
    """Return the fields of LoraConfig that train whole modules or new tokens' rows."""
    whole = list(lora.modules_to_save)
    fields: dict[str, object] = {}
    tied = bool(base.model.config.tie_word_embeddings)
    embedding, head = token_module_names(base.model)
    if lora.new_tokens:
        if base.kind == "dense":
            whole += [name for name in (embedding, head) if name not in whole]
        else:
            rows = base.tokenizer.convert_tokens_to_ids(list(lora.new_tokens))
            fields["trainable_token_indices"] = {embedding: rows} if tied else {embedding: rows, head: rows}
    if whole:
        fields["modules_to_save"] = whole
    # Else a tied head and its embedding would be trained apart, and be two matrices where the model has one.
    if tied and {embedding, head} & {*whole, *lora.targets}:
        fields["ensure_weight_tying"] = True
    return fields


def train_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold modules that are trained whole in float32, where small steps don't get lost, inside a ``dtype`` model."""
    from peft.utils import ModulesToSaveWrapper

    if dtype == torch.float32:
        return
    for wrapper in [each for each in model.modules() if isinstance(each, ModulesToSaveWrapper)]:
        for module in wrapper.modules_to_save.values():
            module.float()
            module.register_forward_pre_hook(_to_float32)
            module.register_forward_hook(lambda _, __, output: output.to(dtype))


def _to_float32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.float() if each.is_floating_point() else each for each in inputs)


def _missing_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the control tokens that the template writes and the tokenizer cuts into pieces."""
    written = tokenizer.apply_chat_template(list(_PROBE), tokenize=False, add_generation_prompt=True)
    controls = dict.fromkeys(_CONTROL.findall(written))
    return tuple(token for token in controls if len(tokenizer.encode(token, add_special_tokens=False)) != 1)


@torch.no_grad()
def grow_embedding(model: Any, size: int) -> None:
    """Make room for ``size`` tokens. Many embeddings have rows to spare, and stay as they are.

    New rows are the mean of the old ones, so that every process, and whoever loads the adapter, has the same.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if size <= old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = module.get_parameter("weight")
        weight[old:] = weight[:old].float().mean(0).to(weight.dtype)
    model.requires_grad_(False)
