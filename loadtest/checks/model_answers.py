"""What a model answers, asked through `manylora serve` and of transformers alone, and how many answers are right."""

import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from manylora.loadtest.material.quiet import advice_off
from manylora.loadtest.material.server_process import running, start_server

SERVE, COMMAND = "Serve it", "manylora serve "
"""The line may say of which step the adapter is before the command comes."""
AT_ONCE = 16
START_SECONDS = 1800.0
"""A machine that does other things too may take long to load a model."""


def serve_words(said: str) -> list[str] | None:
    """Return the words after ``manylora serve`` in the last line that says how; None if none does."""
    lines = [line.partition(COMMAND)[2] for line in said.splitlines() if SERVE in line and COMMAND in line]
    return shlex.split(lines[-1]) if lines else None


def on_other_form(words: Sequence[str]) -> list[str]:
    """Return how to serve so that the base is held otherwise: in NF4 if it is in 16 bits now, else in 16 bits."""
    dense = ["--quantization", "none"]
    for first in range(len(words)):
        if list(words[first : first + 2]) == dense:
            return [*words[:first], *words[first + 2 :]]
    return [*(word for word in words if word != "--double-quant"), *dense]


def ask(
    words: Sequence[str], model: str | None, questions: Sequence[str], new_tokens: int, place: Path
) -> list[str]:
    """Serve as the words say and return the answers; ``model`` None asks for the base."""
    server = start_server(None, place, words)
    with (
        running(server, start_seconds=START_SECONDS),
        httpx.Client(base_url=server.url, timeout=START_SECONDS) as client,
    ):
        name = model or client.get("/v1/models").json()["data"][0]["id"]

        def answer(question: str) -> str:
            body = {"model": name, "messages": [{"role": "user", "content": question}], "temperature": 0}
            found = client.post("/v1/chat/completions", json={**body, "max_tokens": new_tokens})
            found.raise_for_status()
            return str(found.json()["choices"][0]["message"]["content"])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(answer, questions))


def by_transformers(directory: Path, questions: Sequence[str], new_tokens: int) -> list[str]:
    """Return a merged model's answers without anything of this project but its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from manylora.adapters.tokenizer import load_tokenizer

    with advice_off():
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer: Any = load_tokenizer(directory)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    answers: list[str] = []
    for first in range(0, len(texts), AT_ONCE):
        batch = tokenizer(
            texts[first : first + AT_ONCE], add_special_tokens=False, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            made = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=new_tokens,
            )
        new = made[:, batch["input_ids"].shape[1] :]
        answers += map(str, tokenizer.batch_decode(new, skip_special_tokens=True))
    return answers


def longest(directory: Path, texts: Sequence[str]) -> int:
    """Return the most tokens that a text has in a model's tokenizer."""
    from manylora.adapters.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(directory)
    return max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)


def right(answers: Sequence[str], expected: Sequence[str]) -> int:
    """Return how many answers are what was expected."""
    return sum(one.strip() == two.strip() for one, two in zip(answers, expected, strict=True))
