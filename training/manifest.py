"""What a trained adapter says of itself for the server's ``model: "auto"``: a description, and examples of its prompts.

Examples are prompts of the data, word for word, in a file that goes wherever the adapter goes. So none are written
unless they are asked for.
"""

from collections.abc import Callable, Sequence

from manylora.adapters.manifest import MAX_EXAMPLE, AdapterManifest
from manylora.training.arguments import Arguments
from manylora.training.data.dataset import TrainingData
from manylora.training.data.example import Example

POOL = 4
"""Examples that are looked at for each that is written."""
_GRAM = 3


def manifest_of(arguments: Arguments, data: TrainingData, say: Callable[[str], None]) -> AdapterManifest:
    """Return what the adapter is to say of itself, as the run's flags ask; ``say`` is told where there is nothing."""
    run = arguments.run
    examples: tuple[str, ...] = ()
    if run.route_examples:
        prompts = (prompt_of(example) for example in data.sample(POOL * run.route_examples))
        found = {prompt[:MAX_EXAMPLE]: None for prompt in prompts if prompt.strip()}
        examples = diverse(list(found), run.route_examples)
        if not examples:
            say("--route_examples: no example has a user's turn, so none are written")
    return AdapterManifest(run.description, examples)


def prompt_of(example: Example) -> str:
    """Return the last user's turn of a conversation; "" where there is none, as in plain text."""
    turns = [message for message in example.messages if message.get("role") == "user"]
    return str(turns[-1].get("content") or "") if turns else ""


def diverse(texts: Sequence[str], count: int) -> tuple[str, ...]:
    """Return ``count`` of the texts, or all: the first, and then always the one least like those that were taken.

    Likeness is the share of runs of three characters that two texts have in common (Jaccard). Ties go by order.
    """
    grams = [_grams(text) for text in texts]
    taken: list[int] = []
    likeness = [0.0] * len(texts)
    left = list(range(len(texts)))
    while left and len(taken) < count:
        chosen = min(left, key=likeness.__getitem__)
        left.remove(chosen)
        taken.append(chosen)
        for each in left:
            likeness[each] = max(likeness[each], _likeness(grams[each], grams[chosen]))
    return tuple(texts[each] for each in taken)


def _grams(text: str) -> frozenset[str]:
    return frozenset(text[start : start + _GRAM] for start in range(max(1, len(text) - _GRAM + 1)))


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
