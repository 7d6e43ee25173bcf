"""The process that holds the tokenizer of an adapter: ``python -m manylora.server.tokenizer.worker``.

A tokenizer.json is a program too: its patterns may look for ever, and what it asks to be built may take all memory.
"""

import json
from functools import lru_cache

from manylora.adapters.tokenizer import import_libraries
from manylora.server.memory import give_back
from manylora.server.tokenizer.lane import LONG
from manylora.server.tokenizer.tokenizer import Tokenizer, TooManyTokens
from manylora.server.workers.answers import failure, written, written_lists
from manylora.server.workers.child import serve

MEMORY_BYTES = 2 << 30
"""What a tokenizer may take; one of 256,000 tokens takes about 300 MB."""


@lru_cache(maxsize=1)
def _tokenizer(key: str, directory: str) -> Tokenizer:
    return Tokenizer(directory)


def answer(question: bytes) -> bytes:
    """Do what is asked: a line of JSON, and what doesn't go well into JSON behind it."""
    try:
        asked = json.loads(question)
        tokenizer = _tokenizer(asked["key"], asked["directory"])
        if "texts" in asked:
            try:
                return _encoded(tokenizer, asked["texts"], asked["add_special_tokens"], asked["at_most"])
            finally:
                if len(question) > LONG:
                    give_back()
        if "ids" in asked:
            return written({"text": tokenizer.spell(asked["ids"])})
        known: dict[str, object] = {
            "fingerprint": tokenizer.fingerprint,
            "special_tokens": tokenizer.special_tokens,
            "eos_id": tokenizer.eos_id,
        }
        return written(known, tokenizer.vocabulary.to_bytes())
    except TooManyTokens as error:
        return written({"count": error.count, "at_least": error.at_least})
    # A file from outside may make the libraries raise anything, and tokenizers' own panics are no Exceptions.
    except BaseException as error:
        return failure(error, MEMORY_BYTES)


def _encoded(tokenizer: Tokenizer, texts: list[str], add_special_tokens: bool, at_most: int) -> bytes:
    return written_lists(
        [tokenizer.encode(text, add_special_tokens=add_special_tokens, at_most=at_most) for text in texts]
    )


if __name__ == "__main__":
    import_libraries()  # before memory is limited
    serve(answer, MEMORY_BYTES)
