"""What one request gave: what was said, when each piece came, or how it failed. Errors are results, not exceptions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

Json = Mapping[str, object]
HUNG_UP = "hung up"
"""The error of an answer that this side left."""


@dataclass(slots=True)
class Answer:
    """What one request gave. Times are time.perf_counter() seconds."""

    started: float = 0.0
    """When it was sent."""
    ended: float = 0.0
    pieces: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each piece of text came."""
    tokens: list[str] = field(default_factory=list)
    """As text, where log probabilities were asked for."""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    status: int = 200
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """As the server's usage says; None if it says nothing."""
    error: str | None = None
    """Its kind: "connect", "timeout (read)", "http 429 (queue_full)", "cut off", "in-stream (…)", "bad event",
    "hung up"."""
    error_message: str = ""
    due: float | None = None
    """When an open loop should have sent it; None: nobody said. Waiting is counted from here, however late it was sent
    (a client or a server that falls behind must not hide it)."""

    @property
    def asked(self) -> float:
        """From when waiting counts."""
        return self.started if self.due is None else self.due

    @property
    def seconds(self) -> float:
        """From asking to the end."""
        return self.ended - self.asked

    @property
    def seconds_per_token(self) -> float | None:
        """Of each token after the first, from the first piece of text to the last; None for fewer than two tokens."""
        if len(self.times) < 2 or self.output_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)

    @property
    def text(self) -> str:
        """All that was said."""
        return "".join(self.pieces)

    @property
    def complete(self) -> bool:
        """Whether it ended as it should."""
        return self.error is None and self.finish_reason is not None

    def same_as(self, other: "Answer") -> bool:
        """Whether both are complete and equal, token for token and bit for bit in their log probabilities."""
        mine, its = ((one.text, one.tokens, one.logprobs) for one in (self, other))
        return self.complete and other.complete and mine == its

    def add(self, choice: Mapping[str, Any], now: float) -> None:
        """Take in a choice of a completion, whole or a piece of one, that came at ``now``."""
        text = choice.get("text") or (choice.get("delta") or {}).get("content")
        if text:
            self.pieces.append(text)
            self.times.append(now)
        logprobs = choice.get("logprobs") or {}
        self.tokens += logprobs.get("tokens") or []
        self.logprobs += logprobs.get("token_logprobs") or []
        self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def refused(self, response: httpx.Response) -> None:
        """Take in an answer whose status isn't 200; its body must have been read."""
        try:
            body = response.json()
        except ValueError:
            body = {}
        code = error_code(body if isinstance(body, dict) else {})
        self.status = response.status_code
        self.error = f"http {response.status_code}" + (f" ({code})" if code else "")
        self.error_message = response.text[:500]

    @property
    def output_tokens(self) -> int:
        """Tokens by usage, else pieces of text."""
        return len(self.times) if self.completion_tokens is None else self.completion_tokens

    @property
    def first_token_seconds(self) -> float | None:
        """From asking to the first piece of text."""
        return self.times[0] - self.asked if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def error_code(body: Json) -> str:
    """Return what an error envelope calls its error."""
    error = body.get("error")
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or "")
    return ""
