"""From which token of a row an activated adapter (aLoRA, arXiv 2504.12397) acts.

peft takes the last place of the invocation in all of a row. The server takes the last one in the *prompt*, so training
does too, whatever an answer says; and it takes no loss where the adapter has no part.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from manylora.training.data.render import IGNORED
from manylora.training.errors import InvalidArgument

NOWHERE = -1
_LOOKED_AT = 1000
"""Rows that are looked through before a run for one with the invocation."""


def place_of(invocation: Sequence[int], ids: Sequence[int], labels: Sequence[int]) -> int:
    """Return from which token of a row the adapter acts: the last place in front of the last answer, or NOWHERE."""
    end = len(labels)
    while end and labels[end - 1] == IGNORED:
        end -= 1
    while end and labels[end - 1] != IGNORED:
        end -= 1
    wanted, count = list(invocation), len(invocation)
    prompt = list(ids[:end])
    for start in range(end - count, -1, -1):
        if prompt[start] == wanted[0] and prompt[start : start + count] == wanted:
            return start
    return NOWHERE


def check_rows(invocation: Sequence[int], rows: Iterable[Mapping[str, Sequence[int]]]) -> None:
    """Raise InvalidArgument if none of the first rows has the invocation in its prompt: nothing would be learnt."""
    first = list(islice(rows, _LOOKED_AT))
    if first and all(place_of(invocation, row["input_ids"], row["labels"]) == NOWHERE for row in first):
        raise InvalidArgument(
            f"none of the first {len(first)} rows has the invocation {list(invocation)} in front of its last answer, so"
            " the adapter would have no part in them: write its text into the prompts, where the tokenizer makes the"
            " same tokens of it, as it does of control tokens"
        )
