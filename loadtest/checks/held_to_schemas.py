"""`python -m manylora.loadtest.checks.held_to_schemas`: what structured output lets through, held against JSON Schema.

Random schemas × random models: every answer that ends must be valid, every refusal must name a keyword, and none may go
on with white space for ever. With `--suite`, a folder of JSON-Schema-Test-Suite: of the schemas that are taken no
instance may be accepted that is not valid; how many valid ones can't be written in our form is told.
"""

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np

from manylora.loadtest.material.findings import Findings
from manylora.loadtest.material.random_schemas import SchemaMaker, byte_vocabulary
from manylora.server.engine.grammar import (
    CompiledGrammar,
    Grammar,
    GrammarFault,
    GrammarKind,
    GrammarRefused,
    Masks,
    Standing,
    Tables,
    TokenSet,
)

SCHEMAS, TOKENS, LONGEST_SPACE = 2000, 300, 34
KEYWORDS = frozenset(
    """$ref $id $anchor $dynamicRef $recursiveRef type enum const properties patternProperties additionalProperties
    required minProperties maxProperties propertyNames items prefixItems additionalItems minItems maxItems uniqueItems
    contains minContains maxContains minLength maxLength pattern format minimum maximum exclusiveMinimum multipleOf
    exclusiveMaximum allOf anyOf oneOf not if then else dependentRequired dependentSchemas dependencies nullable
    unevaluatedProperties unevaluatedItems x-guidance minlength""".split()  # noqa: SIM905  # a table of words
)
MODELS = ("any", "spaces", "closes")


class Judge:
    """Compiles schemas over a vocabulary of bytes, and follows texts."""

    def __init__(self) -> None:
        pieces, controls, self.end = byte_vocabulary()
        tokens = TokenSet("bytes", pieces, controls, frozenset({self.end}))
        self.pieces = pieces
        self.tables = Tables.of(tokens, len(pieces))
        self.masks = Masks(len(pieces), 1)

    def compiled(self, schema: object, found: Findings) -> CompiledGrammar | None:
        """Return a schema's grammar; None: it is refused, and that it isn't by a keyword is noted."""
        try:
            return CompiledGrammar(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), self.tables)
        except GrammarRefused as refused:
            found.counts["refused"] += 1
            if not any(word in str(refused) for word in KEYWORDS):
                found.wrong.append(f"no keyword in {str(refused)!r}: {json.dumps(schema)[:300]}")
            return None

    def accepts(self, grammar: CompiledGrammar, text: str) -> bool:
        """Say whether a text is one of the grammar's."""
        matcher = grammar.matcher((), 0)
        try:
            for byte in text.encode():
                matcher.take(byte)
        except GrammarFault:
            return False
        return matcher.may_end

    def written(self, grammar: CompiledGrammar, model: str, seed: int) -> tuple[str, bool]:
        """Return what a random model writes, and whether it ended."""
        pick = random.Random(seed)
        taste = {token: math.exp(pick.gauss(0, 2)) for token in range(len(self.pieces))}
        liked = {"spaces": (b" ", b"\n", b"\t"), "closes": (b'"', b"}", b"]"), "any": ()}[model]
        matcher = grammar.matcher({self.end}, 0)
        raw = b""
        for _ in range(TOKENS):
            words, faults = self.masks.fill([matcher])
            if faults:
                raise faults[0]
            bits = np.unpackbits(words[0].view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits[: len(self.pieces)]).tolist()
            weights = [taste[t] * (1e6 if self.pieces[t].startswith(tuple(liked)) else 1) for t in allowed]
            token = pick.choices(allowed, weights)[0]
            standing = matcher.take(token)
            if standing is Standing.ENDS:
                return raw.decode(), True
            raw += self.pieces[token]
            if standing is Standing.COMPLETES:
                return raw.decode(), True
        return raw.decode("utf-8", "ignore"), False


def random_schemas(count: int, first: int) -> Findings:
    """Have random models write by random schemas from seed ``first``."""
    judge, found = Judge(), Findings()
    for seed in range(first, first + count):
        schema = SchemaMaker(seed).make()
        grammar = judge.compiled(schema, found)
        if grammar is None:
            continue
        found.counts["taken"] += 1
        for model in MODELS:
            _hold(judge, grammar, schema, model, seed, found)
    return found


def _hold(
    judge: Judge, grammar: CompiledGrammar, schema: Any, model: str, seed: int, found: Findings
) -> None:
    told = f"seed {seed}, model {model}: {json.dumps(schema)[:400]}"
    try:
        text, ended = judge.written(grammar, model, seed)
    except GrammarFault as fault:
        found.wrong.append(f"{fault} ({told})")
        return
    found.counts["ended" if ended else "cut"] += 1
    if ended and not valid(schema, text):
        found.wrong.append(f"not valid: {text!r} ({told})")
    if not ended and _outside_strings(text) and len(text) - len(text.rstrip(" \n\t\r")) > LONGEST_SPACE:
        found.wrong.append(f"white space for ever ({told})")


def valid(schema: Any, text: str) -> bool:
    """Say whether a text is JSON that satisfies a schema."""
    try:
        return jsonschema_rs.is_valid(schema, json.loads(text, parse_float=_finite), validate_formats=True)
    except ValueError:
        return False


def _finite(number: str) -> float:
    """Read a number; JSON bounds no exponents, Python's numbers do."""
    return max(-sys.float_info.max, min(float(number), sys.float_info.max))


def _outside_strings(text: str) -> bool:
    return re.sub(r"\\.", "", text).count('"') % 2 == 0


def suite(directory: Path) -> Findings:
    """Hold the tests of a checkout against what is accepted."""
    judge, found = Judge(), Findings()
    for name, case in _cases(directory):
        grammar = judge.compiled(case["schema"], found)
        if grammar is None:
            continue
        found.counts["taken"] += 1
        for test in case["tests"]:
            texts = [
                json.dumps(test["data"], ensure_ascii=False, separators=each)
                for each in ((",", ":"), (", ", ": "))
            ]
            accepted = any(judge.accepts(grammar, text) for text in texts)
            found.counts[
                f"{'valid' if test['valid'] else 'invalid'}, {'accepted' if accepted else 'not'}"
            ] += 1
            if accepted and not test["valid"]:
                found.wrong.append(f"{name}: {case['description']}: {test['description']}: {texts[0][:200]}")
    return found


def _cases(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(directory.rglob("*.json")):
        for case in json.loads(file.read_text(encoding="utf-8")):
            yield str(file.relative_to(directory)), case


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", type=Path, help="a draft's folder in tests/ of JSON-Schema-Test-Suite")
    parser.add_argument("--schemas", type=int, default=SCHEMAS)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    found = suite(asked.suite) if asked.suite else random_schemas(asked.schemas, asked.seed)
    return found.report()


if __name__ == "__main__":
    sys.exit(main())
