"""A command line as flags, each with its values. Whatever settles flags works on these, never on places of words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from manylora.training.errors import InvalidArgument

TRUE, FALSE = ("true", "yes", "y", "t", "1"), ("false", "no", "n", "f", "0")


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag as it was given."""

    name: str
    """With underscores and without dashes; empty for the words before the first flag."""
    values: tuple[str, ...] = ()

    def value(self) -> str:
        """Return the one value. Raises InvalidArgument where there is none, or more than one."""
        if len(self.values) != 1:
            given = " ".join(self.values) or "none"
            raise InvalidArgument(f"--{self.name} takes one value, and {given} was given")
        return self.values[0]

    def switch(self) -> bool:
        """Return what a flag that is on without a value says. Raises InvalidArgument."""
        word = self.value().lower() if self.values else TRUE[0]
        if word not in (*TRUE, *FALSE):
            raise InvalidArgument(f"--{self.name} {self.values[0]}: expected true or false, or no value")
        return word in TRUE


def read_flags(argv: Sequence[str]) -> list[Flag]:
    """Return the flags of a command line, in order. ``--a-b=c`` is ``--a_b c``."""
    found: list[Flag] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            found.append(Flag(name.replace("-", "_"), (value,) if equals else ()))
        elif found:
            found[-1] = Flag(found[-1].name, (*found[-1].values, word))
        else:
            found.append(Flag("", (word,)))
    return found


def words_of_flags(flags: Iterable[Flag]) -> list[str]:
    """Return the command line of ``flags``."""
    words: list[str] = []
    for flag in flags:
        if len(flag.values) == 1 and flag.values[0].startswith("-") and flag.name:
            words.append(f"--{flag.name}={flag.values[0]}")
            continue
        words += [f"--{flag.name}", *flag.values] if flag.name else flag.values
    return words


def last_of(flags: Iterable[Flag], name: str) -> Flag | None:
    """Return the flag of that name that counts, which is the last."""
    return next((flag for flag in reversed(list(flags)) if flag.name == name), None)
