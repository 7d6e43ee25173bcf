"""Errors as Anthropic's clients read them: ours, with a type of theirs and one more field around it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from manylora.server.errors import ContextLengthExceeded

PATH = "/v1/messages"
_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_OVERLOADED = frozenset({"shutting_down", "adapter_unavailable", "registry_busy"})
"""Codes, where there is no status because the answer has begun."""


def is_anthropics(path: str) -> bool:
    """Say whether a path is asked by Anthropic's clients."""
    return path == PATH or path.startswith(f"{PATH}/")


def in_anthropics_shape(envelope: Mapping[str, object], status: int | None = None) -> dict[str, object]:
    """Return our error object as theirs; ``status`` None: the answer has begun."""
    error: Any = envelope["error"]
    if status is not None:
        kind = _BY_STATUS.get(status, "api_error")
    elif error["type"] == "invalid_request_error":
        kind = "invalid_request_error"
    else:
        kind = "overloaded_error" if error["code"] in _OVERLOADED else "api_error"
    return {"type": "error", **envelope, "error": {**error, "type": kind}}


@contextmanager
def in_anthropics_words() -> Iterator[None]:
    """Tell of a request over the context as Anthropic does: Claude Code reads the numbers, and asks for less."""
    try:
        yield
    except ContextLengthExceeded as error:
        over = error.overrun
        if over is None:
            raise
        if over.is_the_prompts:
            # A number, and a greater one, is what is looked for: one that fills the context leaves no room for a token.
            least = max(over.prompt, over.context + 1)
            message = f"prompt is too long: {least} tokens > {over.context} maximum"
        else:
            message = (
                f"input length and `max_tokens` exceed context limit: {over.prompt} + {over.asked} > {over.context}, "
                "decrease input length or `max_tokens` and try again"
            )
        raise ContextLengthExceeded(message, over, param=error.param) from None
