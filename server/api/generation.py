"""From checked requests to the engine and back: prompts to streams, streams to choices."""

import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from uuid import uuid4

from manylora.server.api.asked_models import resolve, text_of
from manylora.server.api.dependencies import ApiDependencies, ApiSettings, OutputStream
from manylora.server.api.prompts import check_token_ids, context_exceeded
from manylora.server.api.request_context import note, request_id
from manylora.server.api.schemas import SamplingFields
from manylora.server.catalog import ResolvedModel
from manylora.server.engine.grammar import Grammar
from manylora.server.engine.request import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceOutput,
    TokenLogprobs,
)
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
from manylora.server.tokenizer import ModelText


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, in OpenAI's shape."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def to_json(self) -> dict[str, object]:
        """Return the usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    last: SequenceOutput | None = None

    def add(self, output: SequenceOutput) -> None:
        """Take in what one step added."""
        self.text.append(output.text)
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.finish_reason, self.stop_reason, self.last = output.finish_reason, output.stop_reason, output


@dataclass(frozen=True, slots=True)
class Generation:
    """A client's request under way: one engine request per prompt, n choices each."""

    stream: OutputStream
    prompts: tuple[tuple[int, ...], ...]
    n: int
    model: ResolvedModel
    """What the request's model meant when it began."""
    text: ModelText
    """What the model's texts are made with."""
    _failed: list[Exception] = field(default_factory=list)
    """What ended it, once it is to be told."""

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
        choices = [Choice() for _ in range(self.n * len(self.prompts))]
        try:
            while (outputs := await self.take()) is None or outputs:
                for index, output in outputs or ():
                    choices[index].add(output)
        finally:
            self.abort()
            self.note_tokens([choice.last for choice in choices])
        return choices

    def note_tokens(self, last: Sequence[SequenceOutput | None]) -> None:
        """Have the request's log line say how many tokens came in and were made, however it ended."""
        made = sum(output.completion_tokens for output in last if output is not None)
        note(prompt_tokens=sum(map(len, self.prompts)), completion_tokens=made)

    def abort(self) -> None:
        """Free what the engine still holds."""
        self.stream.abort()


async def begin(
    deps: ApiDependencies,
    fields: SamplingFields,
    tokenise: Callable[[ResolvedModel, ModelText], Awaitable[Sequence[Sequence[int]]]],
    sampling: SamplingParams,
    grammar: Grammar | None = None,
) -> Generation:
    """Count the choices, resolve the model, tokenise for it, and queue the prompts; answers are held to ``grammar``.

    If an adapter is replaced while the prompts are tokenised, all of that begins again with the new version.
    """
    check_choices(fields, deps.settings)
    while True:
        model = resolve(deps, fields.model, fields)
        try:
            text = await text_of(deps, model, fields)
            stopping = replace(sampling, stop_names=text.stops(sampling.stop))
            prompts = await tokenise(model, text)
            return start(deps, fields, model, text, prompts, stopping, grammar)
        except (ModelNotFound, AdapterUnavailable):
            # A deleted name doesn't resolve any more, and the error then names those that do.
            if resolve(deps, fields.model, fields).adapters == model.adapters:
                raise


def check_choices(fields: SamplingFields, settings: ApiSettings) -> None:
    """Refuse more answers than one request may ask for. Raises InvalidRequest with the numbers."""
    if fields.n > settings.max_choices:
        raise InvalidRequest(f"n is {fields.n}, at most {settings.max_choices} are served", param="n")
    asked = fields.num_prompts * fields.n
    if asked > settings.max_sequences:
        raise InvalidRequest(
            f"{fields.num_prompts} prompts with n = {fields.n} are {asked} answers, at most "
            f"{settings.max_sequences} are given to one request: send several",
            param="n",
        )


def start(
    deps: ApiDependencies,
    fields: SamplingFields,
    model: ResolvedModel,
    text: ModelText,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    grammar: Grammar | None = None,
) -> Generation:
    """Check what only the tokens tell, and queue the prompts: all of them or none."""
    _check_prompt_logprobs(fields, prompts, sampling, deps.settings.max_prompt_logprobs)
    arrival = time.monotonic()
    # A client may send one request id twice; the engine's are its own.
    own = f"{request_id()}-{uuid4().hex[:8]}"
    requests = [
        GenerationRequest(
            request_id=f"{own}-{index}",
            prompt_token_ids=tuple(prompt),
            sampling=bounded(sampling, len(prompt), deps.settings.context_length),
            adapters=model.adapters,
            adapter_label=model.label,
            decoder=text.vocabulary,
            eos_ids=text.eos_ids,
            n=fields.n,
            arrival_time=arrival,
            origin=own,
            grammar=grammar,
        )
        for index, prompt in enumerate(prompts)
    ]
    stream = deps.engine.submit_together(requests)
    deps.metrics.by_adapter.count_parts([part.name for part in model.parts if part.weight], len(requests))
    asked = tuple(request.prompt_token_ids for request in requests)
    return Generation(stream, asked, fields.n, model, text)


def _check_prompt_logprobs(
    fields: SamplingFields, prompts: Sequence[Sequence[int]], sampling: SamplingParams, most: int
) -> None:
    """Refuse a report on prompts that would take more memory and time than one request may.

    Each choice repeats its prompt's, and of each token its own and those of the best are told.
    """
    if sampling.prompt_logprobs is None:
        return
    tokens, each = sum(map(len, prompts)) * fields.n, sampling.prompt_logprobs + 1
    if tokens * each > most:
        raise InvalidRequest(
            f"echo with logprobs {sampling.prompt_logprobs} on {tokens} prompt tokens (prompts times n) tells "
            f"{tokens * each} log probabilities, at most {most} are told in one answer: send several requests, or "
            "ask for fewer logprobs",
            param="logprobs",
        )


_TOKEN_ID = re.compile("0|[1-9][0-9]{0,11}")
"""A token id as logit_bias names it; Python itself refuses to read numbers of thousands of digits."""
UNBOUNDED = -1
"""max_tokens of a request that named none: as many as the context holds."""


def bounded(sampling: SamplingParams, prompt: int, context: int) -> SamplingParams:
    """Return the parameters with max_tokens that fit. Raises ContextLengthExceeded with the three numbers."""
    if prompt == 0:
        raise InvalidRequest("the prompt is empty", param="prompt")
    unbounded = sampling.max_tokens == UNBOUNDED
    asked = max(1, context - prompt) if unbounded else sampling.max_tokens
    if prompt + asked > context:
        raise context_exceeded(prompt, None if unbounded else asked, context)
    return replace(sampling, max_tokens=asked)


def sampling_params(
    fields: SamplingFields,
    vocab_size: int,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Return the engine's parameters; token ids are checked against the vocabulary here."""
    limit = UNBOUNDED if max_tokens is None else max_tokens
    if max_tokens is not None and fields.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {fields.min_tokens}, over max_tokens {max_tokens}", param="min_tokens"
        )
    check_token_ids(fields.stop_token_ids, vocab_size, "stop_token_ids")
    return SamplingParams(
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=max(0, fields.top_k),
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=_logit_bias(fields.logit_bias, vocab_size),
        seed=fields.seed,
        stop=fields.stops,
        stop_token_ids=tuple(fields.stop_token_ids),
        ignore_eos=fields.ignore_eos,
        min_tokens=fields.min_tokens,
        max_tokens=limit,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    # Digits of other scripts and leading zeros would be second names of one id: the last of them would win.
    wrong = next((token for token in bias if not _TOKEN_ID.fullmatch(token)), None)
    if wrong is not None:
        raise InvalidRequest(f"logit_bias: {wrong[:40]!r} is not a token id", param="logit_bias")
    by_id = {int(token): value for token, value in bias.items()}
    check_token_ids(tuple(by_id), vocab_size, "logit_bias")
    return by_id


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


def usage_of(last: Sequence[SequenceOutput | None], n: int) -> Usage:
    """Add up the tokens of all choices; a prompt counts once for its n choices."""
    done = [output for output in last if output is not None]
    firsts = [output for index, output in enumerate(last) if output is not None and index % n == 0]
    return Usage(
        sum(output.prompt_tokens for output in firsts),
        sum(output.completion_tokens for output in done),
        sum(output.cached_tokens for output in firsts),
    )
