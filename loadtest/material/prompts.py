"""Prompts of about a given number of tokens, made of words, whatever the server's tokenizer is.

Two samples are counted and a line is laid through them; then prompt k of n tokens is so many words of a random stream
seeded with k. Who counts: a tokenizer's directory, the server's /tokenize (vLLM's and our form, or llama.cpp's), or the
usage that the server reports for a request of one token.
"""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from manylora.adapters.tokenizer import load_tokenizer
from manylora.loadtest.material.http_client import Target, ask

_TEXT = """
able about above across after again age air all along also always animal answer area back base bear bed been
begin best better between big bird black blue boat body book both box boy bring build call came car care
carry cause change city clear close cold come cook cool could country course cover cross cut dark day deep
dog door down draw dry each early earth east easy eat end even ever every example eye face fact fall family
far farm fast father feel feet few field fill find fine fire first fish five fly follow food foot form found
four free friend from front full game gave girl give glass gold gone good great green ground group grow half
hand hard have head hear heart heat help here high hold home horse hot hour house idea inch island just keep
kind king knew know land large last late learn leave left letter life light line list little live long look
love low machine made main make map mark may measure mile mind money moon more morning most mother mountain
move much music name near need never new next night north note notice number ocean often old once only open
order over page paper part pass pattern people picture piece place plain plan plane plant play point pose
power press problem produce pull put question quick rain reach read ready real red rest river road rock room
round rule
"""
WORDS = tuple(_TEXT.split())
SAMPLES = 16, 128
"""Words of the two texts that are counted."""
TOKENS_PER_WORD = 1.3
"""Assumed where nobody can count."""

Count = Callable[[str], Awaitable[int | None]]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Makes prompts; ``counted_by`` says whose tokens they were measured in."""

    seed: int
    counted_by: str
    each: float
    """Tokens of a word."""
    around: float = 0.0
    """Tokens of a prompt without any."""

    def of(self, number: int, tokens: int) -> str:
        """Return prompt ``number``, of about so many tokens."""
        return words_of(max(1, round((tokens - self.around) / self.each)), f"{self.seed}/{number}")


def words_of(count: int, seed: str) -> str:
    """Return ``count`` words of a stream of their own."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


async def calibrate(
    client: httpx.AsyncClient, target: Target, model: str, seed: int, tokenizer: Path | None
) -> Prompts:
    """Count, and return what makes prompts of about as many tokens as are asked for."""
    counters: list[tuple[str, Count]]
    if tokenizer is not None:
        counters = [(f"the tokenizer in {tokenizer}", _local(tokenizer))]
    else:
        counters = [
            ("the server's /tokenize", _tokenize(client, target, model, "count")),
            ("the server's /tokenize", _tokenize(client, target, model, "tokens")),
            ("usage.prompt_tokens of a probe", _usage(client, target, model)),
        ]
    few, many = SAMPLES
    for name, count in counters:
        low = await count(words_of(few, f"{seed}/low"))
        high = None if low is None else await count(words_of(many, f"{seed}/high"))
        if low is not None and high is not None and high > low:
            each = (high - low) / (many - few)
            return Prompts(seed, name, each, low - each * few)
    return Prompts(seed, f"nobody: {TOKENS_PER_WORD} a word assumed", TOKENS_PER_WORD)


def _local(directory: Path) -> Count:
    tokenizer = load_tokenizer(directory)

    async def count(text: str) -> int | None:
        return len(tokenizer.encode(text))

    return count


def _tokenize(client: httpx.AsyncClient, target: Target, model: str, key: str) -> Count:
    async def count(text: str) -> int | None:
        chat = target.endpoint == "chat"
        asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        body = {"model": model, **asked} if key == "count" else {"content": text}
        try:
            response = await client.post(f"{target.root}/tokenize", json=body)
            found = response.json().get(key) if response.status_code == httpx.codes.OK else None
        except (httpx.HTTPError, ValueError, AttributeError):
            return None
        return len(found) if isinstance(found, list) else found if isinstance(found, int) else None

    return count


def _usage(client: httpx.AsyncClient, target: Target, model: str) -> Count:
    async def count(text: str) -> int | None:
        options = {"max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}}
        return (await ask(client, target, target.body(model, text, options))).prompt_tokens

    return count
