"""How peft's config selects modules: lists of suffixes, regular expressions, layer numbers, overrides.

The matching rules are those of peft 0.21 (tuners_utils.check_target_module_exists,
utils.other.get_pattern_key); tests/adapters hold them against it. Patterns come from uploaded files, so
what could keep the regex engine busy for minutes is refused: ``re`` holds the interpreter's lock, and the
whole server would wait.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from manylora.adapters.errors import InvalidAdapter

MAX_PATTERN_LENGTH = 2000
MAX_OPEN_REPEATS = 6
"""With as many, the worst pattern takes about 30 ms for a module path of 32 characters; each more is × 6."""
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)
_OPEN_REPEAT = re.compile(r"[*+]|\{\d*,\}|\{(?:\d{3,}|\d*,\d{3,})\}")


def check_pattern(pattern: str, field: str) -> None:
    """Raise InvalidAdapter if ``pattern`` is no regular expression, or one that may backtrack without end."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise InvalidAdapter(f"{field}: a pattern of {len(pattern)} characters; at most {MAX_PATTERN_LENGTH}")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InvalidAdapter(f"{field}: {pattern!r} is not a regular expression: {error}") from error
    if _may_explode(pattern):
        raise InvalidAdapter(
            f"{field}: {pattern!r} repeats a group that itself repeats or branches, or has over"
            f" {MAX_OPEN_REPEATS} open repeats; matching it could take for ever. List the modules instead"
        )


def _may_explode(pattern: str) -> bool:
    """Return whether an open repeat applies to a group with a repeat or branch in it, or there are many."""
    ambiguous = [False]
    closed = False
    repeats = 0
    for token in _TOKEN.findall(pattern):
        is_repeat = _OPEN_REPEAT.fullmatch(token) is not None
        if is_repeat and closed:
            return True
        closed = False
        if token == "(":
            ambiguous.append(False)
        elif token == ")" and len(ambiguous) > 1:
            closed = ambiguous.pop()
            ambiguous[-1] = ambiguous[-1] or closed
        elif is_repeat or token == "|":
            ambiguous[-1] = True
            repeats += is_repeat
    return repeats > MAX_OPEN_REPEATS


def matches_any(path: str, targets: str | Sequence[str]) -> bool:
    """Return whether a regex matches the whole path, or one of a list equals it or its end after a dot."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def layer_index(path: str, layers_patterns: Sequence[str]) -> int | None:
    """Return the 7 of "layers.7." for the first of ``layers_patterns`` (any name if there are none)."""
    if not layers_patterns:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
        return int(match["idx"]) if match else None
    for pattern in layers_patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path)
        if match:
            return int(match["idx"])
    return None


_compiled = lru_cache(maxsize=4096)(re.compile)
"""A rank_pattern may have a key per module, more than the cache of ``re`` holds."""


def pattern_key(keys: Iterable[str], path: str) -> str | None:
    """Return the first of ``keys`` (regexes) that matches ``path`` from a dot, or its start, to its end."""
    return next((key for key in keys if _compiled(rf"(.*\.)?({key})$").match(path)), None)
