"""What a worker answers: a line of JSON, and behind it the bytes that wouldn't go well into JSON."""

import json
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

ERROR_CHARACTERS = 300


def written(head: Mapping[str, object], rest: bytes = b"") -> bytes:
    """Return an answer, or a question, as bytes; ``read`` takes it apart."""
    return json.dumps(head, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n" + rest


def read(answer: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the line and the bytes behind it."""
    line, _, rest = answer.partition(b"\n")
    head: dict[str, Any] = json.loads(line)
    return head, rest


def failure(error: BaseException, memory_bytes: int) -> bytes:
    """Return the answer that says why there is none; ``memory_bytes`` is what the worker may take."""
    if isinstance(error, MemoryError):
        return written({"error": f"it took more than {memory_bytes >> 20} MiB of memory"})
    return written({"error": (str(error) or type(error).__name__)[:ERROR_CHARACTERS]})


def written_lists(lists: Sequence[Sequence[int]]) -> bytes:
    """Return an answer that is lists of numbers from 0 to 2³² - 1; ``read_lists`` takes it apart."""
    numbers = array("I")
    for each in lists:
        numbers.extend(each)
    return written({"lengths": [len(each) for each in lists]}, numbers.tobytes())


def read_lists(head: Mapping[str, Any], rest: bytes) -> list[list[int]]:
    """Return the lists of an answer."""
    numbers = array("I", rest).tolist()
    start = 0
    found = []
    for length in head["lengths"]:
        found.append(numbers[start : start + length])
        start += length
    return found
