"""Answers about files and batches, as /openapi.json describes them. Nothing is built with these; see answers.py."""

from typing import Literal

from manylora.server.api.answer import Answer
from manylora.server.batches.records import Status


class File(Answer):
    """A file that is kept."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    status_details: None


class Page(Answer):
    """A part of a list."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Files(Page):
    """Some of one's files."""

    data: list[File]


class DeletedFile(Answer):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchFault(Answer):
    """Why a batch could not begin."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchFaults(Answer):
    """All of them, or the first hundred."""

    object: Literal["list"]
    data: list[BatchFault]


class RequestCounts(Answer):
    """Lines of a batch, and how many are answered."""

    total: int
    completed: int
    failed: int


class Batch(Answer):
    """How far a batch is."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchFaults | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchPage(Page):
    """Some of one's batches."""

    data: list[Batch]
