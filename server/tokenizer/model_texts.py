"""The texts of all models."""

from manylora.server.tokenizer.model_text import ModelText, text_of_base
from manylora.server.tokenizer.tokenizer import Tokenizer


class ModelTexts:
    """Knows with what each model's texts are made."""

    def __init__(self, base: Tokenizer) -> None:
        self.base = text_of_base(base)

    async def of(self) -> ModelText:
        """Return a model's."""
        return self.base
