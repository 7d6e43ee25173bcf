"""The token rows that an export is checked on: built-in prompts, and rows of the user's own with their answers.

Not a data loader: a few rows of the usual shapes are read, and anything else is refused by its line.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.tokenizer import TokenizerRefused, load_tokenizer

PROMPTS = (
    "The capital of France is",
    "Write a short sentence about the sea.",
    "def add(a, b):\n    return",
    "SELECT name FROM users WHERE",
    "1, 2, 3, 4,",
    "Translate to German: good morning",
)
MOST_ROWS = 16
MOST_TOKENS = 256
_PROMPT_TOKENS = 24
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of tokens. ``answer`` is where the part begins whose loss is measured; len(tokens): nowhere."""

    tokens: tuple[int, ...]
    answer: int


def built_in_rows(directory: Path, vocab_size: int) -> tuple[Row, ...]:
    """Return the built-in prompts by the model's tokenizer, through its chat template if it has one.

    Without a tokenizer, rows of token ids at random.
    """
    tokenizer = _tokenizer(directory)
    prompts = () if tokenizer is None else tuple(_prompt(tokenizer, prompt, vocab_size) for prompt in PROMPTS)
    if not any(prompts):
        generator = torch.Generator().manual_seed(0)
        prompts = tuple(torch.randint(0, vocab_size, (len(PROMPTS), 16), generator=generator).tolist())
    return tuple(Row(tuple(row), len(row)) for row in prompts if row)


def _prompt(
    tokenizer: Any, prompt: str, vocab_size: int
) -> list[int]:  # a transformers tokenizer has no types
    if tokenizer.chat_template:
        ids = _render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = tokenizer(prompt)["input_ids"]
    return [int(token) for token in ids[-_PROMPT_TOKENS:] if token < vocab_size]


def sample_rows(path: Path, directory: Path, vocab_size: int) -> tuple[Row, ...]:
    """Return the first MOST_ROWS rows of a JSON, JSONL or text file, at most MOST_TOKENS each.

    Rows hold ``text``, ``prompt`` and ``completion``, ``messages`` or ``conversations``; a text file has one per line.
    Raises ExportRefused naming the line.
    """
    tokenizer = _tokenizer(directory)
    if tokenizer is None:
        raise ExportRefused(f"{path}: the base has no tokenizer to read sample rows with")
    rows = []
    for line, value in _values(path)[:MOST_ROWS]:
        try:
            row = _row(tokenizer, value)
        except (KeyError, TypeError, ValueError, IndexError):
            raise ExportRefused(
                f"{path}:{line}: expected text, prompt and completion, messages, or conversations"
            ) from None
        tokens = tuple(token for token in row.tokens[:MOST_TOKENS] if token < vocab_size)
        if row.answer < len(tokens) and len(tokens) > 1:
            rows.append(Row(tokens, max(1, row.answer)))
    if not rows:
        raise ExportRefused(f"{path} holds no sample row whose answer begins within {MOST_TOKENS} tokens")
    return tuple(rows)


def _values(path: Path) -> Sequence[tuple[int, object]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportRefused(f"{path} can't be read: {getattr(error, 'strerror', error)}") from None
    if path.suffix == ".txt":
        return [(n, {"text": line}) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), 1))
        except ValueError as error:
            raise ExportRefused(f"{path} is not JSON: {error}") from None
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            values.append((number, json.loads(line)))
        except ValueError as error:
            raise ExportRefused(f"{path}:{number} is not JSON: {error}") from None
    return values


def _row(tokenizer: Any, value: object) -> Row:
    if not isinstance(value, Mapping):
        raise TypeError("a row is an object")
    if "text" in value:
        return Row(tuple(tokenizer(str(value["text"]))["input_ids"]), 1)
    if "prompt" in value and "completion" in value:
        prompt = tokenizer(str(value["prompt"]))["input_ids"]
        answer = tokenizer(str(value["completion"]), add_special_tokens=False)["input_ids"]
        return Row((*prompt, *answer), len(prompt))
    messages = value.get("messages")
    if messages is None:
        messages = [
            {"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in value["conversations"]
        ]
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ValueError("the last message is the answer")
    prompt = _render(tokenizer, messages[:-1], add_generation_prompt=True)
    both = _render(tokenizer, messages, add_generation_prompt=False)
    start = len(prompt) if both[: len(prompt)] == prompt else 1
    return Row(tuple(both), start)


def _render(tokenizer: Any, messages: object, *, add_generation_prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _tokenizer(directory: Path) -> Any:
    try:
        return load_tokenizer(directory)
    except TokenizerRefused:
        return None
