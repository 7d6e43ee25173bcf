"""From checked requests to the engine and back: prompts to streams, streams to choices."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from uuid import uuid4

from manylora.adapters.names import AUTO
from manylora.server.api.asked_models import found, resolve, text_of
from manylora.server.api.asks import Ask, check_ids
from manylora.server.api.calling import behind, current_caller
from manylora.server.api.choices import CALLED, Choice
from manylora.server.api.choosing import choose, is_still_there
from manylora.server.api.dependencies import ApiDependencies, ApiSettings, OutputStream
from manylora.server.api.held import grammar_of
from manylora.server.api.prompts import Tokenised, tokenise
from manylora.server.api.request_context import note, request_id
from manylora.server.api.reserving import reserve
from manylora.server.catalog import ResolvedModel
from manylora.server.chat.reading import Reading
from manylora.server.engine.grammar import CompiledGrammar
from manylora.server.engine.request import FinishReason, GenerationRequest, SequenceOutput
from manylora.server.errors import (
    AdapterUnavailable,
    InvalidRequest,
    MixtureRefused,
    ModelNotFound,
    NotFinite,
    ServerError,
    ShuttingDown,
    StepFailed,
)
from manylora.server.tenants.account import Reservation
from manylora.server.tenants.caller import OPEN
from manylora.server.tokenizer import ModelText


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, in OpenAI's shape."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int | None = None
    """None: none of the answers may hold any."""

    def to_json(self) -> dict[str, object]:
        """Return the usage object."""
        thought = (
            {}
            if self.reasoning is None
            else {"completion_tokens_details": {"reasoning_tokens": self.reasoning}}
        )
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            **thought,
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """A client's request under way: one engine request per prompt, n choices each."""

    stream: OutputStream
    ask: Ask
    model: ResolvedModel
    """What the request's model meant when it began."""
    text: ModelText
    """What the model's texts are made with."""
    prompts: tuple[tuple[int, ...], ...]
    echoed: tuple[str, ...] = ()
    """The prompts as they were sent, if they are to be told again."""
    reading: Reading = field(default_factory=Reading)
    """How each of its answers is read."""
    reservation: Reservation | None = None
    """What it may use of its key's tokens."""
    _failed: list[Exception] = field(default_factory=list)
    """What ended it, once it is to be told."""

    def choices(self) -> list[Choice]:
        """Return the answers before anything has come of them, those of the first prompt first."""
        # OpenAI's own way: who names a tool hears of an answer that stopped, who leaves the choice that it called.
        after = FinishReason.STOP.value if self.reading.use.named else CALLED
        count = self.ask.n * len(self.prompts)
        return [Choice(self.reading.parser(), after, self.ask.by_token) for _ in range(count)]

    async def take(self) -> Sequence[tuple[int, SequenceOutput]] | None:
        """Return what has come since the last call as (choice index, output); nothing: all is there.

        None: somebody nudged. Raises what ended a choice wrongly, once all before it has been returned. Whoever takes
        calls ``abort`` at the end, however it ends.
        """
        if self._failed:
            raise self._failed[0]
        outputs = await self.stream.take()
        for place, (_, output) in enumerate(outputs or ()):
            error = _error_of(output, self.model)
            if error is not None and outputs and place:
                self._failed.append(error)
                return outputs[:place]
            if error is not None:
                raise error
        return outputs

    async def collect(self) -> list[Choice]:
        """Return all choices when they are complete."""
        choices = self.choices()
        try:
            while (outputs := await self.take()) is None or outputs:
                for index, output in outputs or ():
                    choices[index].add(output)
        finally:
            self.abort()
            self.note_tokens()
        return choices

    def note_tokens(self) -> None:
        """Have the log line and the key's account say how many tokens came in and were made, however it ended.

        Those count too that nobody has read: they were computed.
        """
        made = self.stream.made
        asked = sum(map(len, self.prompts))
        note(prompt_tokens=asked, completion_tokens=made)
        if self.reservation is not None:
            self.reservation.settle(asked + made)

    def abort(self) -> None:
        """Free what the engine still holds."""
        self.stream.abort()


async def begin(deps: ApiDependencies, ask: Ask) -> Generation:
    """Count the choices, choose the model if that is left to us, and begin with it.

    If the adapter that was chosen is deleted before it began, another is chosen.
    """
    check_choices(ask, deps.settings)
    _check_priority(ask.priority)
    if ask.model != AUTO or ask.pooling is not None:
        return await _begin(deps, ask)
    while True:
        chosen = await choose(deps, ask)
        try:
            return await _begin(deps, chosen)
        except (ModelNotFound, AdapterUnavailable):
            if is_still_there(deps, chosen.routed):
                raise


async def _begin(deps: ApiDependencies, ask: Ask) -> Generation:
    """Resolve the model, tokenise for it, and queue the prompts.

    If an adapter is replaced while the prompts are tokenised, all of that begins again with the new version.
    """
    # Whoever doesn't say who it is gets the canary by chance, and the same version when this begins again.
    asker = ask.beside.asker or uuid4().hex
    while True:
        model = replace(await found(deps, ask.model, ask.beside, asker=asker), routed=ask.routed)
        deps.engine.prefetch(adapter_id for adapter_id, _ in model.adapters)
        try:
            text = await text_of(deps, model, ask.beside)
            check_ids(ask.sampling, text.own_size or deps.settings.vocab_size)
            stopping = replace(ask.sampling, stop_names=text.stops(ask.sampling.stop))
            prompts = await tokenise(deps, ask, model, text)
            grammar = await grammar_of(deps, ask, prompts, text)
            sampling, reservation = await reserve(deps, ask, prompts.ids, stopping)
            with _given_back(reservation):
                held = replace(ask, sampling=sampling)
                return _start(deps, held, model, text, prompts, grammar, reservation)
        except (ModelNotFound, AdapterUnavailable):
            # A deleted name doesn't resolve any more, and the error then names those that do.
            if resolve(deps, ask.model, ask.beside, asker=asker).adapters == model.adapters:
                raise


def _check_priority(asked: int) -> None:
    """Refuse a priority that is more urgent than the caller's may be. Raises InvalidRequest."""
    caller = current_caller()
    if asked < caller.priority:
        whom = "may be asked for on a server without keys" if caller == OPEN else "this key may ask for"
        raise InvalidRequest(
            f"priority is {asked}, the most urgent that {whom} is {caller.priority}: less is sooner",
            param="priority",
        )


@contextmanager
def _given_back(reservation: Reservation | None) -> Iterator[None]:
    """Take what was reserved back if nothing could be queued."""
    try:
        yield
    except BaseException:
        if reservation is not None:
            reservation.settle(0)
        raise


def check_choices(ask: Ask, settings: ApiSettings) -> None:
    """Refuse more answers than one request may ask for. Raises InvalidRequest with the numbers."""
    if ask.pooling is not None:
        return  # nothing is made
    if ask.n > settings.max_choices:
        raise InvalidRequest(f"n is {ask.n}, at most {settings.max_choices} are served", param="n")
    asked = ask.num_prompts * ask.n
    if asked > settings.max_sequences:
        raise InvalidRequest(
            f"{ask.num_prompts} prompts with n = {ask.n} are {asked} answers, at most "
            f"{settings.max_sequences} are given to one request: send several",
            param="n",
        )


def _start(
    deps: ApiDependencies,
    ask: Ask,
    model: ResolvedModel,
    text: ModelText,
    prompts: Tokenised,
    grammar: CompiledGrammar | None,
    reservation: Reservation | None,
) -> Generation:
    """Check what only the tokens tell, and queue the prompts: all of them or none."""
    _check_prompt_logprobs(ask, prompts.ids, deps.settings.max_prompt_logprobs)
    # A client may send one request id twice; the engine's are its own.
    own = f"{request_id()}-{uuid4().hex[:8]}"
    caller, arrival = current_caller(), time.monotonic()
    requests = [
        GenerationRequest(
            request_id=f"{own}-{index}",
            prompt_token_ids=tuple(prompt),
            sampling=ask.sampling,
            adapters=model.adapters,
            adapter_label=model.label,
            decoder=text.vocabulary.spelling(prompts.reading.marks),
            eos_ids=text.eos_ids | prompts.ends,
            vocab_size=text.own_size,
            n=ask.n,
            arrival_time=arrival,
            origin=own,
            grammar=grammar,
            pooling=None if ask.pooling is None else ask.pooling(model),
            tenant=caller.tenant,
            weight=caller.weight,
            share=deps.settings.shares.get(model.label, 1.0),
            priority=ask.priority + behind(),
            cache_scope="" if deps.settings.share_prefixes else caller.tenant,
        )
        for index, prompt in enumerate(prompts.ids)
    ]
    stream = deps.engine.submit_together(requests)
    _count(deps, model, len(requests))
    asked = tuple(request.prompt_token_ids for request in requests)
    return Generation(stream, ask, model, text, asked, prompts.echoed, prompts.reading, reservation)


def _count(deps: ApiDependencies, model: ResolvedModel, requests: int) -> None:
    deps.catalog.usage.count(model, requests)
    deps.metrics.by_adapter.count_queued(model, requests)


def _check_prompt_logprobs(ask: Ask, prompts: Sequence[Sequence[int]], most: int) -> None:
    """Refuse a report on prompts that would take more memory and time than one request may.

    Each choice repeats its prompt's, and of each token its own and those of the best are told.
    """
    told = ask.sampling.prompt_logprobs
    if told is None:
        return
    tokens, each = sum(map(len, prompts)) * ask.n, told + 1
    if tokens * each > most:
        raise InvalidRequest(
            f"echo with logprobs {told} on {tokens} prompt tokens (prompts times n) tells "
            f"{tokens * each} log probabilities, at most {most} are told in one answer: send several requests, or "
            "ask for fewer logprobs",
            param="logprobs",
        )


def _error_of(output: SequenceOutput, model: ResolvedModel) -> Exception | None:
    """Return what a choice that ended wrongly is answered with."""
    if output.finish_reason is FinishReason.FAILED:
        if isinstance(output.error, NotFinite) and any(abs(weight) > 1 for _, weight in model.adapters):
            return MixtureRefused(
                "with these weights, what the model computes for this request is not finite: give smaller ones"
            )
        return output.error if output.error is not None else StepFailed("the request failed in the engine")
    if output.finish_reason is FinishReason.ABORTED:
        told = isinstance(output.error, ServerError)
        return output.error if told else ShuttingDown("the request was ended by the server")
    return None


def usage_of(choices: Sequence[Choice], n: int) -> Usage:
    """Add up the tokens of all choices; a prompt counts once for its n choices."""
    last = [choice.last for choice in choices]
    thought = [choice.thought for choice in choices if choice.thought is not None]
    done = [output for output in last if output is not None]
    firsts = [output for index, output in enumerate(last) if output is not None and index % n == 0]
    return Usage(
        sum(output.prompt_tokens for output in firsts),
        sum(output.completion_tokens for output in done),
        sum(output.cached_tokens for output in firsts),
        sum(thought) if thought else None,
    )
