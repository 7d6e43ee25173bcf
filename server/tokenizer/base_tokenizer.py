"""The base's tokenizer as the API uses it: in this process, but for long texts."""

from collections.abc import Sequence
from pathlib import Path

from manylora.server.tokenizer.lane import LONG, Lane
from manylora.server.tokenizer.tokenizer import Tokenizer
from manylora.server.tokenizer.tokenizer_process import TokenizerFailed, TokenizerProcess, encoding_of, tokens
from manylora.server.workers.pool import WorkersBusy
from manylora.server.workers.process import WorkerDied


class BaseTokenizer:
    """A codec (see model_text.py). Any thread may call.

    A text of a hundred thousand tokens is hundreds of thousands of small objects, which the library frees while it
    holds the interpreter. So long texts have a process of their own, which is started by the first.
    """

    def __init__(self, tokenizer: Tokenizer, directory: Path) -> None:
        """``directory`` is where ``tokenizer`` was read from."""
        self._tokenizer = tokenizer
        self.process = TokenizerProcess("the base's", "base", directory)

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
            asked = encoding_of(texts, add_special_tokens=add_special_tokens, at_most=at_most)
            try:
                return tokens(self.process.ask(asked).result())
            except (TokenizerFailed, WorkerDied, WorkersBusy) as error:
                raise self.process.told(error) from error

        characters = sum(map(len, texts))
        return await lane.run(here if characters <= LONG else elsewhere, characters)

    async def spell(self, lane: Lane, ids: Sequence[int]) -> str:
        """Turn ids into text, control tokens spelled out."""
        return await lane.run(lambda: self._tokenizer.spell(ids), len(ids))

    def close(self) -> None:
        """End the process, if there is one."""
        self.process.close()
