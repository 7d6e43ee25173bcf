"""How peft's config selects modules: lists of suffixes, regular expressions, layer numbers, overrides.

The matching rules are those of peft 0.21 (tuners_utils.check_target_module_exists,
utils.other.get_pattern_key); tests/adapters hold them against it. Patterns come from uploaded files, so RE2
matches them: in time linear in the pattern and the path, whatever is in them, and without the interpreter's
lock. adapters/regex.py says which patterns mean the same to RE2 as to the ``re`` that peft uses.
"""

from collections.abc import Iterable, Sequence

from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.regex import MAX_INSTRUCTIONS, MAX_LENGTH, MAX_PATTERNS, Regex

_WILD = frozenset(r"\^$*+?{}[]()|")
"""What makes a pattern more than letters and dots."""
MAX_SHAPES = 1024
"""Of the keys without such characters: how many different lengths and places of dots they may have."""


class Selector:
    """A regular expression for whole paths, or names that paths end with after a dot."""

    def __init__(self, targets: str | Sequence[str], field: str) -> None:
        self._regex = Regex.of(targets, field) if isinstance(targets, str) else None
        self._names = frozenset(() if isinstance(targets, str) else targets)

    @property
    def regexes(self) -> tuple[Regex, ...]:
        """What RE2 has to match."""
        return () if self._regex is None else (self._regex,)

    def matches(self, path: str) -> bool:
        """Return whether the regex matches the whole path, or a name equals it or its end after a dot."""
        if self._regex is not None:
            return self._regex.fullmatch(path)
        return any(end in self._names for end in _ends(path))


class LayerNumbers:
    """Finds the 7 of "layers.7." for the first of some patterns that matches; without patterns any name counts."""

    def __init__(self, patterns: Sequence[str], field: str) -> None:
        for pattern in patterns:
            Regex.of(pattern, field)  # alone, so that brackets which only pair up inside ours are refused
        wrapped = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns]
        self.regexes = tuple(Regex.of(pattern, field) for pattern in wrapped)

    def of(self, path: str) -> int | None:
        """Return the number; None if nothing matches, or the first that does is without one."""
        if not self.regexes:
            inner = path.split(".")[2:-1]
            return next((int(part) for part in inner if part.isascii() and part.isdigit()), None)
        for regex in self.regexes:
            groups = regex.match(path)
            if groups is not None:
                return None if groups[-1] is None else int(groups[-1])
        return None


class KeyPatterns:
    """Regexes that match paths from a dot, or the start, to the end; the first that matches wins.

    peft writes one for each module of a ranked adapter, so those that are letters and dots are looked up: the
    time does not grow with their number.
    """

    def __init__(self, keys: Iterable[str], field: str) -> None:
        self._keys = tuple(keys)
        self._regexes: list[tuple[int, Regex]] = []
        self._shapes: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        """Length → places of dots, which match anything → the key → its number."""
        for number, key in enumerate(self._keys):
            if len(key) > MAX_LENGTH or not _WILD.isdisjoint(key):
                Regex.of(key, field)
                self._regexes.append((number, Regex.of(rf"(?:.*\.)?(?:{key})", field)))
            else:
                dots = tuple(place for place, letter in enumerate(key) if letter == ".")
                self._shapes.setdefault(len(key), {}).setdefault(dots, {}).setdefault(key, number)
        if sum(map(len, self._shapes.values())) > MAX_SHAPES:
            raise InvalidAdapter(
                f"{field}: keys of over {MAX_SHAPES} different shapes; a base has no such modules"
            )

    @property
    def regexes(self) -> tuple[Regex, ...]:
        """What RE2 has to match."""
        return tuple(regex for _, regex in self._regexes)

    def first(self, path: str) -> str | None:
        """Return the first key that matches."""
        numbers = [number for number, regex in self._regexes if regex.fullmatch(path)]
        numbers += [
            keys[blanked]
            for end in _ends(path)
            for dots, keys in self._shapes.get(len(end), {}).items()
            if (blanked := _with_dots(end, dots)) in keys
        ]
        return self._keys[min(numbers)] if numbers else None


def check_work(regexes: Iterable[Regex]) -> None:
    """Raise InvalidAdapter if all these together would be too much to match against every module of a base."""
    found = list(regexes)
    if len(found) > MAX_PATTERNS:
        raise InvalidAdapter(f"{len(found)} regular expressions; at most {MAX_PATTERNS} are taken")
    instructions = sum(regex.instructions for regex in found)
    if instructions > MAX_INSTRUCTIONS:
        raise InvalidAdapter(
            f"the regular expressions come to {instructions} instructions together; at most {MAX_INSTRUCTIONS}"
            " are taken: list the modules instead"
        )


def _ends(path: str) -> Iterable[str]:
    """Yield the path and each of its ends that follow a dot."""
    yield path
    place = path.find(".")
    while place >= 0:
        yield path[place + 1 :]
        place = path.find(".", place + 1)


def _with_dots(text: str, places: tuple[int, ...]) -> str:
    letters = list(text)
    for place in places:
        letters[place] = "."
    return "".join(letters)
