"""What an export is: whose, in which form, and how far it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FILE_SUFFIXES = {"peft": ".tar.gz", "gguf-lora": ".gguf"}
"""Of the forms whose result is one file."""
LONGEST_FILE_NAME = 100
"""Characters of a name, or of a mixture's text, that go into the name of a file."""


@dataclass(frozen=True, slots=True)
class ExportedPart:
    """One adapter of a mixture, in the version that is exported."""

    adapter: str
    version: int
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class ExportSource:
    """What is to be exported."""

    name: str
    """An adapter's, a mixture's, or an unnamed mixture as text."""
    version: int | None
    """None: an unnamed mixture has none."""
    digest: str | None
    """Of an adapter's files; None for a mixture."""
    parts: tuple[ExportedPart, ...] = ()
    """A mixture's, none with weight 0; () for an adapter that is exported as it is."""


@dataclass(frozen=True, slots=True)
class ExportForm:
    """What is to be made of it: fields of ExportSettings."""

    format: str
    base: str = "auto"
    """Which of the base's weights are merged into."""
    dtype: str = "auto"
    combine: str | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class ExportJob:
    """One export, as it is now."""

    id: str
    adapter: str
    """What is exported: an adapter's name, a mixture's, or a mixture as text."""
    version: int | None
    digest: str | None
    format: str
    base: str
    dtype: str
    created: int
    """Unix time, as the next two."""
    status: Status = "queued"
    stage: str = ""
    progress: float = 0.0
    started: int | None = None
    finished: int | None = None
    error: str | None = None
    path: str | None = None
    """Where the result is."""
    bytes: int | None = None
    manifest: dict[str, Any] | None = None
    parts: tuple[ExportedPart, ...] = ()
    combine: str | None = None
    rank: int | None = None

    @property
    def file_name(self) -> str:
        """What the result is called after, as a file's name takes it."""
        return self.adapter.replace("/", "_")[:LONGEST_FILE_NAME]

    @property
    def suffix(self) -> str:
        """What the name of the result ends in, if it is one file; a model's directory has none."""
        return FILE_SUFFIXES.get(self.format, "")

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class ExportedBase:
    """What the server serves, as an export must know it; ``settings`` are further fields of ExportSettings."""

    directory: Path
    settings: dict[str, object]
