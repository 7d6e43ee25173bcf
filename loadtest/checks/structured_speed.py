"""What structured output costs: `python -m manylora.loadtest.checks.structured_speed [BASE]`. 1 if a bar is missed.

Serves a base, or noise in a named shape, and asks it by turns with a schema for each stream and without: tokens a
second of all streams, and alone the time to the first token with a schema that was seen before, with a new one of a
hundred members, and with none. Answers of both kinds have the same number of tokens, since schemas ask for more texts
than that, and so many that all streams run together nearly all the time.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.checkpoints import SHAPES, write_base
from manylora.loadtest.material.http_client import Target, Timeouts, ask, new_client
from manylora.loadtest.material.server_process import running, start_server
from manylora.loadtest.material.text_table import text_table

SLOWER, SEEN_SECONDS, NEW_SECONDS = 0.05, 0.020, 0.100
"""Bars: of the tokens a second without schemas; of the first token, beside that without one."""
MEMBERS = 100
USAGE = {"include_usage": True}
PROMPT = "Tell me about the town, its people and the years that they had. " * 4


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured, medians of the rounds."""

    plain: float
    """Tokens a second."""
    held: float
    seen: float
    """Seconds of a first token more than without a schema."""
    new: float

    @property
    def met(self) -> dict[str, bool]:
        """Which bars are met."""
        return {
            "tokens a second": self.held >= (1 - SLOWER) * self.plain,
            "first token, seen": self.seen <= SEEN_SECONDS,
            "first token, new": self.new <= NEW_SECONDS,
        }


def schema_of(number: int, members: int = 3, texts: int = 1) -> dict[str, Any]:
    """Return a schema like no other number's, whose first member is a list of at least so many texts."""
    names = [f"member_{number}_{each}" for each in range(members)]
    listed = {"type": "array", "items": {"type": "string"}, "minItems": texts}
    kinds = (listed, {"type": "integer"}, {"type": "boolean"})
    properties = {name: kinds[each % len(kinds)] for each, name in enumerate(names)}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks one model of one server."""

    client: httpx.AsyncClient
    target: Target
    body: Mapping[str, object]
    streams: int
    tokens: int

    async def one(
        self, schema: Mapping[str, Any] | None, number: int = 0, length: int | None = None
    ) -> Answer:
        """Return an answer of ``length`` tokens, held to a schema or not."""
        held = {} if schema is None else {"guided_json": schema}
        more = {"max_tokens": self.tokens if length is None else length, "seed": number, **held}
        answer = await ask(self.client, self.target, {**self.body, **more})
        if answer.error is not None:
            raise RuntimeError(f"the server answered {answer.error}")
        return answer

    async def speed(self, *, held: bool) -> float:
        """Return the tokens a second of all streams at once."""
        schemas = [schema_of(number, texts=self.tokens) if held else None for number in range(self.streams)]
        began = time.perf_counter()
        answers = await asyncio.gather(*map(self.one, schemas, range(self.streams)))
        seconds = time.perf_counter() - began
        made = sum(answer.output_tokens for answer in answers)
        if made != self.streams * self.tokens:
            raise RuntimeError(f"{self.streams * self.tokens} tokens were to be made, {made} were")
        return made / seconds

    async def first(self, schema: Mapping[str, Any] | None) -> float:
        """Return the seconds to an answer of one token: noise's may have no text that a stream could show."""
        return (await self.one(schema, length=1)).seconds


async def measure(url: str, streams: int, tokens: int, rounds: int, tries: int) -> Figures:
    """Ask a server by turns with schemas and without."""
    target = Target.at(url, None, "completions")
    async with new_client(target, streams, Timeouts()) as client:
        model = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
        options = {"ignore_eos": True, "stream": True, "stream_options": USAGE}
        asker = Asker(client, target, target.body(model, PROMPT, options), streams, tokens)
        for held in (False, True):
            await asker.speed(held=held)  # warms up: tables, grammars, prefix
        speeds: dict[bool, list[float]] = {False: [], True: []}
        for number in range(rounds):
            # Whoever comes second has the warmer machine, or the hotter one.
            for held in (False, True) if number % 2 == 0 else (True, False):
                speeds[held].append(await asker.speed(held=held))
        known = schema_of(0, MEMBERS)
        await asker.first(known)
        firsts: dict[str, list[float]] = {"plain": [], "seen": [], "new": []}
        for number in range(tries):
            new = schema_of(1000 + number, MEMBERS)
            for name, schema in (("plain", None), ("seen", known), ("new", new)):
                firsts[name].append(await asker.first(schema))
    told = {held: statistics.median(each) for held, each in speeds.items()}
    plain, seen, later = (statistics.median(firsts[name]) for name in ("plain", "seen", "new"))
    return Figures(told[False], told[True], seen - plain, later - plain)


def report(figures: Figures) -> str:
    """Return the figures as a table."""
    rows = [
        ("tokens a second", f"{figures.plain:.1f} without, {figures.held:.1f} with"),
        ("first token, seen", f"{1e3 * figures.seen:+.1f} ms"),
        ("first token, new", f"{1e3 * figures.new:+.1f} ms"),
    ]
    return text_table(
        ("what", "measured", "bar"),
        [(what, told, "met" if figures.met[what] else "MISSED") for what, told in rows],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", help="a base on disk; noise of --shape if it is left out")
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=sorted(SHAPES))
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tries", type=int, default=15)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = Path(asked.base) if asked.base else root / "noise"
        if not asked.base:
            write_base(base, SHAPES[asked.shape], dtype=torch.bfloat16)
        server = start_server(base, root / "server", ())
        with running(server):
            sizes = (asked.streams, asked.tokens, asked.rounds, asked.tries)
            figures = asyncio.run(measure(server.url, *sizes))
    print(report(figures))  # noqa: T201
    return 0 if all(figures.met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
