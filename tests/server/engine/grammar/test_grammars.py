"""Compiling: elsewhere, once, bounded in number and time."""

import asyncio
import threading

import pytest
from llguidance import LLParserLimits

from manylora.server.engine.grammar import (
    CompiledGrammar,
    Grammar,
    GrammarKind,
    GrammarRefused,
    Grammars,
    TokenSet,
)
from manylora.server.engine.grammar import grammars as room
from manylora.server.errors import QueueFull
from tests.server.engine.grammar.texts import PIECES, TOKENS


def number(n: int) -> Grammar:
    return Grammar(GrammarKind.REGEX, f"x{{{n}}}")


async def test_many_requests_for_one_grammar_compile_it_once() -> None:
    made = Grammars(len(PIECES))
    found = await asyncio.gather(*(made.compile(number(1), TOKENS) for _ in range(50)))
    assert len(set(map(id, found))) == 1
    assert made.compiled == 1
    again = await made.compile(Grammar(GrammarKind.REGEX, "x{1}", param="guided_regex"), TOKENS)
    assert again is found[0]
    made.close()


async def test_a_tokenizer_of_its_own_has_a_grammar_of_its_own() -> None:
    made = Grammars(len(PIECES))
    other = TokenSet("other", [b"xx", b"x", b"<end>"], {"<end>": 2}, frozenset({2}))
    one, two = await made.compile(number(2), TOKENS), await made.compile(number(2), other)
    assert one is not two
    assert made.compiled == 2
    made.close()


async def test_a_refusal_is_remembered_and_a_limit_met_is_not() -> None:
    made = Grammars(len(PIECES))
    wrong = Grammar(GrammarKind.REGEX, "(")
    for _ in range(2):
        with pytest.raises(GrammarRefused, match="unclosed"):
            await made.compile(wrong, TOKENS)
    first = await made.compile(number(3), TOKENS)
    first.broken = True
    assert await made.compile(number(3), TOKENS) is not first
    made.close()


async def test_the_last_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST_GRAMMARS", 2)
    made = Grammars(len(PIECES))
    one = await made.compile(number(1), TOKENS)
    await made.compile(number(2), TOKENS)
    assert await made.compile(number(1), TOKENS) is one
    await made.compile(number(3), TOKENS)
    assert await made.compile(number(1), TOKENS) is one
    await made.compile(number(2), TOKENS)
    assert made.compiled == 4
    made.close()


async def test_one_that_takes_too_long_is_refused_and_too_many_at_once_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on, build = threading.Event(), CompiledGrammar

    def slow(*arguments: object) -> object:
        go_on.wait(30)
        return build(*arguments)  # type: ignore[arg-type]  # what it was given

    monkeypatch.setattr(f"{room.__name__}.CompiledGrammar", slow)
    monkeypatch.setattr(room, "MOST_WAITING", 3)
    made = Grammars(len(PIECES), seconds=1.0)
    for n in range(2):
        with pytest.raises(GrammarRefused, match="takes longer"):
            await made.compile(number(n), TOKENS)
    with pytest.raises(QueueFull, match="other grammars took") as waited:
        await made.compile(number(2), TOKENS)
    assert waited.value.retry_after is not None, "its time went in the queue: it is told to come again"
    with pytest.raises(QueueFull, match="wait to be compiled"):
        await made.compile(number(9), TOKENS)
    go_on.set()
    made.close()


async def test_the_event_loop_goes_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on, build = threading.Event(), threading.Event(), CompiledGrammar

    def held(*arguments: object) -> object:
        entered.set()
        go_on.wait(30)
        return build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(f"{room.__name__}.CompiledGrammar", held)
    made = Grammars(len(PIECES))
    compiling = asyncio.ensure_future(made.compile(number(1), TOKENS))
    assert await asyncio.to_thread(entered.wait, 30)
    assert not compiling.done()
    go_on.set()
    await compiling
    made.close()


async def test_tenants_share_no_grammar() -> None:
    made = Grammars(len(PIECES))
    one = await made.compile(number(1), TOKENS, "acme")
    two, nobodys = await made.compile(number(1), TOKENS, "globex"), await made.compile(number(1), TOKENS)
    assert made.compiled == 3, "whoever finds it compiled would know that another asked for it"
    assert len({id(one), id(two), id(nobodys)}) == 3
    one.broken = True
    assert await made.compile(number(1), TOKENS, "globex") is two, "a limit that another met is not met here"
    assert await made.compile(number(1), TOKENS, "acme") is not one
    made.close()


async def test_a_limit_that_one_tenant_s_answers_meet_is_not_met_by_another_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{CompiledGrammar.__module__}.limits", lambda: LLParserLimits(max_lexer_states=40))
    made, ambiguous = Grammars(len(PIECES)), Grammar(GrammarKind.REGEX, "[AB]*A[AB]{12}C")
    one, two = [await made.compile(ambiguous, TOKENS, tenant) for tenant in ("acme", "globex")]
    assert _follows(one, "AB")
    assert not _follows(one, "ABBAAABBAABABB")
    assert not _follows(one, "AB"), "answers to one tenant share the limit"
    assert _follows(two, "AB")
    made.close()


def _follows(grammar: CompiledGrammar, text: str) -> bool:
    """Return whether an answer can go on after a text."""
    matcher = grammar.matcher((), 0)
    for letter in text:
        matcher.native.compute_bitmask()
        if not matcher.native.consume_token(PIECES.index(letter.encode())):
            return False
    return not matcher.native.is_error()


async def test_who_keeps_most_loses_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST_GRAMMARS", 4)
    made = Grammars(len(PIECES))
    mine = await made.compile(number(1), TOKENS, "acme")
    for n in range(20):
        await made.compile(number(n), TOKENS, "globex")
    assert await made.compile(number(1), TOKENS, "acme") is mine
    made.close()


async def test_tenants_have_turns_and_none_fills_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, build, order = threading.Event(), CompiledGrammar, list[str]()

    def slow(grammar: Grammar, tokens: TokenSet) -> object:
        go_on.wait(30)
        order.append(grammar.text)
        return build(grammar, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(f"{room.__name__}.CompiledGrammar", slow)
    monkeypatch.setattr(room, "THREADS", 1)
    monkeypatch.setattr(room, "MOST_OF_ONE", 5)
    made = Grammars(len(PIECES))
    theirs = [asyncio.ensure_future(made.compile(number(n), TOKENS, "globex")) for n in range(5)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await made.compile(number(9), TOKENS, "globex")
    mine = asyncio.ensure_future(made.compile(number(100), TOKENS, "acme"))
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(mine, *theirs)
    assert order.index("x{100}") <= 2, "behind what had begun, and one turn"
    await made.compile(number(9), TOKENS, "globex")
    made.close()


async def test_a_full_queue_takes_in_one_of_a_tenant_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, build = threading.Event(), CompiledGrammar

    def slow(grammar: Grammar, tokens: TokenSet) -> object:
        go_on.wait(30)
        return build(grammar, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(f"{room.__name__}.CompiledGrammar", slow)
    for name, count in (("MOST_WAITING", 6), ("MOST_OF_ONE", 3), ("RESERVE", 2)):
        monkeypatch.setattr(room, name, count)
    made = Grammars(len(PIECES))
    asked = [made.compile(number(n), TOKENS, tenant) for tenant in ("acme", "globex") for n in range(3)]
    asked += [made.compile(number(9), TOKENS, tenant) for tenant in ("third", "")]
    waiting = [asyncio.ensure_future(each) for each in asked]
    await asyncio.sleep(0)
    for tenant in ("third", "", "acme", "one beyond the reserve"):
        with pytest.raises(QueueFull):
            await made.compile(number(10), TOKENS, tenant)
    go_on.set()
    await asyncio.gather(*waiting)
    made.close()
