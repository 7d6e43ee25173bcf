"""How a model's answers are read: which family's calls it writes, by its chat template, and whether it thinks."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from manylora.server.chat import reasoning
from manylora.server.chat.deltas import ChoiceParser
from manylora.server.chat.fold import Fold, Reader, Sink, plain
from manylora.server.chat.formats import hermes, llama, mistral, qwen_xml
from manylora.server.chat.formats.format import Format, Spell, grammar, literal
from manylora.server.chat.tools import ToolUse

NAMES = ("hermes", "qwen3_coder", "llama3_json", "mistral")
"""Formats as they are asked for by name."""
_FORMATS = {each.name: each for each in (hermes.FORMAT, qwen_xml.FORMAT, llama.FORMAT)}
_SAID = re.compile(r"\{#-?\s*tool[-_]parser:\s*([\w-]+)\s*-?#\}")
"""A comment by which a template names its format."""


class NoFormat(Exception):
    """It isn't known how a model calls tools. The message says what to do."""


def takes_tools(template: str) -> bool:
    """Say whether a template tells the model which tools there are."""
    return re.search(r"\btools\b", template) is not None


def format_of(template: str, forced: str | None, controls: Collection[str]) -> Format:
    """Return the format that a template's model writes calls in.

    ``forced``: by name, unless the template itself says; ``controls``: the tokenizer's control tokens.
    Raises NoFormat.
    """
    said = _SAID.search(template)
    name = (said.group(1) if said else forced) or _told_by(template)
    if name == "mistral":
        by_name = mistral.ARGS in template or mistral.ARGS in controls
        return mistral.NEW if by_name else mistral.OLD
    if name is not None and name in _FORMATS:
        return _FORMATS[name]
    raise NoFormat(
        f"the model's chat template names the tool parser {name!r}; known are {', '.join(NAMES)}"
        if name
        else "the model's chat template doesn't tell how it writes calls: say so with --tool-parser, or by a comment "
        "{# tool-parser: hermes #} in the template"
    )


def _told_by(template: str) -> str | None:
    if qwen_xml.FUNCTION in template:
        return "qwen3_coder"
    if hermes.OPEN in template:
        return "hermes"
    if mistral.OPEN in template:
        return "mistral"
    if llama.TAG in template or ('"parameters"' in template and "ipython" in template):
        return "llama3_json"
    return None


@dataclass(frozen=True, slots=True)
class Reading:
    """How one request's answers are read."""

    format: Format | None = None
    """None: nothing in them is a call."""
    use: ToolUse = field(default_factory=ToolUse)
    thinks: bool = False
    """Whether they may begin with what is thought."""
    opened: bool = False
    """Whether the prompt has begun that already."""

    @property
    def marks(self) -> tuple[str, ...]:
        """What must be spelled out in the text although it may be a control token."""
        thought = (reasoning.OPEN, reasoning.CLOSE) if self.thinks else ()
        return (*thought, *(self.format.marks if self.format is not None else ()))

    def parser(self) -> ChoiceParser | None:
        """Return what reads one answer; None: all of it is content."""
        if self.format is None and not self.thinks:
            return None
        mint: Callable[[], str] = self.format.mint if self.format is not None else str
        sink = Sink(self.use.by_name, mint)
        answer: Reader[None] = plain(sink) if self.format is None else self.format.read(sink, self.use)
        if self.thinks:
            return Fold(sink, reasoning.thinking(sink, answer, opened=self.opened), may_think=True)
        return Fold(sink, answer)

    def grammar(self, controls: Mapping[str, int], answer: str | None, *, loose: bool) -> str | None:
        """Return Lark that holds the answer, after what is thought; None where nothing need be held.

        ``answer``: Lark for what it must be where it calls nothing; ``loose``: any object will do as the arguments of a
        tool that isn't strict. Raises ToolsRefused.
        """
        if self.format is None or not (self.use.held or answer is not None):
            return None

        def spell(mark: str) -> str:
            return f"<[{controls[mark]}]>" if mark in controls else literal(mark)

        spelled: Spell = spell
        return grammar(self.format.calls(self.use, spelled, loose), self.use, spelled, answer)
