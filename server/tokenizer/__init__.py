"""Text to ids, messages to ids, ids to text and bytes: the base's tokenizer and those that adapters bring."""

from manylora.server.tokenizer.tokenizer import (
    MAX_RENDERED_CHARACTERS,
    MAX_TEMPLATE_CHARACTERS,
    Tokenizer,
    TooManyTokens,
)

__all__ = ["MAX_RENDERED_CHARACTERS", "MAX_TEMPLATE_CHARACTERS", "Tokenizer", "TooManyTokens"]
