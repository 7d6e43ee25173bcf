"""A dictionary of which a caller sees a part: to whom a name may not be known, it is not there.

The catalog looks names up, lists them and names them in errors; given such a dictionary it does all of that as if the
rest didn't exist, and what it changes is changed for everybody.
"""

from collections.abc import Callable, Iterator, MutableMapping
from typing import TypeVar

Value = TypeVar("Value")
Sees = Callable[[str, int | None], bool]
"""Says whether a name may be used, in a version or in any."""


class Seen(MutableMapping[str, Value]):
    """What of ``whole`` is seen. Writes go through."""

    def __init__(self, whole: MutableMapping[str, Value], sees: Callable[[str, Value], bool]) -> None:
        self.whole = whole
        self._sees = sees

    def __getitem__(self, name: str) -> Value:
        found = self.whole[name]
        if not self._sees(name, found):
            raise KeyError(name)
        return found

    def __setitem__(self, name: str, value: Value) -> None:
        self.whole[name] = value

    def __delitem__(self, name: str) -> None:
        del self.whole[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, value in self.whole.items() if self._sees(name, value))

    def __len__(self) -> int:
        return sum(1 for _ in self)
