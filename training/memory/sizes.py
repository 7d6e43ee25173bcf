"""Sizes as people write them: 24GiB, 80GB, 512MiB."""

import re

from manylora.training.errors import InvalidArgument

_UNITS = {"": 30, "g": 30, "gib": 30, "m": 20, "mib": 20, "k": 10, "kib": 10, "t": 40, "tib": 40}
_DECIMAL = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}


def parse_bytes(text: str) -> int:
    """Return the bytes of "24GiB", "24G", "24" (GiB all three) or "24GB" (10⁹). Raises InvalidArgument."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = found[2].lower() if found else "?"
    if found and unit in _UNITS:
        size = int(float(found[1]) * (1 << _UNITS[unit]))
    elif found and unit in _DECIMAL:
        size = int(float(found[1]) * _DECIMAL[unit])
    else:
        size = 0
    if size <= 0:
        raise InvalidArgument(f"{text!r} is no memory size, expected one such as 24GiB or 512MiB.")
    return size
