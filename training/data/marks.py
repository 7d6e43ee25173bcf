"""Marks on a message that say whether it is trained: the names that other trainers read."""

from collections.abc import Mapping
from typing import Any

from manylora.training.data.example import Source
from manylora.training.errors import InvalidData

MARKS: Mapping[str, bool] = {
    "weight": True,  # OpenAI, Mistral, OpenChat
    "loss": True,  # ms-swift, XTuner
    "loss_scale": True,  # ms-swift
    "train": True,  # axolotl
    "training": True,  # axolotl
    "masked": False,  # torchtune
}
"""By name, the value with which a message is trained."""
PARTS = ("train_detail", "training_detail")
"""axolotl's marks of parts of a message."""


def take_mark(message: dict[str, Any], where: str, source: Source) -> tuple[str, bool] | None:
    """Take the marks out of a message; return the first one's name, and whether it asks for training.

    Raises InvalidData for a mark that is neither yes nor no, for marks that contradict each other, and for marks of
    parts of a message.
    """
    for name in PARTS:
        if message.pop(name, None):
            raise InvalidData(f"{source}: {where} has {name}; a message is trained as a whole or not at all")
    found: dict[str, bool] = {}
    for name, trained_by in MARKS.items():
        value = message.pop(name, None)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise InvalidData(
                f"{source}: {where} has the {name} {value!r}; it is 0 or 1, or true or false, as a message is trained"
                " or not"
            )
        found[name] = bool(value) is trained_by
    if len(set(found.values())) > 1:
        raise InvalidData(f"{source}: {where} has marks that contradict each other: {', '.join(found)}")
    return next(iter(found.items()), None)
