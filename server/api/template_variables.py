"""chat_template_kwargs: what a client may say to a chat template beside the messages, as enable_thinking for Qwen3."""

import json
from typing import Annotated, Any

from pydantic import BeforeValidator

from manylora.server.api.inert import refused

MAX_CHARACTERS = 64 << 10
"""As JSON."""
_FIELDS_OF_THEIR_OWN = ("messages", "tools", "add_generation_prompt", "continue_final_message")
_NOT_FOR_CLIENTS = ("chat_template", "conversations", "return_assistant_tokens_mask", "self", "tokenize")


def _checked(value: Any) -> Any:
    if not isinstance(value, dict):
        return value  # its type is told by pydantic
    for name in value:
        _check_name(name)
    try:
        size = len(json.dumps(value))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if size > MAX_CHARACTERS:
        raise ValueError(f"it has {size} characters as JSON, at most {MAX_CHARACTERS} are read")
    return value


def _check_name(name: str) -> None:
    if name in _FIELDS_OF_THEIR_OWN:
        raise refused(name, "is a field of its own: chat_template_kwargs can't override it")
    if name in _NOT_FOR_CLIENTS or name.endswith(("_token", "_tokens")):
        raise refused(name, "is the server's: chat_template_kwargs can't override it")
    if not name.isidentifier():
        raise refused(name, "is not a name that a template can read")


TemplateVariables = Annotated[dict[str, Any], BeforeValidator(_checked)]
"""Any JSON object of limited size, but for names that are the server's."""
