"""StopChecker against an oracle that sees the whole text at once."""

from hypothesis import example, given
from hypothesis import strategies as st

from manylora.server.engine.request import FinishReason, SamplingParams
from manylora.server.engine.stop import StopChecker

EOS = 99


def _oracle(text: str, stops: list[str], earliest_end: int) -> tuple[str, str | None]:
    """The text before the stop string that is complete first (the longest, if several)."""
    for end in range(max(earliest_end, 1), len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(
    st.lists(st.text("ab<", max_size=3), max_size=12),
    st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
    st.integers(0, 6),
)
@example(["a", "b", "b"], ["abb", "b"], 0)
def test_stop_strings_as_if_the_text_were_whole(pieces: list[str], stops: list[str], min_tokens: int) -> None:
    checker = StopChecker(
        SamplingParams(stop=tuple(stops), min_tokens=min_tokens, max_tokens=100), frozenset({EOS})
    )
    shown, reason = "", None
    for piece in pieces:
        decision = checker.push(1, piece)
        shown += decision.text
        if decision.finish_reason is not None:
            reason = decision.stop_reason
            break
    shown += checker.flush().text
    # Text of tokens before the min_tokens-th can't complete a stop string.
    free = len("".join(pieces[: max(min_tokens - 1, 0)])) + 1
    assert (shown, reason) == _oracle("".join(pieces), stops, free)


@given(
    st.lists(st.text("ab", max_size=3), max_size=10),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_what_was_shown_is_never_taken_back(pieces: list[str], stops: list[str]) -> None:
    checker = StopChecker(SamplingParams(stop=tuple(stops), max_tokens=100), frozenset())
    final, _ = _oracle("".join(pieces), stops, 0)
    shown = ""
    for piece in pieces:
        decision = checker.push(1, piece)
        shown += decision.text
        assert final.startswith(shown)
        if decision.finish_reason:
            break


def test_eos_ends_without_text_and_lets_out_what_was_held() -> None:
    checker = StopChecker(SamplingParams(stop=("END",)), frozenset({EOS}))
    assert checker.push(1, "to the E").text == "to the "
    decision = checker.push(EOS, "<eos>")
    assert (decision.text, decision.finish_reason, decision.stop_reason) == ("E", FinishReason.STOP, None)


def test_eos_can_be_ignored_and_stop_ids_are_named() -> None:
    checker = StopChecker(SamplingParams(ignore_eos=True, stop_token_ids=(7,)), frozenset({EOS}))
    assert checker.push(EOS, "").finish_reason is None
    assert checker.push(7, "seven").stop_reason == 7


def test_min_tokens_keeps_eos_from_ending() -> None:
    checker = StopChecker(SamplingParams(min_tokens=2), frozenset({EOS}))
    assert checker.push(EOS, "").finish_reason is None
    assert checker.push(EOS, "").finish_reason is None
    assert checker.push(EOS, "").finish_reason is FinishReason.STOP


def test_max_tokens_ends_with_length_and_lets_out_what_was_held() -> None:
    checker = StopChecker(SamplingParams(stop=("xyz",), max_tokens=2), frozenset())
    assert checker.push(1, "x").text == ""
    decision = checker.push(1, "y")
    assert (decision.text, decision.finish_reason) == ("xy", FinishReason.LENGTH)


def test_nothing_follows_a_stop_string() -> None:
    checker = StopChecker(SamplingParams(stop=("!",)), frozenset())
    assert checker.push(1, "a!b").text == "a"
    assert checker.flush("more").text == ""
