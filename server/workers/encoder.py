"""A process that tokenises long texts for the server: ``python -m manylora.server.workers.encoder``.

It gets the tokenizer as its library writes it and needs nothing else, so it is there in a moment and small.
"""

import json
from typing import Any

from tokenizers import Tokenizer

from manylora.server.memory import give_back
from manylora.server.workers.answers import failure, written, written_lists
from manylora.server.workers.child import serve

MEMORY_BYTES = 2 << 30
_held: dict[str, Any] = {}
"""The tokenizer by its key: one."""


def answer(question: bytes) -> bytes:
    """Tokenise the texts; or say that the tokenizer is unknown, which must be sent along then."""
    try:
        asked = json.loads(question)
        key = asked["key"]
        if "tokenizer" in asked:
            _held.clear()
            _held[key] = Tokenizer.from_str(asked["tokenizer"])
        if key not in _held:
            return written({"unknown": key})
        return _encoded(_held[key], asked)
    # The library's own panics are no Exceptions.
    except BaseException as error:
        return failure(error, MEMORY_BYTES)
    finally:
        give_back()


def _encoded(tokenizer: Any, asked: dict[str, Any]) -> bytes:
    found = []
    for text in asked["texts"]:
        [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=asked["add_special_tokens"])
        if len(encoding) > asked["at_most"]:
            return written({"count": len(encoding), "at_least": False})
        found.append(encoding.ids)
    return written_lists(found)


if __name__ == "__main__":
    serve(answer, MEMORY_BYTES)
