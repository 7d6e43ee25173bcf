"""POST /v1/chat/completions."""

import asyncio
import time
from collections.abc import Sequence
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
from manylora.server.api.streaming import event, event_stream
from manylora.server.catalog import ResolvedModel
from manylora.server.engine.request import SequenceOutput
from manylora.server.tokenizer import ModelText, Vocabulary

CHUNK = "chat.completion.chunk"
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
        events = ChatEvents(answer, generation)
        return with_parts(
            await event_stream(request, generation, events, deps.settings.keep_alive_seconds), model
        )
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
            **self.head("chat.completion"),
            **self.parts,
            "choices": list(made) if at_once else made,
            "usage": usage_of([choice.last for choice in choices], self.body.n).to_json(),
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, object]:
        assert choice.finish_reason is not None, "the engine ends every choice"
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": chat_logprobs(choice.logprobs, self.vocabulary) if self.body.logprobs else None,
            "finish_reason": choice.finish_reason.value,
            "stop_reason": choice.stop_reason,
        }

    def head(self, kind: str) -> dict[str, object]:
        """Return what an answer and all of its chunks begin with."""
        return {
            "id": self.identity,
            "object": kind,
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": None,
        }


class ChatEvents:
    """The answer as chunks: each choice's role first, then what each step adds. See streaming.Events.

    What all chunks share is written once; of most of them the text alone is new.
    """

    def __init__(self, answer: ChatAnswer, generation: Generation) -> None:
        self._answer = answer
        self._generation = generation
        self._parts = answer.parts
        self._last: list[SequenceOutput | None] = [None] * answer.body.n
        self._head = answer.head(CHUNK)
        self._ends = {"usage": None} if answer.body.wants_usage else {}
        self._begins = f'data: {dumps(self._head)[:-1]},"choices":[{{"index":'
        rest = ',"usage":null}' if self._ends else "}"
        self._goes_on = f'}},"logprobs":null,"finish_reason":null}}]{rest}\n\n'

    async def of(self, outputs: Sequence[tuple[int, SequenceOutput]]) -> bytes:
        """See streaming.Events."""
        texts: list[str] = []
        for index, output in outputs:
            if self._last[index] is None:
                texts.append(
                    self._chunk(index, {"role": "assistant", "content": ""}, None, None, self._parts)
                )
                self._parts = {}
            self._last[index] = output
            if output.finish_reason is not None or self._answer.body.logprobs:
                texts.append(self._whole(index, output))
            elif output.text:  # else it is held back for a stop string or half a character
                texts.append(f'{self._begins}{index},"delta":{{"content":{dumps(output.text)}{self._goes_on}')
        return "".join(texts).encode()

    def last(self) -> bytes:
        """See streaming.Events: the usage."""
        body = self._answer.body
        if not body.wants_usage:
            return b""
        return event(dumps({**self._head, "choices": [], "usage": usage_of(self._last, body.n).to_json()}))

    def note(self) -> None:
        """See streaming.Events."""
        self._generation.note_tokens(self._last)

    def _whole(self, index: int, output: SequenceOutput) -> str:
        if not output.text and not output.logprobs and output.finish_reason is None:
            return ""
        delta = {"content": output.text} if output.text else {}
        asked = self._answer.body.logprobs
        logprobs = chat_logprobs(output.logprobs, self._answer.vocabulary) if asked else None
        finish = None if output.finish_reason is None else output.finish_reason.value
        return self._chunk(index, delta, logprobs, finish, {})

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: dict[str, object] | None,
        finish: str | None,
        parts: dict[str, object],
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return f"data: {dumps({**self._head, **parts, 'choices': [choice], **self._ends})}\n\n"
