"""What bytes that aren't UTF-8 may be, for people whose spreadsheet wrote them."""

AROUND = 12
"""Bytes shown on each side of the one that isn't UTF-8."""


def encoding_hint(error: UnicodeDecodeError) -> str:
    """Return what to do about it, to stand behind "isn't UTF-8"."""
    data = bytes(error.object)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return ": it is UTF-16; convert it, as in iconv -f utf-16 -t utf-8 FILE > NEW"
    part = data[max(error.start - AROUND, 0) : error.start + AROUND]
    try:
        seen = " ".join(part.decode("cp1252").split())
    except UnicodeDecodeError:
        return f" ({error.reason})"
    return f": as Windows-1252 it reads {seen!r}; if that is right: iconv -f cp1252 -t utf-8 FILE > NEW"
