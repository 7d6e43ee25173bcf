"""POST /v1/completions: texts or token ids, one prompt or several, echoed if asked."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server.api.auth import require_api_key
from server.api.body import read_body
from server.api.chat import CLIENT_GONE
from server.api.dependencies import ApiDependencies, dependencies
from server.api.generation import (
    Choice,
    Generation,
    check_token_ids,
    sampling_params,
    start,
    unless_disconnected,
    usage_of,
)
from server.api.logprobs import completion_logprobs
from server.api.openapi import body_of
from server.api.request_context import request_id
from server.api.schemas import CompletionRequest
from server.api.streaming import dumps, event_stream, first_event
from server.engine.request import SequenceOutput, TokenLogprobs
from server.errors import InvalidRequest

router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])
DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
async def completions(request: Request) -> Response:
    """Continue each prompt, as one JSON object or as a stream of chunks."""
    deps = dependencies(request)
    body = await read_body(request, CompletionRequest)
    model = deps.catalog.resolve(body.model)
    prompts = await asyncio.to_thread(_encode, deps, body)
    asked = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = sampling_params(
        body,
        deps.settings.vocab_size,
        # The engine always makes a token; echo alone lets go of it.
        max_tokens=max(1, asked),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    generation = start(deps, body, model, prompts, sampling)
    answer = CompletionAnswer(deps, body, generation.prompts, f"cmpl-{request_id()}", int(time.time()))
    if body.stream:
        events = await first_event(answer.chunks(generation))
        return event_stream(events, deps.settings.keep_alive_seconds)
    choices = await unless_disconnected(request, generation.collect())
    return Response(status_code=CLIENT_GONE) if choices is None else JSONResponse(answer.whole(choices))


def _encode(deps: ApiDependencies, body: CompletionRequest) -> list[Sequence[int]]:
    encoded: list[Sequence[int]] = []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            encoded.append(deps.tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens))
        else:
            check_token_ids(prompt, deps.settings.vocab_size, "prompt")
            encoded.append(prompt)
    if not all(encoded):
        raise InvalidRequest("prompt: an empty prompt can't be continued", param="prompt")
    return encoded


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """One answer in the making: what all of its chunks share."""

    deps: ApiDependencies
    body: CompletionRequest
    prompts: tuple[tuple[int, ...], ...]
    identity: str
    created: int

    @property
    def _echo_only(self) -> bool:
        return self.body.max_tokens == 0

    def whole(self, choices: list[Choice]) -> dict[str, object]:
        """Return the answer as one object."""
        done = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head(), "choices": done, "usage": self._usage([choice.last for choice in choices])}

    async def chunks(self, generation: Generation) -> AsyncIterator[str]:
        """Yield the answer as chunks; with echo, a choice's first begins with its prompt."""
        count = self.body.n * len(self.prompts)
        last: list[SequenceOutput | None] = [None] * count
        sent = [0] * count
        try:
            async for step in generation.steps():
                for index, output in step:
                    choice = Choice()
                    choice.add(output)
                    event = self._piece(index, choice, first=last[index] is None, offset=sent[index])
                    sent[index] += len(event["text"]) if isinstance(event["text"], str) else 0
                    last[index] = output
                    if event["text"] or event["logprobs"] or event["finish_reason"]:
                        yield self._event([event])
            if self.body.wants_usage:
                yield dumps({**self._head(), "choices": [], "usage": self._usage(last)})
        finally:
            generation.abort()

    def _event(self, choices: list[dict[str, object]]) -> str:
        chunk = {**self._head(), "choices": choices}
        return dumps({**chunk, "usage": None} if self.body.wants_usage else chunk)

    def _choice(self, index: int, choice: Choice) -> dict[str, object]:
        return self._piece(index, choice, first=True, offset=0)

    def _piece(self, index: int, choice: Choice, *, first: bool, offset: int) -> dict[str, object]:
        """Return a choice, whole or what a step added; its first piece carries the echoed prompt."""
        text = "" if self._echo_only else "".join(choice.text)
        ids: list[int] = [] if self._echo_only else list(choice.token_ids)
        logprobs: list[TokenLogprobs | None] = [] if self._echo_only else list(choice.logprobs)
        if self.body.echo and first:
            prompt = self.prompts[index // self.body.n]
            text = self.deps.tokenizer.decode(prompt) + text
            if choice.prompt_logprobs:
                ids, logprobs = [*prompt, *ids], [*choice.prompt_logprobs, *logprobs]
        finish = None if choice.finish_reason is None else choice.finish_reason.value
        shown = None
        if self.body.logprobs is not None and ids:
            shown = completion_logprobs(ids, logprobs, self.deps.tokenizer, offset)
        return {
            "index": index,
            "text": text,
            "logprobs": shown,
            "finish_reason": "length" if self._echo_only and finish else finish,
            "stop_reason": choice.stop_reason,
        }

    def _usage(self, last: Sequence[SequenceOutput | None]) -> dict[str, object]:
        usage = usage_of(last, self.body.n).to_json()
        if self._echo_only:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _head(self) -> dict[str, object]:
        return {
            "id": self.identity,
            "object": "text_completion",
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": None,
        }
