"""POST /v1/chat/completions."""

import asyncio
import time
from dataclasses import dataclass
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from manylora.server.api.asked_models import told_parts, with_parts
from manylora.server.api.auth import require_api_key
from manylora.server.api.body import read_body
from manylora.server.api.dependencies import dependencies
from manylora.server.api.disconnect import done_within, unless_gone
from manylora.server.api.generation import Choice, Generation, begin, sampling_params, usage_of
from manylora.server.api.logprobs import chat_logprobs
from manylora.server.api.openapi import body_of
from manylora.server.api.prompts import chat_prompt
from manylora.server.api.rendering import dumps, json_response
from manylora.server.api.schemas import ChatRequest
from manylora.server.api.streaming import Events, event_stream
from manylora.server.catalog import ResolvedModel
from manylora.server.engine.request import SequenceOutput
from manylora.server.tokenizer import ModelText, Vocabulary

router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """Answer a chat, as one JSON object or as a stream of chunks."""
    deps = dependencies(request)
    body = await read_body(request, ChatRequest)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_params(
        body, deps.settings.vocab_size, max_tokens=body.asked_tokens, logprobs=logprobs
    )

    async def tokenise(model: ResolvedModel, text: ModelText) -> list[list[int]]:
        return [await chat_prompt(deps, body, model, text)]

    generation = await unless_gone(request, begin(deps, body, tokenise, sampling))
    vocabulary, model = generation.text.vocabulary, generation.model
    answer = ChatAnswer(body, vocabulary, told_parts(model), f"chatcmpl-{uuid4().hex}", int(time.time()))
    if body.stream:
        events = answer.chunks(generation)
        return with_parts(await event_stream(request, events, deps.settings.keep_alive_seconds), model)
    choices = asyncio.ensure_future(generation.collect())
    await done_within(request, choices)
    done = choices.result()
    large = body.logprobs
    whole = await json_response(lambda: answer.whole(done, at_once=not large), deps.rests if large else None)
    return with_parts(whole, model)


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """One answer in the making: what all of its chunks share."""

    body: ChatRequest
    vocabulary: Vocabulary
    parts: dict[str, object]
    """What is told of a mixture's parts: by the answer, or by a stream's first chunk."""
    identity: str
    created: int

    def whole(self, choices: list[Choice], *, at_once: bool) -> dict[str, object]:
        """Return the answer as one object; its choices are made ``at_once``, or as they are written."""
        made = (self._choice(index, choice) for index, choice in enumerate(choices))
        return {
            **self._head("chat.completion"),
            **self.parts,
            "choices": list(made) if at_once else made,
            "usage": usage_of([choice.last for choice in choices], self.body.n).to_json(),
        }

    async def chunks(self, generation: Generation) -> Events:
        """Yield the answer as chunks: each choice's role first, then what each step adds."""
        parts = self.parts
        last: list[SequenceOutput | None] = [None] * self.body.n
        try:
            async for step in generation.steps():
                for index, output in step:
                    if last[index] is None:
                        yield self._chunk(index, {"role": "assistant", "content": ""}, None, None, parts)
                        parts = {}
                    last[index] = output
                    event = self._delta(index, output)
                    if event is not None:
                        yield event
            if self.body.wants_usage:
                usage = usage_of(last, self.body.n).to_json()
                yield dumps({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})
        finally:
            generation.abort()
            generation.note_tokens(last)

    def _delta(self, index: int, output: SequenceOutput) -> str | None:
        if not output.text and not output.logprobs and output.finish_reason is None:
            return None  # held back for a stop string or half a character
        delta = {"content": output.text} if output.text else {}
        logprobs = chat_logprobs(output.logprobs, self.vocabulary) if self.body.logprobs else None
        finish = None if output.finish_reason is None else output.finish_reason.value
        return self._chunk(index, delta, logprobs, finish)

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: dict[str, object] | None,
        finish: str | None,
        parts: dict[str, object] | None = None,
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._head("chat.completion.chunk"), **(parts or {}), "choices": [choice]}
        return dumps({**chunk, "usage": None} if self.body.wants_usage else chunk)

    def _choice(self, index: int, choice: Choice) -> dict[str, object]:
        assert choice.finish_reason is not None, "the engine ends every choice"
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": chat_logprobs(choice.logprobs, self.vocabulary) if self.body.logprobs else None,
            "finish_reason": choice.finish_reason.value,
            "stop_reason": choice.stop_reason,
        }

    def _head(self, kind: str) -> dict[str, object]:
        return {
            "id": self.identity,
            "object": kind,
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": None,
        }
