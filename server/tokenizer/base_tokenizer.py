"""The base's tokenizer as the API uses it: in this process, but for long texts."""

from collections.abc import Mapping, Sequence

from manylora.server.tokenizer.lane import LONG, Lane
from manylora.server.tokenizer.tokenizer import Tokenizer
from manylora.server.tokenizer.tokenizer_process import FAILURES, TokenizerProcess, of_texts, said, tokens

MODULE = "manylora.server.workers.encoder"


class BaseTokenizer:
    """A codec (see model_text.py). Any thread may call.

    A text of a hundred thousand tokens is hundreds of thousands of small objects, which the library frees while it
    holds the interpreter. So long texts have a process of their own, which is started by the first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.process = TokenizerProcess("the base's", MODULE)

    async def encode(
        self, lane: Lane, texts: Sequence[str], *, add_special_tokens: bool, at_most: int
    ) -> list[list[int]]:
        """Tokenise texts. Raises TooManyTokens for the first over ``at_most``, InvalidRequest and QueueFull."""

        def here() -> list[list[int]]:
            return [
                self._tokenizer.encode(text, add_special_tokens=add_special_tokens, at_most=at_most)
                for text in texts
            ]

        def elsewhere() -> list[list[int]]:
            for text in texts:
                self._tokenizer.check_length(text, at_most)
            asked = of_texts(texts, add_special_tokens=add_special_tokens, at_most=at_most)
            try:
                return tokens(self._ask(asked))
            except FAILURES as error:
                raise self.process.told(error) from error

        characters = sum(map(len, texts))
        return await lane.run(here if characters <= LONG else elsewhere, characters)

    async def spell(self, lane: Lane, ids: Sequence[int]) -> str:
        """Turn ids into text, control tokens spelled out."""
        return await lane.run(lambda: self._tokenizer.spell(ids), len(ids))

    def _ask(self, asked: Mapping[str, object]) -> bytes:
        """Return the answer (blocking); a process that is new is sent the tokenizer."""
        asked = {"key": self._tokenizer.fingerprint, **asked}
        answer = self.process.ask(asked).result()
        if "unknown" not in said(answer)[0]:
            return answer
        return self.process.ask({**asked, "tokenizer": self._tokenizer.written()}).result()

    def close(self) -> None:
        """End the process, if there is one."""
        self.process.close()
