"""Many streams at once against a key's limits, each of which is held to the request and to the token."""

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from manylora.loadtest.checks.tenants_house import ADMIN, ANSWER_SECONDS, BASE, new_key

SHARE = 8
"""Of so many streams one is let in."""
SIZES = (8, 96)
"""Tokens that a stream of the ones of many sizes generates for a choice."""
LONGEST = 900
"""Tokens of a stream that is to be there while the others come: most of the context."""
TOKENS = 48
"""That streams of many sizes may use, for each of them: about half of what they ask for."""
UNDER_WAY = ("manylora_requests_running", "manylora_requests_waiting")
TRIES = 5
BODY: dict[str, Any] = {
    "model": BASE,
    "prompt": "hello",
    "max_tokens": 64,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@dataclass(frozen=True, slots=True)
class Streamed:
    """How a stream went: what it used, None if it wasn't let in, and what it might have used."""

    status: int
    used: int | None
    most: int


class Streams:
    """Sends so many streams at a time by one client."""

    def __init__(
        self, url: str, client: httpx.Client, threads: ThreadPoolExecutor, count: int, seed: int
    ) -> None:
        self._url = url
        self._count = count
        self.places = count // SHARE
        """How many of them a key's limit is to let in."""
        self._client = client
        self._threads = threads
        self._dice = random.Random(seed)
        self._prompt = 0
        self.tokens = self._ask(new_key(url, "acme")[1], BODY).used or 0
        """That a stream of one size uses."""
        self._prompt = self.tokens - BODY["max_tokens"]

    def of_one_size(self, what: str, terms: dict[str, int]) -> list[str]:
        """Send equal streams with a key whose limit lets ``places`` of them in; return what was wrong."""
        sent, minutes = self._send(terms, [BODY] * self._count)
        let_in = sum(each.used is not None for each in sent)
        if not self.places <= let_in <= self.places * minutes:
            return [f"{what}: {let_in} of {self._count} streams were let in, not {self.places}"]
        return _refusals(what, sent)

    def of_many_sizes(self, what: str, limit: str, most: int) -> list[str]:
        """Send streams of any length and number of choices against a limit of tokens; return what was wrong.

        None goes over it, and what is left at the end is less than any that was refused asked for.
        """
        bodies = [
            {**BODY, "max_tokens": self._dice.randint(*SIZES), "n": self._dice.choice((1, 1, 2, 3))}
            for _ in range(self._count)
        ]
        sent, minutes = self._send({limit: most}, bodies)
        used = sum(each.used or 0 for each in sent)
        least = min((each.most for each in sent if each.used is None), default=0)
        if used > most * minutes or most - used >= least:
            return [f"{what}: {used} of {most} tokens were used, and a stream of {least} was refused"]
        return _refusals(what, sent)

    def under_way(self, what: str) -> list[str]:
        """Send long streams with a key of ``places`` parallel requests; return what was wrong.

        Each that is let in stays until all have been answered; then the places must be free for others.
        """
        key = new_key(self._url, "acme", parallel=self.places)[1]
        for _ in range(TRIES):
            there: list[int] = []
            room = threading.Barrier(self._count, partial(self._count_into, there))
            let_in = sum(self._threads.map(lambda _, room=room: self._stay(key, room), range(self._count)))
            if not self._finds_room(key):
                return [f"{what}: places weren't free when the streams had left"]
            # Where one ended before the last had come, another may have had its place.
            if there == [let_in]:
                return (
                    [] if let_in == self.places else [f"{what}: {let_in} were under way, not {self.places}"]
                )
        return [f"{what}: streams ended too soon to tell, {TRIES} times"]

    def _count_into(self, found: list[int]) -> None:
        found.append(self._under_way())

    def _stay(self, key: str, room: threading.Barrier) -> bool:
        """Be there until all have been answered; return whether the stream was let in."""
        body = {**BODY, "max_tokens": LONGEST}
        head = {"authorization": f"Bearer {key}"}
        with self._client.stream("POST", "/v1/completions", json=body, headers=head) as answer:
            events = answer.iter_lines()  # kept: without it the answer would be closed
            if answer.status_code == 200:
                next(events)
            room.wait(ANSWER_SECONDS)
            return answer.status_code == 200

    def _under_way(self) -> int:
        """Return how many requests the server has now."""
        head = {"authorization": f"Bearer {ADMIN}"}
        text = httpx.get(f"{self._url}/metrics", headers=head, timeout=ANSWER_SECONDS).text
        lines = [line.split(" ") for line in text.splitlines() if line.startswith(UNDER_WAY)]
        return sum(int(float(line[-1])) for line in lines)

    def _finds_room(self, key: str) -> bool:
        """Return whether ``places`` streams are let in before long, and wait until nothing is under way."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            sent = list(self._threads.map(lambda _: self._ask(key, BODY), range(self.places)))
            if all(each.status == 200 for each in sent) and not self._under_way():
                return True
        return False

    def _send(self, terms: dict[str, int], bodies: list[dict[str, Any]]) -> tuple[list[Streamed], int]:
        """Return how these went with a new key, and how many minutes' limits they had."""
        key, begun = new_key(self._url, "acme", **terms)[1], time.monotonic()
        sent = list(self._threads.map(lambda body: self._ask(key, body), bodies))
        minutes = 1 if "budget" in terms else 1 + int((time.monotonic() - begun) / 60)
        return sent, minutes

    def _ask(self, key: str, body: dict[str, Any]) -> Streamed:
        head = {"authorization": f"Bearer {key}"}
        answer = self._client.post("/v1/completions", json=body, headers=head)
        most = self._prompt + body.get("n", 1) * body["max_tokens"]
        if answer.status_code != 200:
            return Streamed(answer.status_code, None, most)
        events = [line for line in answer.text.splitlines() if '"usage":{' in line.replace(" ", "")]
        used = int(json.loads(events[-1].removeprefix("data: "))["usage"]["total_tokens"])
        return Streamed(200, used, most)


def _refusals(what: str, sent: list[Streamed]) -> list[str]:
    others = {each.status for each in sent} - {200, 429}
    return [f"{what}: streams were answered {sorted(others)}"] if others else []


def stream_at_once(url: str, count: int, seed: int) -> list[str]:
    """Send ``count`` streams at once with keys that allow fewer; return what was wrong."""
    together = httpx.Limits(max_connections=count)
    with (
        httpx.Client(base_url=url, limits=together, timeout=ANSWER_SECONDS) as client,
        ThreadPoolExecutor(count) as threads,
    ):
        streams = Streams(url, client, threads, count, seed)
        tokens, most = streams.places * streams.tokens, count * TOKENS
        return [
            *streams.of_one_size("requests a minute", {"requests_per_minute": streams.places}),
            *streams.of_one_size("tokens a minute", {"tokens_per_minute": tokens}),
            *streams.of_one_size("a budget", {"budget": tokens}),
            *streams.of_many_sizes("tokens a minute, many sizes", "tokens_per_minute", most),
            *streams.of_many_sizes("a budget, many sizes", "budget", most),
            *streams.under_way("requests under way"),
        ]
