"""Trains the small base model from nothing: look-up drills first, then documents and chats in plain sentences."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import fmean

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from manylora.demo.batches import Batch, Draw, batches, loss
from manylora.demo.examples import Example, chat, document, echo, facts, pairs
from manylora.demo.initial import new_model
from manylora.demo.schedule import Schedule, set_rates

Report = Callable[[str], None]

ROWS = 32
MUON_RATE = 0.01
ADAMW_RATE = 0.003
REPORT_EVERY = 100


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: so many steps on so large shares of so many kinds of example."""

    steps: int
    shares: dict[Draw, float]

    def draw(self, rng: random.Random) -> Example:
        """An example of one of the kinds."""
        (kind,) = rng.choices(tuple(self.shares), tuple(self.shares.values()))
        return kind(rng)


plain_chat: Draw = partial(chat, form="plain")
plain_facts: Draw = partial(facts, forms=("plain",))
all_facts: Draw = partial(
    facts, forms=("plain", "json", "pirate")
)  # a query repeats the question, it looks nothing up

CURRICULUM = (
    Stage(130, {echo: 1.0}),
    Stage(40, {echo: 0.2, pairs: 0.8}),
    Stage(350, {echo: 0.05, pairs: 0.05, plain_facts: 0.9}),
    Stage(1000, {all_facts: 0.4, document: 0.3, plain_chat: 0.3}),
)


def pretrain(tokenizer: PreTrainedTokenizerFast, seed: int, report: Report) -> Qwen2ForCausalLM:
    """The trained base model, float32; `report` gets a line every hundred steps."""
    model = new_model(tokenizer, seed)
    optimizers = _optimizers(model)
    schedule = Schedule(sum(stage.steps for stage in CURRICULUM), warmup=30, fall=0.5)
    rng = random.Random(seed)
    losses: list[float] = []
    for stage in CURRICULUM:
        for batch in islice(batches(stage.draw, tokenizer, ROWS, rng), stage.steps):
            for optimizer in optimizers:
                set_rates(optimizer, schedule.share(len(losses)))
            losses.append(_step(model, optimizers, batch))
            if len(losses) % REPORT_EVERY == 0:
                report(
                    f"base: step {len(losses)} of {schedule.steps}, loss {fmean(losses[-REPORT_EVERY:]):.3f}"
                )
    return model


def _optimizers(model: Qwen2ForCausalLM) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices between the layers' vectors, AdamW for the rest."""
    embeddings = {id(model.get_input_embeddings().weight)}
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        (matrices if parameter.ndim == 2 and id(parameter) not in embeddings else others).append(parameter)
    return (
        torch.optim.Muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )


def _step(model: Qwen2ForCausalLM, optimizers: tuple[torch.optim.Optimizer, ...], batch: Batch) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        value = loss(hidden, model.lm_head, batch)
    torch.autograd.backward(value)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(value.detach())
