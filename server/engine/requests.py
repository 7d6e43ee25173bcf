"""The requests in the engine: how they are born, how tokens become outputs, how each ends exactly once."""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from manylora.server.engine.activation import Stages
from manylora.server.engine.detokenizer import Detokenizer, TokenDecoder
from manylora.server.engine.grammar import GrammarFault, Matcher, Standing
from manylora.server.engine.health import Health
from manylora.server.engine.logits import SamplerState
from manylora.server.engine.observer import EndedRequest, EngineObserver
from manylora.server.engine.pieces import Piece, output_of
from manylora.server.engine.pooling import PooledStates
from manylora.server.engine.prompt_logprobs import LogprobRows, PromptLogprobs
from manylora.server.engine.request import (
    FinishReason,
    GenerationRequest,
    SequenceOutput,
    TokenLogprobs,
    Vector,
)
from manylora.server.engine.sampler import NOT_FINITE
from manylora.server.engine.scheduler import Scheduler
from manylora.server.engine.sequence import LiveRequest, Sequence, SequenceStatus, TextState
from manylora.server.engine.stop import StopChecker
from manylora.server.errors import GrammarFailed, NotFinite, StepFailed
from manylora.server.kernels.sampling import UNTOLD

log = logging.getLogger(__name__)
OUTCOMES = {FinishReason.ABORTED: "aborted", FinishReason.FAILED: "failed"}
AHEAD = 4
"""Further choices of a request that wait as sequences at most; the others are a number until their turn is near."""


class LiveRequests:
    """All requests that have not ended, and the outputs of the step under way."""

    def __init__(
        self,
        live: dict[str, LiveRequest],
        scheduler: Scheduler,
        decoder: TokenDecoder,
        eos_ids: frozenset[int],
        observer: EngineObserver,
        health: Health,
    ) -> None:
        """``live`` is changed here only; the scheduler sees in it who has begun."""
        self._live = live
        self._scheduler = scheduler
        self._decoder = decoder
        self._eos_ids = eos_ids
        self._observer = observer
        self._health = health
        self._growing: dict[str, LiveRequest] = {}
        """Requests whose prompt is computed and whose choices are not all made."""
        self._pieces: list[Piece | SequenceOutput] = []
        self._gaps: list[float] = []
        self._born = 0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._live.values()))

    def get(self, request_id: str) -> LiveRequest | None:
        """Return a request that has not ended."""
        return self._live.get(request_id)

    def take_pieces(self) -> list[Piece | SequenceOutput]:
        """Return what has come out since the last call; ``output_of`` makes outputs of pieces, on any thread."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def take_outputs(self) -> list[SequenceOutput]:
        """Return the outputs since the last call."""
        outputs: list[SequenceOutput] = []
        while pieces := self.take_pieces():
            for piece in pieces:
                output, fault = output_of(piece)
                outputs.append(output)
                if fault is not None:
                    self.fail_text(output, fault)
        return outputs

    def fail_text(self, told: SequenceOutput, fault: StepFailed) -> None:
        """End a request of which no text can be made; ``told`` is what the choice that it was found in was told."""
        live = self._live.get(told.request_id)
        if live is None:
            return
        before = len(self._pieces)
        self.end(live, FinishReason.FAILED, fault)
        others = [piece for piece in self._pieces[before:] if output_of(piece)[0].index != told.index]
        self._pieces[before:] = others

    def fail_grammar(self, live: LiveRequest, fault: GrammarFault) -> None:
        """End a request whose grammar can't go on; who asks for it again has it compiled anew."""
        if live.request.grammar is not None:
            live.request.grammar.broken = True
        what = f"the answer can't be held to its grammar any further: {fault}; give a simpler one"
        self.end(live, FinishReason.FAILED, GrammarFailed(what))

    def step_ended(self) -> None:
        """Tell the observer how long streams waited for the step's tokens."""
        if self._gaps:
            gaps, self._gaps = self._gaps, []
            self._observer.token_gaps(gaps)

    @property
    def num_unmade(self) -> int:
        """Choices that wait and are not yet sequences. Callable from any thread."""
        return sum(live.num_unmade for live in list(self._live.values()))

    def add(self, request: GenerationRequest, stages: Stages) -> None:
        """Queue a request: its first choice now, the others once that has computed the prompt."""
        live = LiveRequest(request, request.n, stages, arrived=request.arrival_time or time.monotonic())
        first = self._make(live)
        self._live[request.request_id] = live
        self._scheduler.add(first)

    def make_choices(self) -> None:
        """Queue further choices of the requests whose prompt is computed, a few at a time."""
        for live in list(self._growing.values()):
            try:
                waiting = sum(s.status is SequenceStatus.WAITING for s in live.sequences[-AHEAD:])
                for _ in range(min(live.num_unmade, AHEAD - waiting)):
                    self._scheduler.add(self._make(live))
            except Exception as error:
                log.error("a choice of request %s could not be made", live.request.request_id, exc_info=error)
                what = f"a choice of this request could not be made: {type(error).__name__}"
                self.end(live, FinishReason.FAILED, StepFailed(what))
            if not live.num_unmade:
                self._growing.pop(live.request.request_id, None)

    def _make(self, live: LiveRequest) -> Sequence:
        request, index = live.request, len(live.sequences)
        decoder = self._decoder if request.decoder is None else request.decoder
        eos_ids = self._eos_ids if request.eos_ids is None else request.eos_ids
        sampling = request.sampling
        if request.grammar is not None:
            sampling = replace(sampling, min_tokens=0)  # its matcher says when an answer may end
        text = TextState(
            SamplerState(sampling, request.prompt_token_ids, index, eos_ids),
            Detokenizer(decoder, request.prompt_token_ids),
            StopChecker(request.sampling, eos_ids),
            _matcher(request, eos_ids),
        )
        self._born += 1
        sequence = Sequence(self._born, index, live, text)
        live.sequences.append(sequence)
        return sequence

    def refuse(self, request: GenerationRequest, error: Exception) -> None:
        """Fail a request that was never queued."""
        for index in range(request.n):
            self._pieces.append(_last_output(request.request_id, index, FinishReason.FAILED, error))
        if isinstance(error, StepFailed):
            self._health.request_failed(request, time.monotonic())
        if self._health.is_probe(request):
            return
        waited = max(0.0, time.monotonic() - request.arrival_time) if request.arrival_time else 0.0
        prompt = len(request.prompt_token_ids)
        self._observer.request_ended(
            EndedRequest(request.adapter_label, "failed", None, None, waited, prompt, 0)
        )

    def take_prompt_logprobs(self, sequence: Sequence, start: int, found: LogprobRows) -> None:
        """Keep what a chunk of the prompt told; a prompt that starts again starts anew."""
        live = sequence.owner
        if start == 0:
            live.prompt_logprobs = PromptLogprobs()
        live.prompt_logprobs.add(found)

    def take_states(self, sequence: Sequence, start: int, states: Vector | None) -> None:
        """Pool what a chunk told, and end the request with its prompt; one that starts again is pooled anew."""
        live = sequence.owner
        assert sequence.pooling is not None
        if live.pooled is None or start <= sequence.pooled_from:
            live.pooled = PooledStates(sequence.pooling)
        if states is not None and len(states):
            live.pooled.add(states)
        if sequence.num_to_compute:
            return
        pooled = live.pooled.result()
        if not np.isfinite(pooled).all():
            self.end(live, FinishReason.FAILED, NotFinite(NOT_FINITE.message))
            return
        request, count = live.request, sequence.num_prompt_tokens
        done = SequenceOutput(
            request.request_id, 0, "", (), finish_reason=FinishReason.STOP, prompt_tokens=count
        )
        self._pieces.append(replace(done, cached_tokens=sequence.num_cached_tokens, pooled=pooled))
        self._end(sequence, FinishReason.STOP)

    def take_token(
        self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None, now: float
    ) -> None:
        """Take in a sampled token and those that must follow it. Raises GrammarFault."""
        self._note_time(sequence, now)
        self._append(sequence, token_id, logprobs)
        matcher = sequence.text.grammar
        # What is told of a token takes its logits.
        if matcher is None or sequence.told != UNTOLD or sequence.status is SequenceStatus.FINISHED:
            return
        for forced in matcher.forced():
            self._append(sequence, forced, None)
            if sequence.finish_reason is not None:
                return

    def _append(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Append a token, let it out, and end the sequence if it is over."""
        live, text = sequence.owner, sequence.text
        sequence.token_ids.append(token_id)
        sequence.wants_prompt_logprobs = False
        text.sampler.append(token_id)
        standing = Standing.OPEN if text.grammar is None else text.grammar.take(token_id)
        if text.stop.reads_text:
            emitted, finish, stop_reason = self._stopped(sequence, token_id, standing)
        else:
            emitted = None
            finish, stop_reason = text.stop.push_id(token_id, standing)
        if live.num_unmade:
            self._growing[live.request.request_id] = live
        told = None
        if not sequence.reported:
            sequence.reported = True
            if live.request.sampling.prompt_logprobs is not None:
                told = live.prompt_logprobs
        count = sequence.num_output_tokens
        silent = text.stop.ended_by_id
        self._pieces.append(
            Piece(sequence, token_id, count, emitted, finish, stop_reason, logprobs, told, silent)
        )
        if finish is not None:
            self._end(sequence, finish)

    @staticmethod
    def _stopped(
        sequence: Sequence, token_id: int, standing: Standing
    ) -> tuple[str, FinishReason | None, str | int | None]:
        """Return the text that a token completes, and how it ends its sequence if it does, where text decides."""
        text = sequence.text
        decision = text.stop.push(token_id, text.detokenizer.push(token_id), standing)
        if decision.finish_reason is None:
            return decision.text, None, None
        rest = text.stop.flush(text.detokenizer.flush())
        ends = decision if rest.finish_reason is None else rest
        return decision.text + rest.text, ends.finish_reason, ends.stop_reason

    def end(self, live: LiveRequest, reason: FinishReason, error: Exception | None) -> None:
        """End every choice that has not ended, made or not; ``error`` is what its client is told."""
        if isinstance(error, StepFailed):
            self._health.request_failed(live.request, time.monotonic())
        unmade = range(len(live.sequences), live.choices)
        live.choices = len(live.sequences)
        for index in [*(sequence.index for sequence in live.live), *unmade]:
            self._pieces.append(_last_output(live.request.request_id, index, reason, error))
        for sequence in live.live:
            self._end(sequence, reason)
        self._close(live, reason)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._scheduler.end(sequence, reason)
        if not sequence.owner.num_unmade and not sequence.owner.live:
            self._close(sequence.owner, reason)

    def _close(self, live: LiveRequest, reason: FinishReason) -> None:
        if self._live.pop(live.request.request_id, None) is None:
            return
        self._growing.pop(live.request.request_id, None)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._health.request_finished(live.request)
        if self._health.is_probe(live.request):
            return
        now = time.monotonic()
        self._observer.request_ended(
            EndedRequest(
                live.request.adapter_label,
                OUTCOMES.get(reason, "finished"),
                None if live.admitted is None else live.admitted - live.arrived,
                None if live.first_token is None else live.first_token - live.arrived,
                now - live.arrived,
                len(live.request.prompt_token_ids),
                sum(each.num_output_tokens for each in live.sequences),
            )
        )

    def _note_time(self, sequence: Sequence, now: float) -> None:
        if sequence.owner.first_token is None:
            sequence.owner.first_token = now
        if sequence.last_token is not None:
            self._gaps.append(now - sequence.last_token)
        sequence.last_token = now


def _matcher(request: GenerationRequest, eos_ids: frozenset[int]) -> Matcher | None:
    if request.grammar is None:
        return None
    sampling = request.sampling
    ends = {*sampling.stop_token_ids, *sampling.stop_names, *(() if sampling.ignore_eos else eos_ids)}
    return request.grammar.matcher(ends, sampling.min_tokens)


def _last_output(
    request_id: str, index: int, reason: FinishReason, error: Exception | None
) -> SequenceOutput:
    return SequenceOutput(request_id, index, "", (), finish_reason=reason, error=error)
