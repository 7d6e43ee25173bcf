"""One regular expression of an adapter's config, matched by RE2 as Python's ``re`` would match it.

RE2 (https://github.com/google/re2/wiki/Syntax) is linear, and leaves out what can't be: lookarounds,
backreferences, possessive and atomic groups. A few things it reads differently from ``re``. So a pattern is
read token by token here; what the two agree on passes, ``{,n}`` is rewritten, and the rest is refused by its
name. On the paths of modules, which are ASCII without line breaks, they then agree on every match.
"""

import re
from typing import TYPE_CHECKING, NamedTuple

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter

if TYPE_CHECKING:
    import re2

MAX_LENGTH = 2000
"""Characters of one pattern. What tools write for models with vision has 300 to 900."""
MAX_PATTERNS = 256
"""Regular expressions of one config."""
MAX_INSTRUCTIONS = 8192
"""Of one pattern's program and of all of a config's together: a usual pattern has 50 to 300. A match takes at most
so many steps for each letter of the path."""
_PROGRAM_BYTES = 1 << 20

_TOKEN = re.compile(
    r"""(?P<escape> \\(?: x[0-9a-fA-F]{2} | . | $ ) )
      | (?P<set> \[ \^? \]? (?: \\. | [^\]\\] )* (?: \] | $ ) )
      | (?P<group> \( (?: \?  (?: P?<[=!]? | P= | [=!>\#(] | [a-zA-Z-]* [:)]? )? )? )
      | (?P<possessive> (?: [*+?] | \{ [0-9]* ,? [0-9]* \} ) \+ )
      | (?P<repeat> \{ [0-9]* ,? [0-9]* \} )
      | (?P<other> . )""",
    re.VERBOSE | re.DOTALL,
)
_SAME_ESCAPES = frozenset("AbBdDsSwWnrtfv")
_OPENINGS = re.compile(r"\( (?: \? (?: : | P< | (?: [ims]+ (?:-[ims]+)? | -[ims]+ ) : ) )?", re.VERBOSE)
_FLAGS_FOR_ALL = re.compile(r"\(\?[ims]+\)")
_NAMES = {
    "(?=": "a lookahead",
    "(?!": "a negative lookahead",
    "(?<=": "a lookbehind",
    "(?<!": "a negative lookbehind",
    "(?P=": "a backreference",
    "(?(": "a condition",
    "(?#": "a comment",
    "(?>": "an atomic group",
}


class _Part(NamedTuple):
    text: str
    kind: str


class Regex:
    """A compiled pattern. ``of`` makes it, or says why not."""

    def __init__(self, compiled: "re2._Regexp") -> None:
        self._compiled = compiled
        self.instructions: int = compiled.programsize
        """Length of its program: the most steps that a letter of a path can cost."""

    @classmethod
    def of(cls, pattern: str, field: str) -> "Regex":
        """Compile ``pattern``, which stands in ``field`` of the config.

        Raises UnsupportedAdapter for what RE2 can't match as ``re`` does, InvalidAdapter for what is no regular
        expression or is too large.
        """
        if len(pattern) > MAX_LENGTH:
            raise InvalidAdapter(f"{field}: a pattern of {len(pattern)} characters; at most {MAX_LENGTH}")
        shown = pattern if len(pattern) < 200 else f"{pattern[:200]}…"
        import re2  # here: most adapters have no regular expressions, and `make gpu-check` runs without re2

        translated = "".join(_translate(part, pattern, f"{field}: {shown!r}") for part in _parts(pattern))
        options = re2.Options()
        options.log_errors = False
        options.max_mem = _PROGRAM_BYTES
        try:
            regex = cls(re2.compile(translated, options))
        except re2.error as error:
            why = error.args[0].decode(errors="replace") if error.args else "it can't be compiled"
            raise InvalidAdapter(f"{field}: {shown!r} is not a regular expression: {why}") from None
        except UnicodeEncodeError:
            raise InvalidAdapter(f"{field}: {shown!r} holds half a surrogate pair") from None
        if regex.instructions > MAX_INSTRUCTIONS:
            raise InvalidAdapter(
                f"{field}: {shown!r} comes to {regex.instructions} instructions; at most {MAX_INSTRUCTIONS} are"
                " taken: list the modules instead"
            )
        return regex

    def fullmatch(self, path: str) -> bool:
        """Return whether all of ``path`` matches."""
        return self._compiled.fullmatch(path) is not None

    def match(self, path: str) -> tuple[str | None, ...] | None:
        """Return the groups of a match at the start of ``path``; None if there is no match."""
        found = self._compiled.match(path)
        return None if found is None else found.groups()


def _parts(pattern: str) -> list[_Part]:
    return [_Part(found[0], found.lastgroup or "other") for found in _TOKEN.finditer(pattern)]


def _translate(part: _Part, pattern: str, where: str) -> str:
    """Return what RE2 reads as ``re`` reads ``part``, or refuse it by its name."""
    what = None
    if part.kind == "escape":
        what = _unlike(part.text)
    elif part.kind == "set":
        what = _unlike_in_set(part.text)
    elif part.kind == "group":
        what = _unlike_group(part.text, at_start=pattern.startswith(part.text))
    elif part.kind == "possessive":
        what = f"the possessive {part.text}"
    elif part.text.startswith("{,"):
        return part.text.replace("{,", "{0,")
    if what is not None:
        raise UnsupportedAdapter(f"{where} has {what}, which is not served; list the modules instead")
    return part.text


def _unlike(escape: str) -> str | None:
    letter = escape[1:2]
    if letter in _SAME_ESCAPES or len(escape) == 4 or not letter.isalnum():
        return None
    return f"a backreference {escape}" if letter in "123456789" else f"the escape {escape}"


def _unlike_in_set(text: str) -> str | None:
    if "[:" in text[1:]:
        return "'[:' in a set"
    for escape in re.findall(r"\\.", text, re.DOTALL):
        if escape[1].isalnum() and escape[1] not in "dDsSwWnrtfvx":
            return f"the escape {escape} in a set"
    return None


def _unlike_group(text: str, *, at_start: bool) -> str | None:
    if _OPENINGS.fullmatch(text) or (at_start and _FLAGS_FOR_ALL.fullmatch(text)):
        return None
    return f"{_NAMES.get(text, 'the group')} {text}"
