"""Formats and white space in patterns, said as expressions where the library's own let too much through; and words left
out that demand nothing, which it would refuse by their names alone.

What is accepted here is a part of what the formats allow: no leap seconds, host names of up to four labels without two
hyphens in a row. Dates know leap years (RFC 3339).
"""

import re
from typing import Any

_DAY = "(0[1-9]|[12][0-9]|3[01])"
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_MONTHS = f"(0[13578]|1[02])-{_DAY}|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
_DATE = f"([0-9]{{4}}-({_MONTHS})|{_LEAP}-02-29)"
_HOUR = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{_HOUR})"
_LABEL = "[a-zA-Z0-9](-?[a-zA-Z0-9]){0,30}"
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL}){{0,3}}$",
}
_SPACE = r"\t\n\x0b\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
"""What ECMA-262, whose expressions JSON Schema has, takes for white space."""
_PART = re.compile(r"\\.|\[|\]|.", re.DOTALL)


_NOTHING: dict[str, tuple[object, ...]] = {
    "uniqueItems": (False,),
    "not": (False,),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "propertyNames": (True, {}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
}
"""Values by which these words ask for nothing."""
_WITHOUT = {"then": "if", "else": "if", "minContains": "contains", "maxContains": "contains"}
"""Words that ask for nothing without another one."""


def say_exactly(schema: dict[str, Any]) -> None:
    """Leave out what asks for nothing, and put patterns in the place of a format and of white space; in place."""
    for word in [word for word in schema if _asks_for_nothing(word, schema)]:
        del schema[word]
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        schema["pattern"] = with_spaces(pattern)
    name = schema.get("format")
    if not isinstance(name, str) or name not in FORMATS:
        return
    del schema["format"]
    every = schema.get("allOf")
    schema["allOf"] = [*(every if isinstance(every, list) else ()), {"pattern": FORMATS[name]}]


def _asks_for_nothing(word: str, schema: dict[str, Any]) -> bool:
    if word == "if":
        return "then" not in schema and "else" not in schema
    if word in _WITHOUT:
        return _WITHOUT[word] not in schema
    value = schema[word]
    return any(value is each if isinstance(each, bool) else value == each for each in _NOTHING.get(word, ()))


def with_spaces(pattern: str) -> str:
    r"""Return a pattern that says which characters \s and \S are; \S inside brackets is left."""
    inside = False
    parts = []
    for found in _PART.finditer(pattern):
        part = found.group()
        if part in "[]":
            inside = part == "["
        elif part == r"\s":
            part = _SPACE if inside else f"[{_SPACE}]"
        elif part == r"\S" and not inside:
            part = f"[^{_SPACE}]"
        parts.append(part)
    return "".join(parts)
