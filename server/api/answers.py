"""Answers as /openapi.json describes them. Nothing is built with these; a test holds answers against them."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, RootModel

from manylora.server.api.answer import Answer
from manylora.server.api.auto_answers import AUTO_MEANING, AdapterWords, AutoChoice


class ErrorDetail(Answer):
    """OpenAI's error object."""

    message: str = Field(description="What was wrong, what was expected, and what to do.")
    type: str
    param: str | None = Field(description="The field, with its path.")
    code: str | None


class ErrorAnswer(Answer):
    """Every error of every route."""

    error: ErrorDetail
    request_id: str


class Alive(Answer):
    """The process answers."""

    status: Literal["alive"]


class Ready(Answer):
    """Requests can be served."""

    status: Literal["ready"]


class NotReady(Answer):
    """Requests can't be served now."""

    status: Literal["not ready"]
    reason: str


class NamedPart(Answer):
    """An adapter of a mixture as it was asked for."""

    adapter: str
    weight: float


class ServedPart(Answer):
    """An adapter of a mixture: which one its name means, and which version."""

    name: str
    id: int
    version: int
    weight: float


class Model(Answer):
    """The base, or an adapter or a mixture, whose parent is the base."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    mixture: list[NamedPart] = Field(default_factory=list, description="Of a mixture: its parts.")


class Models(Answer):
    """What can be asked."""

    object: Literal["list"]
    data: list[Model]


class PromptTokensDetails(Answer):
    """Of the prompt's tokens."""

    cached_tokens: int


class CompletionTokensDetails(Answer):
    """Of the answers' tokens."""

    reasoning_tokens: int


class Usage(Answer):
    """Tokens of a request."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = Field(
        default_factory=lambda: CompletionTokensDetails(reasoning_tokens=0),
        description="Where the model may think.",
    )


class Completionlike(Answer):
    """What all answers and chunks share."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    id: str
    created: int
    model: str
    system_fingerprint: str | None
    adapters: list[ServedPart] = Field(
        default_factory=list, description="A mixture's parts, in an answer and in a stream's first chunk."
    )
    auto: AutoChoice | None = Field(None, description=AUTO_MEANING)


Finish = Literal["stop", "length"]


class CompletionLogprobs(Answer):
    """Log probabilities in four lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One of n texts for each prompt; in a chunk, what a step added to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None


class CompletionChunk(Completionlike):
    """One event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Completion(CompletionChunk):
    """Continued texts."""

    usage: Usage


class Tokens(Answer):
    """A text's tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Answer):
    """The text of tokens."""

    prompt: str


class AdapterRecord(Answer):
    """An adapter as it was registered."""

    object: Literal["adapter"]
    id: int
    name: str
    version: int
    digest: str
    src: str
    rank: int
    target_modules: list[str]
    preload: bool
    pin: bool
    created: int


class Registration(Answer):
    """How far an adapter is on its way in, or why it failed."""

    object: Literal["adapter.registration"]
    name: str
    src: str
    state: Literal["waiting", "downloading", "copying", "checking", "loading", "ready", "failed", "cancelled"]
    progress: float | None = Field(
        description="0 to 1, of the files' bytes; null: nobody says how many there are."
    )
    bytes: int
    total_bytes: int | None
    reason: str | None
    code: str | None = Field(description="The error's, if it failed.")
    share: float | None = Field(description="What a canary is to get of the requests; null: it is none.")
    created: int


class Canary(Answer):
    """A version that gets a share of the requests for its name."""

    version: int
    share: float


class Adapter(AdapterRecord):
    """An adapter, and where its weights are."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    registration: Registration | None = Field(
        None, description="Of its next version: under way, or failed not long ago. Versions have none."
    )
    auto: AdapterWords | None = Field(None, description="Of one that is asked for alone.")
    state: Literal["available", "unavailable"]
    tier: Literal["device", "host", "disk"] | None
    reason: str | None
    bytes: int
    alora_invocation_tokens: list[int] | None = Field(
        description="Of an activated adapter: the ids from whose last occurrence in a prompt on it acts."
    )
    requests: int
    last_used: int | None
    note: str | None
    canary: Canary | None
    versions: list[int] = Field(description="Those that may be asked for, the newest first.")


class AdapterVersion(Adapter):
    """One version of an adapter."""

    role: Literal["active", "canary", "kept"]
    share: float | None = Field(description="A canary's.")
    before: int | None = Field(description="The version that it took over from.")


class Versions(Answer):
    """An adapter's versions, the newest first."""

    object: Literal["list"]
    name: str
    active: int
    canary: Canary | None
    data: list[AdapterVersion]


class PartNow(Answer):
    """A part of a mixture: which adapter its name means at the moment, if any."""

    name: str
    id: int | None
    version: int | None
    weight: float


class MixtureRecord(Answer):
    """A mixture as it was registered."""

    object: Literal["mixture"]
    id: int
    name: str
    version: int
    mixture: list[NamedPart]
    created: int


class Mixture(MixtureRecord):
    """A mixture, and what its parts are now."""

    adapters: list[PartNow]
    state: Literal["available", "unavailable"]
    reason: str | None
    requests: int
    last_used: int | None


class RegisteredModel(RootModel[AdapterRecord | Mixture]):
    """An adapter or a mixture that was registered."""


class ManagedModel(RootModel[Adapter | Mixture | Registration]):
    """An adapter, a mixture, or what is to be one."""


class Adapters(Answer):
    """All adapters and mixtures."""

    object: Literal["list"]
    data: list[Adapter | Mixture | Registration]


class Freed(Answer):
    """What a deletion gave back."""

    arena_rows: int
    device_bytes: int
    host_bytes: int
    aborted_sequences: int


class DeletedAdapter(AdapterRecord):
    """An adapter that is gone."""

    deleted: Literal[True]
    freed: Freed


class DeletedMixture(MixtureRecord):
    """A mixture that is gone."""

    deleted: Literal[True]


class DeletedRegistration(Registration):
    """A registration that was cancelled, or is told of no more."""

    deleted: Literal[True]


class DeletedModel(RootModel[DeletedAdapter | DeletedMixture | DeletedRegistration]):
    """An adapter, a mixture or a registration that is gone."""


class ExportedPart(Answer):
    """A part of a mixture in the version that is exported."""

    adapter: str
    version: int
    digest: str
    weight: float


class Export(Answer):
    """An export, as it is now."""

    object: Literal["export"]
    id: str
    adapter: str
    version: int | None
    digest: str | None
    format: str
    base: str
    dtype: str
    created: int
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    stage: str
    progress: float
    started: int | None
    finished: int | None
    error: str | None
    path: str | None
    bytes: int | None
    manifest: dict[str, Any] | None
    parts: list[ExportedPart]
    combine: Literal["cat", "svd"] | None
    rank: int | None


class Exports(Answer):
    """All exports."""

    object: Literal["list"]
    data: list[Export]
