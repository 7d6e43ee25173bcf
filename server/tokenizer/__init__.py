"""Text to ids, messages to ids, ids to text and bytes: the base's tokenizer and those that adapters bring."""

from manylora.server.tokenizer.tokenizer import Tokenizer, TooManyTokens

__all__ = ["Tokenizer", "TooManyTokens"]
