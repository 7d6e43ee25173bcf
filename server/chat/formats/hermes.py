"""Hermes, Qwen2.5 and Qwen3: JSON between <tool_call> and </tool_call>, once for each call."""

from manylora.server.chat.fold import Ended, NotACall, Reader, Sink, give_back, solid, until
from manylora.server.chat.formats.format import Calls, Format, Spell, json_bodies
from manylora.server.chat.json_calls import RawEnd, call
from manylora.server.chat.tools import ToolUse

OPEN, CLOSE = "<tool_call>", "</tool_call>"
RAW_END = RawEnd('"}}\n' + CLOSE, is_last=False)


def read(sink: Sink, use: ToolUse) -> Reader[None]:
    """Read an answer."""
    inside, first = False, ""
    while mark := (yield from until(sink, (OPEN, CLOSE) if inside else (OPEN,), first)):
        first = ""
        if mark == CLOSE:
            inside = False
            continue
        raw, calls = [mark], sink.calls
        try:
            character = yield from solid(raw)
            if character != "{":
                raise NotACall
            while character == "{":
                yield from call(sink, raw, RAW_END)
                inside, character = "".join(raw[-len(CLOSE) :]) != CLOSE, ""
                # One brace too many is a common slip.
                while inside and (character := (yield from solid(raw))) in "},":
                    pass
            first = character
        except NotACall:
            inside = sink.calls > calls
            give_back(sink, raw, calls)
        except Ended:  # of a call behind another one nothing is shown
            give_back(sink, raw, 0)
            return


def calls(use: ToolUse, spell: Spell, loose: bool) -> Calls:
    """Return the grammar of calls."""
    body, rules = json_bodies(use, lambda name: f'\n{{"name": "{name}", "arguments": ', "}\n", loose=loose)
    return Calls(OPEN, f"({body}) {spell(CLOSE)}", rules, between="\n")


FORMAT = Format("hermes", (OPEN, CLOSE), read, calls)
