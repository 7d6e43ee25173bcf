"""What readers find in answers, family by family, and that it never depends on how an answer was cut."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.server.chat.deltas import Arguments, CallBegins, Content, Reasoning
from manylora.server.chat.formats import hermes, llama, mistral, qwen_xml
from manylora.server.chat.formats.format import Format
from manylora.server.chat.reading import NoFormat, Reading, format_of, takes_tools
from manylora.server.chat.tools import InputGrammar, Tool, ToolUse

WEATHER = Tool(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "note": {"type": ["string", "null"]},
            "more": {"type": "object"},
        },
    },
)
RUN = Tool("run", custom=True)
QUERY = Tool("query", custom=True, grammar=InputGrammar("lark", 'start: "SELECT" /.*/'))
USE = ToolUse((WEATHER, RUN, QUERY))
Found = tuple[str, str, list[tuple[str, str]]]
"""Content, thoughts, and each call's name and arguments."""


def found(form: Format | None, pieces: Sequence[str], *, thinks: bool = False, opened: bool = False) -> Found:
    parser = Reading(form, USE, thinks=thinks, opened=opened).parser()
    assert parser is not None
    content, thought, calls = "", "", list[tuple[str, str]]()
    for delta in [*(delta for piece in pieces for delta in parser.push(piece)), *parser.end()]:
        if isinstance(delta, Content):
            content += delta.text
        elif isinstance(delta, Reasoning):
            thought += delta.text
        elif isinstance(delta, CallBegins):
            assert delta.number == len(calls)
            assert delta.custom == (delta.name in ("run", "query"))
            calls.append((delta.name, ""))
        elif isinstance(delta, Arguments):
            assert delta.number == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    return content, thought, calls


PARIS = '{"city": "Pa}r\\"is", "days": 3}'
CASES: list[tuple[Format, str, str, list[tuple[str, str]]]] = [
    (
        hermes.FORMAT,
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"city":"x"}, "name":"get_weather"}\n</tool_call>\n',
        "Let me see.",
        [("get_weather", PARIS), ("get_weather", '{"city":"x"}')],
    ),
    (hermes.FORMAT, "<tool_call>no</tool_call> ok", "<tool_call>no</tool_call> ok", []),
    (hermes.FORMAT, "a <tool_call", "a <tool_call", []),
    (
        hermes.FORMAT,
        ' \n{"name": "get_weather", "arguments": {}} ',
        ' \n{"name": "get_weather", "arguments": {}} ',
        [],
    ),
    (hermes.FORMAT, '<tool_call>{"name": "get_weather"}</tool_call>', "", [("get_weather", "{}")]),
    (
        hermes.FORMAT,
        '<tool_call>{"name": "get_weather", "arguments": null}</tool_call>',
        "",
        [("get_weather", "{}")],
    ),
    (
        hermes.FORMAT,
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": 1}"}}</tool_call>\nbye',
        "\nbye",
        [("get_weather", '{"city": 1}')],
    ),
    (
        hermes.FORMAT,
        '<tool_call>{"name": "unknown", "arguments": {"a": [1, {"b": "]"}]}}',
        "",
        [("unknown", '{"a": [1, {"b": "]"}]}')],
    ),
    (
        hermes.FORMAT,
        '<tool_call>{"name": "get_weather", "arguments": {"city": "tru',
        "",
        [("get_weather", '{"city": "tru')],
    ),
    (
        hermes.FORMAT,
        '<tool_call>\n{"name": "run", "arguments": {"input": "p(\\"hi\\")\\n\\u00e9\\ud83d\\ude00"}}\n</tool_call>',
        "",
        [("run", 'p("hi")\né😀')],
    ),
    (
        hermes.FORMAT,
        '<tool_call>\n{"name": "query", "arguments": {"input": "SELECT "}}\nx"}}\n</tool_call>\n'
        '<tool_call>{"name": "run"}',
        "",
        [("query", 'SELECT "}}\nx'), ("run", "")],
    ),
    (
        qwen_xml.FORMAT,
        'ok\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\n"York"\n</parameter>\n<parameter=days>\n3\n'
        '</parameter>\n<parameter=more>\n{"a": true}\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n'
        "<function=run>\n<parameter=input>\nls <b>\n</parameter>\n</function>\n</tool_call>",
        "ok",
        [("get_weather", '{"city": "New\\n\\"York\\"", "days": 3, "more": {"a": true}}'), ("run", "ls <b>")],
    ),
    (
        qwen_xml.FORMAT,
        "<function=get_weather>\n<parameter=city>\n12\n<parameter=exact>\nTrue\n</parameter>\n<parameter=note>\nnull\n"
        "</parameter>\n<parameter=other>\n[1]\n</parameter>\n</function>",
        "",
        [("get_weather", '{"city": "12", "exact": true, "note": null, "other": [1]}')],
    ),
    (
        qwen_xml.FORMAT,
        "<tool_call>\n<function=get_weather>\n</function>\n</tool_call>",
        "",
        [("get_weather", "{}")],
    ),
    (qwen_xml.FORMAT, "<tool_call>\n{}", "<tool_call>\n{}", []),
    (
        llama.FORMAT,
        '{"name": "get_weather", "parameters": {"city": "P"}}; {"name": "run", "parameters": {"input": "q"}}',
        "",
        [("get_weather", '{"city": "P"}'), ("run", "q")],
    ),
    (llama.FORMAT, '{"name": "bob", "age": 3}', '{"name": "bob", "age": 3}', []),
    (llama.FORMAT, 'See {"name": "get_weather"}', 'See {"name": "get_weather"}', []),
    (
        llama.FORMAT,
        '<|python_tag|>{"type": "function", "name": "other", "parameters": {}}',
        "",
        [("other", "{}")],
    ),
    (
        llama.FORMAT,
        '<|python_tag|>brave_search.call(query="a b")',
        "",
        [("brave_search", '{"query": "a b"}')],
    ),
    (llama.FORMAT, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (
        mistral.OLD,
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "P"}, "id": "123456789"}, '
        '{"name":"run","arguments":{"input":"x"}}]',
        "",
        [("get_weather", '{"city": "P"}'), ("run", "x")],
    ),
    (
        mistral.NEW,
        'hi[TOOL_CALLS]get_weather[ARGS]{"city": "P"}[TOOL_CALLS]run[CALL_ID]abcdefghi[ARGS]{"input": "y"}',
        "hi",
        [("get_weather", '{"city": "P"}'), ("run", "y")],
    ),
    (mistral.NEW, '[TOOL_CALLS]query[ARGS]{"input": "SELECT "}"}', "", [("query", 'SELECT "}')]),
    (mistral.NEW, "[TOOL_CALLS] nonsense", "[TOOL_CALLS] nonsense", []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_each_family_is_read(form: Format, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert found(form, [text]) == (content, "", calls)
    assert found(form, list(text)) == (content, "", calls)
    thought = f"<think>\nhm <tool_call> [TOOL_CALLS]\n</think>\n\n{text}"
    for pieces in ([thought], list(thought)):
        assert found(form, pieces, thinks=True)[1:] == ("hm <tool_call> [TOOL_CALLS]", calls)
    rest = thought.removeprefix("<think>")
    assert found(form, [rest], thinks=True, opened=True) == found(form, [thought], thinks=True)


CALL = '{"name": "get_weather", "arguments": {}}'
QUERIED = '{"name": "query", "arguments": {"input": "SELECT x"}}'


@pytest.mark.parametrize(
    ("form", "whole", "mark", "calls"),
    [
        (hermes.FORMAT, f"<tool_call>\n{CALL}", "\n</tool_call>", [("get_weather", "{}")]),
        (hermes.FORMAT, f"<tool_call>{CALL}</tool_call>", "\n<tool_call>\n", [("get_weather", "{}")]),
        (hermes.FORMAT, f"<tool_call>\n{QUERIED[:-3]}", '"}}\n</tool_call>', [("query", "SELECT x")]),
        (
            qwen_xml.FORMAT,
            "<tool_call>\n<function=get_weather>\n</function>",
            "\n</tool_call>\n<tool_call>\n<function=",
            [("get_weather", "{}")],
        ),
        (mistral.OLD, f"[TOOL_CALLS][{QUERIED[:-3]}", '"}}]', [("query", "SELECT x")]),
        (mistral.NEW, '[TOOL_CALLS]query[ARGS]{"input": "SELECT x', '"}', [("query", "SELECT x")]),
        (mistral.NEW, "[TOOL_CALLS]get_weather[ARGS]{}", "[TOOL_CALLS]", [("get_weather", "{}")]),
        (llama.FORMAT, f"{QUERIED[:-3]}".replace("arguments", "parameters"), '"}}', [("query", "SELECT x")]),
    ],
)
def test_an_answer_that_is_cut_inside_a_mark_behind_a_call_shows_nothing_of_it(
    form: Format, whole: str, mark: str, calls: list[tuple[str, str]]
) -> None:
    for size in range(len(mark) + 1):
        for pieces in ([whole + mark[:size]], list(whole + mark[:size])):
            assert found(form, pieces) == ("", "", calls)


def test_an_answer_that_is_cut_inside_the_mark_behind_its_thoughts_shows_nothing_of_it() -> None:
    mark = "\n</think>"
    for size in range(len(mark)):
        assert found(None, ["<think>hm" + mark[:size]], thinks=True) == ("", "hm", [])


MARKS = sorted(
    {mark for form in (hermes.FORMAT, qwen_xml.FORMAT, llama.FORMAT, mistral.NEW) for mark in form.marks}
    | {
        "<think>",
        "</think>",
        "<function=get_weather>",
        "<parameter=city>",
        "</parameter>",
        "</function>",
        "\n",
        " ",
    }
    | {
        '{"name": "get_weather", "arguments": ',
        '{"name": "run", "parameters": {"input": "',
        "get_weather[ARGS]",
    }
    | {
        PARIS,
        "{",
        "}",
        '"',
        "\\",
        "\\u00e9",
        "\\ud83d",
        ",",
        ":",
        "[",
        "]",
        "<",
        "</",
        "null",
        "True",
        "é",
        "x",
    }
)
FORMATS = (None, hermes.FORMAT, qwen_xml.FORMAT, llama.FORMAT, mistral.OLD, mistral.NEW)


@settings(deadline=None)
@given(
    form=st.sampled_from(FORMATS),
    parts=st.lists(st.sampled_from(MARKS) | st.sampled_from([text for _, text, _, _ in CASES]), max_size=12),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    opened=st.booleans(),
)
def test_what_is_found_never_depends_on_the_cuts(
    form: Format | None, parts: list[str], cuts: list[int], opened: bool
) -> None:
    text = "".join(parts)
    pieces: list[str] = []
    start = 0
    while start < len(text):
        length = cuts[len(pieces) % len(cuts)]
        pieces.append(text[start : start + length])
        start += length
    whole = found(form, [text], thinks=True, opened=opened)
    assert found(form, pieces, thinks=True, opened=opened) == whole
    assert found(form, list(text), thinks=True, opened=opened) == whole


def test_content_without_a_mark_is_told_at_once() -> None:
    """Nothing is held back longer than it may be the beginning of a mark."""
    parser = Reading(hermes.FORMAT, USE).parser()
    assert parser is not None
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push(" <") == []
    assert parser.push("b>") == [Content(" <b>")]


def test_arguments_are_told_as_they_come() -> None:
    parser = Reading(hermes.FORMAT, USE).parser()
    assert parser is not None
    [begins] = parser.push('<tool_call>{"name": "get_weather"')
    assert isinstance(begins, CallBegins)
    assert parser.push(', "arguments": {"ci') == [Arguments(0, '{"ci')]
    assert parser.push('ty": 1') == [Arguments(0, 'ty": 1')]


@pytest.mark.parametrize(
    ("template", "controls", "name"),
    [
        ("{{ tools }}<tool_call>", (), "hermes"),
        ("{{ tools }}<tool_call><function=f>", (), "qwen3_coder"),
        ("{{ tools }}<|python_tag|>", (), "llama3_json"),
        ('{{ tools }}"parameters" ipython', (), "llama3_json"),
        ("{{ tools }}[TOOL_CALLS]", (), "mistral"),
        ("{{ tools }}[TOOL_CALLS][ARGS]", (), "mistral"),
        ("{# tool-parser: mistral #}<tool_call>", (), "mistral"),
    ],
)
def test_a_template_tells_its_format(template: str, controls: tuple[str, ...], name: str) -> None:
    assert format_of(template, None, controls).name == name


def test_a_format_can_be_named_from_outside_unless_the_template_does() -> None:
    assert format_of("x", "hermes", ()) is hermes.FORMAT
    assert format_of("<tool_call>", "mistral", ("[ARGS]",)) is mistral.NEW
    assert format_of("[TOOL_CALLS]", None, ()) is mistral.OLD
    assert format_of("{#- tool-parser: llama3_json -#}<tool_call>", "hermes", ()) is llama.FORMAT
    with pytest.raises(NoFormat, match="--tool-parser"):
        format_of("{{ tools }}", None, ())
    with pytest.raises(NoFormat, match="nobody"):
        format_of("{# tool-parser: nobody #}", None, ())


def test_a_template_without_tools_is_known() -> None:
    assert takes_tools("{% if tools %}")
    assert not takes_tools("{{ messages }} toolset")


def test_ids_are_the_families_own() -> None:
    assert hermes.FORMAT.mint().startswith("call_")
    ids = {mistral.NEW.mint() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    assert json.dumps(sorted(ids))
