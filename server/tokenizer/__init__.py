"""Text to ids, messages to ids, ids to text and bytes: the base's tokenizer and those that adapters bring."""

from manylora.server.tokenizer.model_text import ModelText
from manylora.server.tokenizer.model_texts import ModelTexts
from manylora.server.tokenizer.tokenizer import Tokenizer, TooManyTokens
from manylora.server.tokenizer.vocabulary import Vocabulary

__all__ = ["ModelText", "ModelTexts", "Tokenizer", "TooManyTokens", "Vocabulary"]
