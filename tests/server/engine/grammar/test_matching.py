"""Matchers and masks: which tokens may follow, what ends a text, and that rows don't feel each other."""

import re
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from manylora.server.engine.grammar import (
    CompiledGrammar,
    Grammar,
    GrammarFault,
    GrammarKind,
    Masks,
    Matcher,
    Standing,
    Tables,
    TokenSet,
)
from tests.server.engine.grammar.texts import CONTROLS, END, PIECES, accepts, compiled, of_schema, refusal

A, B, C, BRACE = (ord(letter) for letter in "abc}")
WITHIN, ENDS, COMPLETES = Standing.WITHIN, Standing.ENDS, Standing.COMPLETES


def allowed(matchers: list[Matcher], size: int = len(PIECES)) -> list[set[int]]:
    words, faults = Masks(size, 2).fill(matchers)
    assert not faults
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row[:size]).tolist()) for row in bits]


def regex(text: str) -> CompiledGrammar:
    return compiled(GrammarKind.REGEX, text)


def test_ends_act_where_the_text_may_end_and_nowhere_else() -> None:
    matcher = regex("ab?").matcher({END}, 0)
    assert allowed([matcher]) == [{A}]
    assert matcher.take(A) is WITHIN
    assert allowed([matcher]) == [{B, END}]
    assert matcher.take(END) is ENDS


def test_a_text_that_nothing_can_follow_is_complete_with_its_last_token() -> None:
    matcher = regex("ab").matcher({END}, 0)
    assert [matcher.take(token) for token in (A, B)] == [WITHIN, COMPLETES]


def test_before_so_many_tokens_a_text_goes_on_as_far_as_it_can() -> None:
    matcher = regex("a{1,3}").matcher({END}, 2)
    seen = []
    for _ in range(2):
        [row] = allowed([matcher])
        seen.append(row)
        matcher.take(A)
    assert seen == [{A}, {A}]
    assert allowed([matcher]) == [{A, END}]


def test_a_stop_id_that_is_text_ends_where_it_may_and_is_text_elsewhere() -> None:
    matcher = of_schema({"type": "object", "properties": {"a": {"type": "object"}}}).matcher({END, BRACE}, 0)
    standings = [matcher.take(token) for token in b'{"a":{']
    assert standings == [WITHIN] * 6
    assert BRACE in allowed([matcher])[0]
    assert matcher.take(BRACE) is WITHIN
    ends = regex("a*").matcher({A}, 1)
    assert allowed([ends]) == [{A}]
    assert ends.take(A) is WITHIN
    assert allowed([ends]) == [{A}]
    assert ends.take(A) is ENDS


def test_without_ids_that_end_it_a_text_ends_where_nothing_may_follow() -> None:
    matcher = regex("ab?").matcher((), 0)
    matcher.take(A)
    assert allowed([matcher]) == [{B}]
    assert matcher.take(B) is COMPLETES


def test_rows_have_their_own_masks_whoever_is_beside_them() -> None:
    grammars = [regex(text) for text in ("a", "b", "[ab]c?", "c+")]
    alone = [allowed([grammar.matcher({END}, 0)])[0] for grammar in grammars]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2, 0, 0], [2]):
        together = allowed([grammars[i].matcher({END}, 0) for i in order])
        assert together == [alone[i] for i in order]


def test_answers_of_one_grammar_go_their_own_ways() -> None:
    grammar = regex("ab|cb")
    one, two = grammar.matcher({END}, 0), grammar.matcher({END}, 0)
    one.take(A)
    assert allowed([one, two]) == [{B}, {A, C}]


def test_a_token_that_may_not_follow_is_a_fault_of_its_row_alone() -> None:
    broken, sound = regex("ab").matcher({END}, 0), regex("ab").matcher({END}, 0)
    with pytest.raises(GrammarFault):
        broken.take(B)
    words, faults = Masks(len(PIECES), 2).fill([broken, sound])
    assert list(faults) == [0]
    assert "\n" not in str(faults[0])
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    assert set(np.flatnonzero(bits[1]).tolist()) == {A}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GrammarKind.JSON_SCHEMA, '{"enum": ["swordfish", "swordtail"]}'),
        (GrammarKind.REGEX, "swordfish|swordtail"),
        (GrammarKind.LARK, 'start: "swordfish" | "swordtail"'),
    ],
)
def test_what_is_said_of_a_fault_repeats_nothing_of_the_grammar(kind: GrammarKind, text: str) -> None:
    matcher = compiled(kind, text).matcher({END}, 0)
    with pytest.raises(GrammarFault) as raised:
        matcher.take(ord("}"))
    told = f"{raised.value} {Masks(len(PIECES), 1).fill([matcher])[1]}"
    assert "sword" not in told


def test_what_the_model_has_no_token_for_is_a_fault() -> None:
    pieces = [b"a", b"b", b"<end>"]
    tables = Tables.of(TokenSet("ab", pieces, {"<end>": 2}, frozenset({2})), 3)
    matcher = CompiledGrammar(Grammar(GrammarKind.REGEX, "ac"), tables).matcher({2}, 0)
    matcher.take(0)
    _, faults = Masks(3, 1).fill([matcher])
    assert "none of the model's tokens" in str(faults[0])


def test_a_grammar_may_begin_after_a_text_or_a_control_token() -> None:
    after_text = compiled(GrammarKind.JSON_SCHEMA, '{"type": "integer"}', "</think>")
    for text in ("so: 3?</think>7", "</think>\n\n-1"):
        assert accepts(after_text, text)
    for text in ("7", "hm</think>x", "hm</think>\n\n\n7", "hm"):
        assert not accepts(after_text, text)
    after_token = compiled(GrammarKind.REGEX, "ab", "<end>").matcher((), 0)
    for token in (*b"x</think>", END, A):
        assert after_token.take(token) is WITHIN
    assert after_token.take(B) is COMPLETES


def test_choices_are_texts_and_not_expressions() -> None:
    grammar = Grammar.of_choices(["a.b", 'é "q"\n', "a", "a"], "guided_choice")
    held = CompiledGrammar(grammar, Tables.of(TokenSet("x", PIECES, CONTROLS, frozenset({END})), len(PIECES)))
    assert [accepts(held, text) for text in ("a.b", 'é "q"\n', "a", "axb", "")] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (GrammarKind.REGEX, "(a", "unclosed group"),
        (GrammarKind.REGEX, "(a)\\1", "backreferences"),
        (GrammarKind.REGEX, "a(?=b)", "look-around"),
        (GrammarKind.EBNF, 'start: "a" foo', "foo"),
        (GrammarKind.EBNF, "root ::= (", ""),
        (GrammarKind.LARK, 'begin: "a"', "start"),
    ],
)
def test_a_grammar_that_makes_no_sense_is_refused_with_what_is_wrong(
    kind: GrammarKind, text: str, said: str
) -> None:
    message = refusal(kind, text)
    assert message
    assert said in message
    assert "backtrace" not in message
    assert "\n" not in message


def letters() -> tuple[Tables, Callable[[str], list[int]]]:
    """Tables of a tokenizer that cuts words into letters and the pairs ab and cd."""
    vocabulary = {letter: number for number, letter in enumerate("abcdefgh~")} | {"ab": 9, "cd": 10}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("c", "d")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    pieces = [name.encode() for name in vocabulary]
    return Tables.of(
        TokenSet("bpe", pieces, {}, frozenset({8}), lambda text: made.encode(text).ids), 11
    ), lambda text: made.encode(text).ids


def test_tokens_are_forced_where_each_is_all_that_its_mask_lets() -> None:
    tables, cut = letters()
    grammar = CompiledGrammar(Grammar(GrammarKind.REGEX, "[ef]abcdg[ef]h"), tables)
    stepped, leapt = grammar.matcher({8}, 0), grammar.matcher({8}, 0)
    tokens = cut("eabcdgfh")
    assert tokens == [4, 9, 10, 6, 5, 7]
    leapt.take(4)
    forced = list(leapt.forced())
    assert forced, "nothing was certain"
    stepped.take(4)
    for token in forced:
        assert allowed([stepped], 11) == [{token}]
        stepped.take(token)
    assert forced == tokens[1 : 1 + len(forced)]


def test_an_unknown_way_of_cutting_texts_forces_nothing() -> None:
    matcher = regex("abc").matcher({END}, 0)
    assert list(matcher.forced()) == []


def test_ids_that_the_model_has_no_row_for_end_nothing() -> None:
    far = {-1, len(PIECES), len(PIECES) + 1, 100_000}
    matcher = regex("ab?").matcher({END, *far}, 0)
    matcher.take(A)
    assert allowed([matcher]) == [{B, END}]
    alone = regex("").matcher(far, 0)
    assert allowed([alone]) == [{END}]


def test_where_nothing_may_follow_and_no_token_ends_a_text_it_is_a_fault() -> None:
    tables = Tables.of(TokenSet("endless", [b"a"], {}, frozenset({700})), 1)
    matcher = CompiledGrammar(Grammar(GrammarKind.REGEX, ""), tables).matcher({700}, 0)
    _, faults = Masks(1, 1).fill([matcher])
    assert "no token that ends a text" in str(faults[0])


def test_whatever_goes_wrong_with_a_row_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    odd, sound = regex("ab").matcher({END}, 0), regex("ab").matcher({END}, 0)

    def wrong(row: object) -> None:
        raise IndexError("index 900 is out of bounds")

    monkeypatch.setattr(odd, "complete_mask", wrong)
    words, faults = Masks(len(PIECES), 2).fill([odd, sound])
    assert {row: str(fault) for row, fault in faults.items()} == {0: "IndexError: index 900 is out of bounds"}
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    assert set(np.flatnonzero(bits[1]).tolist()) == {A}


def spelled_otherwise(text: str) -> list[int]:
    """Cut a text as tokenizers do that know what spells a control token, compose accents, and know too many tokens."""
    ids: list[int] = []
    for part in re.split("(<end>|~)", unicodedata.normalize("NFC", text)):
        known = {"<end>": [END], "~": [len(PIECES) + 7]}
        ids += known.get(part, list(part.encode()))
    return ids


@pytest.mark.parametrize("text", ["say <end> so", "re\u0301sume\u0301", "a~b", "plain"])
def test_what_a_tokenizer_does_not_cut_as_it_stands_is_forced_as_it_stands(text: str) -> None:
    tables = Tables.of(TokenSet("x", PIECES, CONTROLS, frozenset({END}), spelled_otherwise), len(PIECES))
    matcher = CompiledGrammar(Grammar(GrammarKind.REGEX, f"[xy]{text}[xy]"), tables).matcher({END}, 0)
    matcher.take(ord("x"))
    forced = matcher.forced()
    assert list(forced) == list(text.encode())
    assert [matcher.take(token) for token in forced] == [WITHIN] * len(forced)
    assert allowed([matcher]) == [{ord("x"), ord("y")}]
