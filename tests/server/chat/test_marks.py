"""Marks that are control tokens have no text: they are spelled out for readers, and named by their ids in grammars."""

import pytest

from manylora.server.chat.deltas import Arguments, CallBegins
from manylora.server.chat.formats import hermes, llama, mistral, qwen_xml
from manylora.server.chat.formats.format import Format, ToolsRefused
from manylora.server.chat.reading import Reading
from manylora.server.chat.tools import Tool, ToolUse
from manylora.server.engine.detokenizer import Detokenizer
from manylora.server.engine.grammar import (
    CompiledGrammar,
    Grammar,
    GrammarFault,
    GrammarKind,
    Tables,
    TokenSet,
)
from manylora.server.tokenizer import Vocabulary

CONTROLS = {
    "</s>": 256,
    "[TOOL_CALLS]": 257,
    "[ARGS]": 258,
    "<tool_call>": 259,
    "</tool_call>": 260,
    "<|python_tag|>": 261,
    "<|other|>": 262,
}
VOCABULARY = Vocabulary(
    [*(bytes([byte]) for byte in range(256)), *(name.encode() for name in CONTROLS)],
    CONTROLS,
    strips_first_space=False,
)
TOOLS = (Tool("f", strict=True), Tool("g", strict=True))
TEXTS = [
    (hermes.FORMAT, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'),
    (qwen_xml.FORMAT, "<tool_call>\n<function=f>\n</function>\n</tool_call>"),
    (mistral.OLD, '[TOOL_CALLS][{"name": "f", "arguments": {}}]'),
    (mistral.NEW, "[TOOL_CALLS]f[ARGS]{}"),
    (llama.FORMAT, '{"name": "f", "parameters": {}}'),
]


def ids_of(text: str) -> list[int]:
    """Tokenise: control tokens where they are spelled, else bytes."""
    ids: list[int] = []
    while text:
        name = next((name for name in CONTROLS if text.startswith(name)), None)
        ids += [CONTROLS[name]] if name else list(text[0].encode())
        text = text[len(name) if name else 1 :]
    return ids


@pytest.mark.parametrize(("form", "text"), TEXTS)
def test_marks_reach_the_reader_and_other_control_tokens_don_t(form: Format, text: str) -> None:
    reading = Reading(form, ToolUse(TOOLS))
    detokenizer = Detokenizer(VOCABULARY.spelling(reading.marks), [])
    spelled = "".join(detokenizer.push(token_id) for token_id in ids_of(text + "<|other|>"))
    assert spelled == text
    parser = reading.parser()
    assert parser is not None
    begins, arguments = [*parser.push(spelled), *parser.end()]
    assert isinstance(begins, CallBegins)
    assert (begins.name, arguments) == ("f", Arguments(0, "{}"))


def test_nothing_is_spelled_out_where_nothing_is_read() -> None:
    assert VOCABULARY.spelling(Reading().marks) is VOCABULARY
    assert VOCABULARY.spelling(("<think>",)) is VOCABULARY


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    matcher = grammar.matcher((), 0)
    try:
        for token_id in ids_of(text):
            matcher.take(token_id)
    except GrammarFault:
        return False
    return bool(matcher.may_end)


@pytest.mark.parametrize("controls", [CONTROLS, {"</s>": 256}], ids=["control tokens", "texts"])
@pytest.mark.parametrize(("form", "text"), TEXTS)
def test_grammars_hold_calls_whether_marks_are_control_tokens_or_texts(
    form: Format, text: str, controls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.server.chat.test_marks.CONTROLS", controls)
    pieces = VOCABULARY.pieces[: 256 + len(controls)]
    tables = Tables.of(TokenSet("t", pieces, controls, frozenset({256})), len(pieces))

    def held(**use: object) -> CompiledGrammar:
        reading = Reading(form, ToolUse(TOOLS, **use))  # type: ignore[arg-type]
        written = reading.grammar(controls, None, loose=False)
        assert written is not None
        return CompiledGrammar(Grammar(GrammarKind.LARK, written), tables)

    other = text.replace('"f"', '"h"').replace("=f>", "=h>").replace("]f", "]h")
    required, free, once = held(mode="required"), held(), held(parallel=False)
    assert accepts(required, text)
    assert not accepts(required, "no")
    assert not accepts(required, other)
    only_g = held(allowed=frozenset({"g"}))
    lead = "" if form is llama.FORMAT else "I look. "
    for grammar, is_held in ((free, True), (only_g, False)):
        assert accepts(grammar, "no call at all {}")
        assert accepts(grammar, lead + text) is is_held
        assert not accepts(grammar, lead + other)
    assert accepts(once, lead + text)
    assert accepts(once, "no call at all {}")
    for more in ("\n", " bye", text, f"\n{text}", "\n<tool_caller\n"):
        assert not accepts(once, lead + text + more)


def test_a_reference_out_of_a_parameter_is_refused_where_each_is_held_alone() -> None:
    properties = {"p": {"type": "object", "properties": {"q": {"$ref": "#"}}}}
    tool = Tool("f", parameters={"type": "object", "properties": properties}, strict=True)
    with pytest.raises(ToolsRefused, match="leads out"):
        Reading(qwen_xml.FORMAT, ToolUse((tool,))).grammar({}, None, loose=False)
