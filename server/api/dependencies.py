"""What the HTTP API stands on: the engine, the catalog and the tokenizer behind it, and its own settings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastapi import Request

from manylora.server.api.audit import AuditLog
from manylora.server.api.metrics import Metrics
from manylora.server.api.pacing import Rests
from manylora.server.api.tokenising import Tokenising
from manylora.server.batches.runner import Batches
from manylora.server.catalog import AdapterCatalog, Routing
from manylora.server.catalog.on_demand import OnDemand
from manylora.server.engine.grammar import Grammars
from manylora.server.engine.pace import Tempo
from manylora.server.engine.request import GenerationRequest, Pooling, SequenceOutput
from manylora.server.exports.jobs import ExportJobs
from manylora.server.tenants.ring import KeyRing
from manylora.server.tokenizer import ModelTexts, Tokenizer


class OutputStream(Protocol):
    """The outputs of a client's request, of all its prompts and their choices."""

    @property
    def made(self) -> int:
        """How many tokens have been made, read or not."""
        ...

    async def take(self) -> Sequence[tuple[int, SequenceOutput]] | None:
        """Return what has come, with the numbers of the choices; nothing: all have ended. None: somebody nudged."""
        ...

    def nudge(self) -> None:
        """Let ``take`` return although there may be nothing."""
        ...

    def abort(self) -> None:
        """End the request and free what it holds within one step; harmless when it has ended."""
        ...


class GenerationEngine(Protocol):
    """The part of AsyncEngine that the API needs."""

    @property
    def ready(self) -> bool:
        """Whether requests can be served."""
        ...

    @property
    def unready_reason(self) -> str:
        """Why not, if not."""
        ...

    @property
    def tempo(self) -> Tempo | None:
        """How fast steps follow each other; None: clients wait for none."""
        ...

    def prefetch(self, adapter_ids: Iterable[int]) -> None:
        """Begin to read those of these adapters that are on disk only: a request that will use them is on its way."""
        ...

    def submit_together(self, requests: Sequence[GenerationRequest]) -> OutputStream:
        """Queue a client's prompts, all or none. Raises QueueFull, ShuttingDown or InvalidRequest at once."""
        ...


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Settings of the HTTP API; server/config.py says what each is for."""

    base_model: str
    context_length: int
    vocab_size: int
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    hosts: tuple[str, ...] = ()
    """Names, in lower case, under which adapters are managed without a key, besides this machine's own to itself."""
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 12 << 20
    max_choices: int = 128
    max_sequences: int = 1024
    max_prompt_logprobs: int = 500_000
    max_tokenize_characters: int = 1 << 18
    keep_alive_seconds: float = 15.0
    tool_parser: str | None = None
    """The format in which models write calls of tools; None: their chat templates tell."""
    base_source: str = ""
    """The base as the operator named it: a directory or a hub name; empty: the demo."""
    pooling: Pooling = Pooling.LAST
    matryoshka: bool = False
    hidden_size: int = 0
    """Numbers of a state, and so of an embedding."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Weights of adapters, mixtures and the base among each other, by name; else 1."""
    share_prefixes: bool = False
    """Whether tenants share the prefix cache."""
    created: int = 0
    """Unix time at which the base was loaded."""


@dataclass(frozen=True, slots=True)
class ApiDependencies:
    """Everything a route may use; reached through ``dependencies(request)``."""

    engine: GenerationEngine
    catalog: AdapterCatalog
    tokenizer: Tokenizer
    texts: ModelTexts
    metrics: Metrics
    settings: ApiSettings
    rests: Rests
    """For what takes long to write."""
    keys: KeyRing
    """The registry's keys."""
    batches: Batches
    """And the files that they read and make."""
    exports: ExportJobs | None = None
    """None: this server makes none."""
    audit: AuditLog | None = None
    """None: acts of administration aren't written down."""
    on_demand: OnDemand | None = None
    """Looks for models that aren't registered; None: nobody does."""
    tokenising: Tokenising = field(default_factory=Tokenising)
    grammars: Grammars | None = None
    """None: answers are held to none here."""
    routing: Routing | None = None
    """None: no request leaves the choice of its model to this server."""


def dependencies(request: Request) -> ApiDependencies:
    """Return what the app was made with."""
    found: ApiDependencies = request.app.state.dependencies
    return found
