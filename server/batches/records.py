"""What files and batches are, as they are kept and told. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
"""What a batch's lines may ask for."""
MOST_LINES = 50_000
"""Lines of a batch, as OpenAI has it."""
DAY = 24 * 3600
"""Seconds in which a batch is to be over."""

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
OVER = frozenset({"failed", "completed", "expired", "cancelled"})


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that a client left, or that a batch made."""

    id: str
    owner: str
    """The tenant whose it is; empty: the operator's."""
    created_at: int
    """Unix time."""
    nbytes: int
    filename: str
    purpose: str
    expires_at: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.nbytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, slots=True)
class BatchError:
    """Why a batch could not begin."""

    code: str
    message: str
    line: int | None = None
    """From 1."""
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """How many lines there are, and how many of them have been answered."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of all answers."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's object."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch, as it is kept."""

    id: str
    owner: str
    key: str
    """By which its lines are answered: a caller's name."""
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    """When its lines stop being answered."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    output_seconds: int | None = None
    """How long the files that it makes are kept; None: until they are deleted."""
    status: Status = "validating"
    times: Mapping[str, int] = field(default_factory=dict)
    """Unix times, by the status that began then."""
    errors: tuple[BatchError, ...] = ()
    counts: Counts = field(default_factory=Counts)
    usage: Usage = field(default_factory=Usage)
    model: str | None = None
    """That all lines ask for, if it is one."""
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in OVER

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's batch object."""
        errors = [
            {"code": each.code, "line": each.line, "message": each.message, "param": each.param}
            for each in self.errors
        ]
        counts = self.counts
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": self.times.get("in_progress"),
            "expires_at": self.expires_at,
            "finalizing_at": self.times.get("finalizing"),
            "completed_at": self.times.get("completed"),
            "failed_at": self.times.get("failed"),
            "expired_at": self.times.get("expired"),
            "cancelling_at": self.times.get("cancelling"),
            "cancelled_at": self.times.get("cancelled"),
            "request_counts": {
                "total": counts.total,
                "completed": counts.completed,
                "failed": counts.failed,
            },
            "usage": self.usage.to_json(),
            "metadata": dict(self.metadata) or None,
        }
