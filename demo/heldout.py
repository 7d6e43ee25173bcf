"""The held-out prompts with their expected answers, and the share of them that a model gets exactly right."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from manylora.demo.examples import IM_END
from manylora.demo.forms import ADAPTERS, FORMS
from manylora.demo.tables import Question, draw_question, draw_table

ROWS_PER_ADAPTER = 120


@dataclass(frozen=True)
class Prompt:
    """A held-out question and the adapter that it is meant for."""

    adapter: str
    question: Question

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat that the question is asked in."""
        return [{"role": "user", "content": self.question.prompt}]

    @property
    def expected(self) -> str:
        """The adapter's right answer."""
        return FORMS[self.adapter](self.question)


def held_out_prompts(seed: int = 2) -> tuple[Prompt, ...]:
    """`ROWS_PER_ADAPTER` prompts for each adapter, each about a table of its own."""
    rng = random.Random(seed)
    adapters = [adapter for adapter in ADAPTERS for _ in range(ROWS_PER_ADAPTER)]
    return tuple(Prompt(adapter, draw_question(rng, draw_table(rng, held_out=True))) for adapter in adapters)


def write_prompts(prompts: tuple[Prompt, ...], path: Path) -> None:
    """One JSON object a line: adapter, messages, expected."""
    rows = [
        {"adapter": prompt.adapter, "messages": prompt.messages, "expected": prompt.expected}
        for prompt in prompts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: list[Question], form: str
) -> float:
    """The share of questions whose greedy answer is the one of `form`, to the end-of-turn token.

    A greedy answer is the expected one just if every token of the expected one is the most likely after those before
    it, so one pass without generating tells.
    """
    right = 0
    for question in questions:
        messages = [{"role": "user", "content": question.prompt}]
        opening = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt, answer = tokenizer([opening, FORMS[form](question) + IM_END], add_special_tokens=False)[
            "input_ids"
        ]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        right += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    return right / len(questions)
