"""Decides after each token whether a sequence ends, and which text may be shown.

It sees token ids and text that is already decoded (detokenizer.py); it never un-says what it let out.
"""

from dataclasses import dataclass

from manylora.server.engine.grammar import Standing
from manylora.server.engine.request import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class StopDecision:
    """What a token led to: text to emit now, and how the sequence ended if it did."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or the stop token id that was hit; None for eos and for length."""


class StopChecker:
    """Watches one sequence for eos, stop ids, stop strings and max_tokens.

    The stop string that is complete first wins; of those complete at the same character, the longest. So the
    outcome does not depend on how the text is cut into tokens. Text that may be the beginning of a stop
    string is held back. Where a grammar says what a token is to the text, ids end it as that says, and stop strings as
    ever: whoever gives one wants the text cut there.
    """

    def __init__(self, params: SamplingParams, eos_ids: frozenset[int]) -> None:
        self._stops = tuple(sorted({stop for stop in params.stop if stop}, key=len, reverse=True))
        self._stop_ids = frozenset((*params.stop_token_ids, *params.stop_names))
        self._stop_names = params.stop_names
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._min_tokens = params.min_tokens
        self._max_tokens = params.max_tokens
        self._count = 0
        self._held = ""
        self._finished = False
        self._stopped_by_text = False
        self.ended_by_id = False
        """Whether the last token ended the sequence as an id: it is of no text."""

    @property
    def reads_text(self) -> bool:
        """Whether text decides, so that ``push`` must be given it; else ``push_id`` does."""
        return bool(self._stops)

    def push_id(
        self, token_id: int, standing: Standing = Standing.OPEN
    ) -> tuple[FinishReason | None, str | int | None]:
        """Take the next token where no text decides; return how it ends the sequence, and by which stop id."""
        assert not self._finished, "push after the end"
        self._count += 1
        if self._ends_by_id(token_id, standing):
            self._finished = self.ended_by_id = True
            return FinishReason.STOP, self._reason_of(token_id)
        if standing is Standing.COMPLETES:
            self._finished = True
            return FinishReason.STOP, None
        if self._count >= self._max_tokens:
            self._finished = True
            return FinishReason.LENGTH, None
        return None, None

    def push(self, token_id: int, new_text: str, standing: Standing = Standing.OPEN) -> StopDecision:
        """Take the next token and the text that it completed.

        An eos or stop id ends the sequence once ``min_tokens`` tokens came before it; its own text is not
        emitted. A stop string ends it if the token that completes it is the ``min_tokens``-th or later.
        """
        assert not self._finished, "push after the end"
        self._count += 1
        if self._ends_by_id(token_id, standing):
            self.ended_by_id = True
            return self._end(self._held, self._reason_of(token_id))
        decision = self._take(new_text)
        if decision.finish_reason is None and standing is Standing.COMPLETES:
            return self._end(decision.text + self._held, None)
        if decision.finish_reason is None and self._count >= self._max_tokens:
            self._finished = True
            text, self._held = decision.text + self._held, ""
            return StopDecision(text, FinishReason.LENGTH)
        return decision

    def flush(self, new_text: str = "") -> StopDecision:
        """Let out what is held back, after ``new_text`` (the detokenizer's last characters).

        After a stop string it gives nothing: nothing follows a stop.
        """
        if self._stopped_by_text:
            return StopDecision("")
        decision = self._take(new_text)
        text, self._held = decision.text + self._held, ""
        return StopDecision(text, decision.finish_reason, decision.stop_reason)

    def _ends_by_id(self, token_id: int, standing: Standing) -> bool:
        if standing is Standing.OPEN:
            ends = token_id in self._eos_ids or token_id in self._stop_ids
            return ends and self._count > self._min_tokens
        return standing is Standing.ENDS

    def _reason_of(self, token_id: int) -> str | int | None:
        own = token_id if token_id in self._stop_ids and token_id not in self._eos_ids else None
        return self._stop_names.get(token_id, own)

    def _end(self, text: str, reason: str | int | None) -> StopDecision:
        self._finished = True
        self._held = ""
        return StopDecision(text, FinishReason.STOP, reason)

    def _take(self, new_text: str) -> StopDecision:
        if not self._stops:
            return StopDecision(new_text)
        text = self._held + new_text
        found = self._first_match(text, len(self._held)) if self._count >= self._min_tokens else None
        if found is not None:
            start, stop = found
            self._stopped_by_text = True
            return self._end(text[:start], stop)
        cut = len(text) - self._longest_beginning(text)
        self._held = text[cut:]
        return StopDecision(text[:cut])

    def _first_match(self, text: str, known: int) -> tuple[int, str] | None:
        """Return (start, stop string) of the match that ends first, among those that end after ``known``
        characters."""
        matches = []
        for stop in self._stops:
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that is a beginning (not the whole) of a stop string."""
        for length in range(min(len(self._stops[0]) - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
