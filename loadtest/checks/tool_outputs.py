"""`python -m manylora.loadtest.checks.tool_outputs`: calls of tools, streamed and whole, and held to what was asked.

Random tools × families × random models: each output is read whole and cut at random, as it is and with faults put in,
and must say the same; arguments under strict must be valid by their schemas, and those alone may be called that are
allowed.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from typing import Any

import jsonschema_rs

from manylora.loadtest.checks.held_to_schemas import MODELS, Judge, valid
from manylora.loadtest.material.findings import Findings
from manylora.loadtest.material.random_schemas import SchemaMaker
from manylora.server.chat.deltas import Arguments, CallBegins, Content, Reasoning
from manylora.server.chat.formats import hermes, llama, mistral, qwen_xml
from manylora.server.chat.formats.format import ToolsRefused
from manylora.server.chat.reading import Reading
from manylora.server.chat.tools import InputGrammar, Tool, ToolUse
from manylora.server.engine.grammar import CompiledGrammar, Grammar, GrammarKind, GrammarRefused

OUTPUTS = 10_000
FORMATS = (hermes.FORMAT, qwen_xml.FORMAT, llama.FORMAT, mistral.OLD, mistral.NEW)
WRITES = 4
"""Outputs of each grammar."""
FAULTS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", '"', "}", "{", "\\", "<", "\n", "</parameter>")
CUSTOM = (
    Tool("text", custom=True),
    Tool("digits", custom=True, grammar=InputGrammar("regex", "[0-9]{2,4}")),
    Tool("query", custom=True, grammar=InputGrammar("lark", 'start: "SELECT " /["a-z]{1,9}/ ";"')),
)


def use_of(pick: random.Random, seed: int) -> ToolUse:
    """Return some tools, and how they may be used."""
    tools = list(pick.sample(CUSTOM, pick.randrange(3)))
    for number in range(pick.randrange(1, 4)):
        tools.append(Tool(f"f{number}", parameters=_parameters(pick, seed), strict=True))
    some = frozenset(tool.name for tool in tools if pick.random() < 0.7)
    mode = "required" if pick.random() < 0.8 else "auto"
    return ToolUse(tools, mode, some or None, parallel=pick.random() < 0.5)  # type: ignore[arg-type]  # one of both


def _parameters(pick: random.Random, seed: int) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for place in range(pick.randrange(4)):
        # Their definitions stand at the root, each under a name of its own.
        text = json.dumps(SchemaMaker(seed * 10 + place).make())
        made = json.loads(text.replace("#/$defs/d", f"#/$defs/{place}d"))
        definitions |= {f"{place}{name}": each for name, each in made.pop("$defs", {}).items()}
        properties[f"p{place}"] = made
    required = [name for name in properties if pick.random() < 0.5]
    whole = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {**whole, "$defs": definitions} if definitions else whole


def told(reading: Reading, pieces: Sequence[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return what a reader finds: content, thoughts, calls."""
    parser = reading.parser()
    assert parser is not None
    content, thought, calls = "", "", list[tuple[str, str]]()
    for delta in [*(delta for piece in pieces for delta in parser.push(piece)), *parser.end()]:
        if isinstance(delta, Content):
            content += delta.text
        elif isinstance(delta, Reasoning):
            thought += delta.text
        elif isinstance(delta, CallBegins):
            calls.append((delta.name, ""))
        elif isinstance(delta, Arguments):
            calls[delta.number] = (calls[delta.number][0], calls[delta.number][1] + delta.text)
    return content, thought, calls


def cut(text: str, pick: random.Random) -> list[str]:
    """Return a text in pieces."""
    places = sorted(pick.choices(range(len(text) + 1), k=pick.randrange(len(text) + 1)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def outputs(count: int, first: int) -> Findings:
    """Read so many outputs, from seed ``first``."""
    judge, found, seed = Judge(), Findings(), first
    while found.counts["outputs"] < count:
        seed += 1
        pick = random.Random(seed)
        use, form = use_of(pick, seed), pick.choice(FORMATS)
        reading = Reading(form, use)
        try:
            text = reading.grammar({}, None, loose=False)
            assert text is not None
            grammar = CompiledGrammar(Grammar(GrammarKind.LARK, text), judge.tables)
        except (ToolsRefused, GrammarRefused):
            found.counts["refused"] += 1
            continue
        for model in range(WRITES):
            written, ended = judge.written(grammar, MODELS[model % len(MODELS)], seed + model)
            _hold(reading, written, ended, pick, found, f"seed {seed}, {form.name}")
    return found


def _hold(
    reading: Reading, written: str, ended: bool, pick: random.Random, found: Findings, told_as: str
) -> None:
    found.counts["outputs"] += 1
    found.counts["ended" if ended else "cut short"] += 1
    whole = told(reading, [written])
    found.counts["calls"] += len(whole[2])
    for text in (written, _with_faults(written, pick), f"<think>{written[:9]}</think>\n{written}"):
        read = Reading(reading.format, reading.use, thinks=text.startswith("<think>"))
        if told(read, cut(text, pick)) != told(read, [text]) or told(read, list(text)) != told(read, [text]):
            found.wrong.append(f"streamed and whole differ: {text!r} ({told_as})")
    if not ended:
        return
    use = reading.use
    if use.mode == "required" and not (whole[2] and not whole[0].strip()):
        found.wrong.append(f"not a call: {written!r} ({told_as})")
    if not use.parallel and len(whole[2]) > 1:
        found.wrong.append(f"more than one call: {written!r} ({told_as})")
    for name, arguments in whole[2]:
        tool = use.by_name.get(name)
        if tool is None or tool not in use.callable or not _valid(tool, arguments):
            found.wrong.append(f"{name} with {arguments!r}: {written!r} ({told_as})")


def _valid(tool: Tool, arguments: str) -> bool:
    if tool.grammar is not None:
        pattern = {"digits": "^[0-9]{2,4}$", "query": '^SELECT ["a-z]{1,9};$'}[tool.name]
        return jsonschema_rs.is_valid({"pattern": pattern}, arguments)
    if tool.custom:
        return True
    return valid(tool.schema, arguments)


def _with_faults(text: str, pick: random.Random) -> str:
    for _ in range(pick.randrange(1, 4)):
        place = pick.randrange(len(text) + 1)
        text = text[:place] + pick.choice(FAULTS) + text[place + pick.randrange(3) :]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=OUTPUTS)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    found = outputs(asked.outputs, asked.seed)
    return found.report()


if __name__ == "__main__":
    sys.exit(main())
