"""What the library says of a grammar that it refuses, told to whoever asked: the keyword is named."""

_CUT = ("\n   1 | ", "\n  1 | ")
_PREFIXES = ("failed to compile JSON schema: ", "Unsatisfiable schema: ")
_KEYWORDS = {
    "Unknown format": "format",
    "regex parse error": "pattern",
    "is not present in a registry": "$ref",
    "incompatible types": "type",
    "anyOf is empty": "enum or anyOf",
    "Invalid type": "type",
    "schema is false": "allOf, anyOf or oneOf",
    "float range": "minimum or maximum",
    "Regex is empty": "pattern, minLength or maxLength",
}
"""What refusals that don't name the schema's keyword are about."""


def told(error: str) -> str:
    """Return what the library says, without its frame around our form of the grammar."""
    text = error.partition("\n<backtrace>")[0]
    if text.startswith("at "):
        text = text.partition(": ")[2]
    for cut in _CUT:
        text = text.partition(cut)[0]
    for prefix in _PREFIXES:
        text = text.replace(prefix, "")
    text = " ".join(text.split())
    about = next((word for part, word in _KEYWORDS.items() if part in text), None)
    named = f"{about}: {text}" if about is not None and about not in text else text
    return f"it can't be held: {named[:500]}"
