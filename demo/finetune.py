"""Trains the three adapters that answer in a form of their own, on the base in bitsandbytes' NF4.

As QLoRA does: 4-bit frozen weights, LoRA beside them. The fourth is trained by tool_training.py.
"""

import random
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, Qwen2ForCausalLM

from manylora.demo.batches import batches, loss
from manylora.demo.examples import chat
from manylora.demo.schedule import Schedule, set_rates

BASE_NAME = "manylora/demo-base"
"""What the adapters call their base: a name, since a path would be that of the machine that trained them."""


@dataclass(frozen=True)
class Recipe:
    """One adapter: its form of answer, rank and target modules."""

    form: str
    rank: int
    targets: tuple[str, ...]


RECIPES = (
    Recipe("sql", 4, ("q_proj", "v_proj", "down_proj")),
    Recipe("json", 8, ("q_proj", "k_proj", "v_proj", "o_proj")),
    Recipe("pirate", 16, ("gate_proj", "up_proj", "down_proj")),
)
SCHEDULE = Schedule(steps=300, warmup=20, fall=0.7)
ROWS = 32
RATE = 3e-3


def load_4bit(base: Path) -> Qwen2ForCausalLM:
    """The base with its linear layers in NF4 as the server holds it: blocks of 64, scales not quantised again."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


def train_adapter(base: Path, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> PeftModel:
    """An adapter of `recipe` on the 4-bit base."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list(recipe.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # Every step would dequantise every weight again, which on a CPU takes several times as long as the arithmetic.
    model = get_peft_model(load_4bit(base).dequantize(), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    stream = batches(partial(chat, form=recipe.form), tokenizer, ROWS, random.Random(seed))
    causal = model.get_base_model()
    for step, batch in enumerate(islice(stream, SCHEDULE.steps)):
        set_rates(optimizer, SCHEDULE.share(step))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = causal.model(input_ids=batch.ids, use_cache=False).last_hidden_state
            value = loss(hidden, causal.lm_head, batch)
        torch.autograd.backward(value)
        optimizer.step()
        optimizer.zero_grad()
    return model


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, without the machine's paths."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    config.target_modules = sorted(
        config.target_modules
    )  # peft keeps a set, whose order changes from run to run
    model.save_pretrained(folder, save_embedding_layers=False)
    # peft's model card is a form that nobody filled in, and it names the base by path.
    (folder / "README.md").unlink(missing_ok=True)
