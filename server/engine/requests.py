"""The requests in the engine: how they are born, how tokens become outputs, how each ends exactly once."""

import logging
import time
from collections.abc import Iterator

from manylora.server.engine.detokenizer import Detokenizer, TokenDecoder
from manylora.server.engine.health import Health
from manylora.server.engine.logits import SamplerState
from manylora.server.engine.observer import EndedRequest, EngineObserver
from manylora.server.engine.prompt_logprobs import LogprobRows, PromptLogprobs
from manylora.server.engine.request import FinishReason, GenerationRequest, SequenceOutput
from manylora.server.engine.sampler import SampledToken
from manylora.server.engine.scheduler import Scheduler
from manylora.server.engine.sequence import LiveRequest, Sequence, SequenceStatus, TextState
from manylora.server.engine.stop import StopChecker
from manylora.server.errors import StepFailed

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
        self._last_token: dict[int, float] = {}
        self._outputs: list[SequenceOutput] = []
        self._born = 0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._live.values()))

    def get(self, request_id: str) -> LiveRequest | None:
        """Return a request that has not ended."""
        return self._live.get(request_id)

    def take_outputs(self) -> list[SequenceOutput]:
        """Return what has come out since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    @property
    def num_unmade(self) -> int:
        """Choices that wait and are not yet sequences. Callable from any thread."""
        return sum(live.num_unmade for live in list(self._live.values()))

    def add(self, request: GenerationRequest) -> None:
        """Queue a request: its first choice now, the others once that has computed the prompt."""
        live = LiveRequest(request, request.n, arrived=request.arrival_time or time.monotonic())
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
        text = TextState(
            SamplerState(request.sampling, request.prompt_token_ids, index, eos_ids),
            Detokenizer(decoder, request.prompt_token_ids),
            StopChecker(request.sampling, eos_ids),
        )
        self._born += 1
        sequence = Sequence(self._born, index, live, text)
        live.sequences.append(sequence)
        return sequence

    def refuse(self, request: GenerationRequest, error: Exception) -> None:
        """Fail a request that was never queued."""
        for index in range(request.n):
            self._outputs.append(_last_output(request.request_id, index, FinishReason.FAILED, error))
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

    def take_token(self, sequence: Sequence, sampled: SampledToken, now: float) -> None:
        """Append a sampled token, let out the text that it completes, and end the sequence if it is over."""
        live, text = sequence.owner, sequence.text
        self._note_time(sequence, now)
        sequence.token_ids.append(sampled.token_id)
        text.sampler.append(sampled.token_id)
        decision = text.stop.push(sampled.token_id, text.detokenizer.push(sampled.token_id))
        finish, stop_reason, emitted = decision.finish_reason, decision.stop_reason, decision.text
        if finish is not None:
            rest = text.stop.flush(text.detokenizer.flush())
            emitted += rest.text
            if rest.finish_reason is not None:
                finish, stop_reason = rest.finish_reason, rest.stop_reason
        if live.num_unmade:
            self._growing[live.request.request_id] = live
        self._emit(sequence, sampled, emitted, finish, stop_reason)
        if finish is not None:
            self._end(sequence, finish)

    def end(self, live: LiveRequest, reason: FinishReason, error: Exception | None) -> None:
        """End every choice that has not ended, made or not; ``error`` is what its client is told."""
        if isinstance(error, StepFailed):
            self._health.request_failed(live.request, time.monotonic())
        unmade = range(len(live.sequences), live.choices)
        live.choices = len(live.sequences)
        for index in [*(sequence.index for sequence in live.live), *unmade]:
            self._outputs.append(_last_output(live.request.request_id, index, reason, error))
        for sequence in live.live:
            self._end(sequence, reason)
        self._close(live, reason)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._scheduler.end(sequence, reason)
        self._last_token.pop(sequence.number, None)
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
        before = self._last_token.get(sequence.number)
        if before is not None:
            self._observer.token_gap(now - before)
        self._last_token[sequence.number] = now

    def _emit(
        self,
        sequence: Sequence,
        sampled: SampledToken,
        text: str,
        finish: FinishReason | None,
        stop_reason: str | int | None,
    ) -> None:
        live = sequence.owner
        first = not sequence.reported
        sequence.reported = True
        asked = live.request.sampling.prompt_logprobs is not None
        self._outputs.append(
            SequenceOutput(
                live.request.request_id,
                sequence.index,
                text,
                (sampled.token_id,),
                () if sampled.logprobs is None else (sampled.logprobs,),
                live.prompt_logprobs if first and asked else None,
                finish,
                stop_reason,
                None,
                sequence.num_prompt_tokens,
                sequence.num_output_tokens,
                sequence.num_cached_tokens,
            )
        )


def _last_output(
    request_id: str, index: int, reason: FinishReason, error: Exception | None
) -> SequenceOutput:
    return SequenceOutput(request_id, index, "", (), finish_reason=reason, error=error)
