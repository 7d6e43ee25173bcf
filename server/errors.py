"""The server's errors, each with the HTTP status and the OpenAI error type and code that a client gets.

    ServerError                      500  an unexpected fault of ours
    ├── InvalidRequest               400  a field is unknown, malformed, out of range or can't be honoured
    │   ├── ContextLengthExceeded    400  prompt + max_tokens over the context
    │   ├── MixtureRefused           400  a mixture's parts or weights make no sense, or don't go together
    │   └── GrammarFailed            400  the grammar that an answer is held to can't be followed to its end
    ├── Unauthorized                 401  key missing or wrong
    ├── Forbidden                    403  admin route from beyond loopback without an admin key, or without the right
    │   └── NamespaceFull            403  a tenant's adapters would take more than is theirs
    ├── ModelNotFound                404  no base, adapter or mixture has that name
    ├── ObjectNotFound               404  no file or batch has that id
    ├── RegistrationCancelled        409  another caller deleted the name while it was being registered
    ├── BodyTooLarge                 413  the request body is over the limit
    ├── QueueFull                    429  too many waiting requests; Retry-After
    ├── RateLimited                  429  over a limit of the key; Retry-After, unless waiting is of no use
    ├── QuotaExhausted               429  the key's budget doesn't hold it; not to be tried again
    ├── StepFailed                   500  the step that this request was in failed; the server goes on
    │   └── NotFinite                500  what the model computes for this request overflows
    ├── AdapterUnavailable           503  no room for the adapter within the waiting time; Retry-After
    └── ShuttingDown                 503  the server drains; Retry-After

adapters/ and quant/ have trees of their own; server/api maps them to the same envelope.
"""

from dataclasses import dataclass


class ServerError(Exception):
    """An error that a client may be told about. ``message`` says what was wrong, what was expected, what to do."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"
    should_retry: bool | None = None
    """Told to clients that would try again by the status alone; None: nothing is told."""

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        """Seconds after which the client may try again."""


class InvalidRequest(ServerError):
    """A field is unknown, malformed, out of range or can't be honoured."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None


@dataclass(frozen=True)
class Overrun:
    """How a request is longer than the context; all in tokens."""

    prompt: int
    """At least: a text may be too long by its length alone."""
    asked: int | None
    """max_tokens; 0: none are made, None: as many as there is room for."""
    context: int

    @property
    def is_the_prompts(self) -> bool:
        """Whether the prompt alone leaves no room."""
        return self.prompt >= self.context


class ContextLengthExceeded(InvalidRequest):
    """The prompt and max_tokens together are longer than the context.

    Clients that shorten a conversation tell this error by phrases of its message; `Overrun` has what other APIs' need.
    """

    code = "context_length_exceeded"

    def __init__(self, message: str, overrun: Overrun | None = None, *, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.overrun = overrun


class MixtureRefused(InvalidRequest):
    """The mixture that a request asks for makes no sense, or its parts don't go together."""

    code = "invalid_mixture"


class GrammarFailed(InvalidRequest):
    """The grammar that an answer is held to can't be followed to its end. It concerns that request alone."""

    code = "grammar_failed"


class Unauthorized(ServerError):
    """The key is missing or wrong."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ServerError):
    """The route is closed to this caller."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class NamespaceFull(Forbidden):
    """A tenant's adapters would take more bytes or rank rows than are theirs."""

    code = "namespace_full"


class ModelNotFound(ServerError):
    """No base, adapter or mixture has that name. The message lists the names that exist."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class ObjectNotFound(ServerError):
    """No file or batch has that id, or it is somebody else's."""

    status = 404
    type = "invalid_request_error"
    code = None


class RegistrationCancelled(ServerError):
    """Another caller deleted the name while an adapter was being registered under it."""

    status = 409
    type = "invalid_request_error"
    code = "registration_cancelled"


class BodyTooLarge(ServerError):
    """The request body is over the limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class QueueFull(ServerError):
    """Too many requests are waiting."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class RateLimited(ServerError):
    """A key is over one of its limits. ``kind`` is what it limits: requests or tokens."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        kind: str = "requests",
        retry_after: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.type = kind
        self.should_retry = should_retry


class QuotaExhausted(ServerError):
    """A key's budget doesn't hold what a request may take."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"
    should_retry = False


class StepFailed(ServerError):
    """The step that this request was part of failed: a fault or out of memory. The server goes on."""

    code = "step_failed"


class NotFinite(StepFailed):
    """What the model computes for this request is not finite. It concerns that request alone."""


class AdapterUnavailable(ServerError):
    """The adapter found no room on the device within the waiting time."""

    status = 503
    type = "server_error"
    code = "adapter_unavailable"


class ShuttingDown(ServerError):
    """The server is draining and takes no new requests."""

    status = 503
    type = "server_error"
    code = "shutting_down"
