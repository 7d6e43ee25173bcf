"""What can be said of one example alone: empty messages, nothing trained, turns out of order, wrong encodings."""

import re

from manylora.training.check.kinds import Flag
from manylora.training.check.texts import content_of
from manylora.training.data.example import Example

_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb]"
)
_IDEOGRAPHS = re.compile("[\u3400-\u9fff]{2,}[\u3400-\u9fff\uff00-\uffef\u3000-\u303f\u20ac\u2026]*")
_MAY_BE_BYTES = re.compile("[\x80-\u2e7f]{2}|[ÃÂâÐÑРС]")
"""UTF-8 that was read as a one-byte encoding: two signs in a row, or the first of two whose second looks like a space.
Most good text has neither, and ftfy takes its time."""
_KUN_TANGKAO = re.compile("锟斤拷|烫烫烫|屯屯屯")
"""What Chinese editors show for broken bytes: U+FFFD in GBK, and a debugger's fill of unset memory."""


def flags_of(example: Example) -> Flag:
    """All that is wrong with this example by itself."""
    found = Flag(0)
    if example.text is not None:
        texts = [example.text]
        if not visible(example.text):
            found |= Flag.EMPTY
    else:
        texts = [content_of(message) for message in example.messages]
        if not any(example.trained):
            found |= Flag.UNTRAINED
        found |= _empty_messages(example, texts) | _role_order(example)
    for text in texts:
        if text.isascii() and text.isprintable():
            continue
        if _CONTROL.search(text):
            found |= Flag.CONTROL
        if is_mojibake(text):
            found |= Flag.MOJIBAKE
    return found


def visible(text: str) -> bool:
    """Whether anything of a text can be seen."""
    return bool(_CONTROL.sub("", text).strip()) if text else False


def _empty_messages(example: Example, texts: list[str]) -> Flag:
    """A user's or assistant's message without text. A system message may be empty, and so may a tool's result."""
    for message, text in zip(example.messages, texts, strict=True):
        if message["role"] in ("user", "assistant") and not visible(text):
            return Flag.EMPTY
    return Flag(0)


def _role_order(example: Example) -> Flag:
    """system first and once, then user and assistant in turn, tools after a call, an assistant last."""
    roles = [str(message["role"]) for message in example.messages]
    if not roles:
        return Flag(0)
    while roles and roles[0] in ("system", "developer"):
        roles.pop(0)
    previous = "start"
    for role, message in zip(roles, example.messages[len(example.messages) - len(roles) :], strict=True):
        if previous not in _MAY_FOLLOW.get(role, ()):
            return Flag.ROLES
        previous = "call" if role == "assistant" and message.get("tool_calls") else role
    return Flag(0) if previous in ("assistant", "call") else Flag.ROLES


_MAY_FOLLOW = {
    "user": ("start", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("call", "tool", "assistant"),  # some formats write the call as text
}


def is_mojibake(text: str) -> bool:
    """Whether a text looks decoded with the wrong encoding."""
    if text.isascii():
        return False
    if "\ufffd" in text or _KUN_TANGKAO.search(text) or _gbk_mix_up(text) is not None:
        return True
    if not _MAY_BE_BYTES.search(text):
        return False
    from ftfy.badness import is_bad

    return bool(is_bad(text))


def repaired(text: str) -> str:
    """Undo a wrong decoding where it can be undone, and drop control characters."""
    if text.isascii() and text.isprintable():
        return text
    from ftfy import fix_encoding

    if is_mojibake(text):
        text = _gbk_mix_up(text) or str(fix_encoding(text))
    return _CONTROL.sub("", text)


def _gbk_mix_up(text: str) -> str | None:
    """Return what a text was before its UTF-8 bytes were read as GBK, or None where that isn't what happened.

    Real Chinese, written as GBK, is hardly ever valid UTF-8; three runs of it in a row never are.
    """
    if not _IDEOGRAPHS.search(text):
        return None
    try:
        before = text.encode("gb18030").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return None
    return before if before != text and len(before) >= 2 else None
