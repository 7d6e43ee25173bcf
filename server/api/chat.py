"""POST /v1/chat/completions."""

import time
from collections.abc import Iterable, Mapping
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from manylora.server.api.answering import respond
from manylora.server.api.asked_models import told_parts
from manylora.server.api.asks import chat_ask
from manylora.server.api.auth import require_api_key
from manylora.server.api.body import read_body
from manylora.server.api.choices import Choice, Step
from manylora.server.api.dependencies import dependencies
from manylora.server.api.generation import Generation, Usage
from manylora.server.api.logprobs import chat_logprobs
from manylora.server.api.openapi import body_of
from manylora.server.api.rendering import dumps
from manylora.server.api.schemas import ChatRequest
from manylora.server.api.writer import DONE, event
from manylora.server.chat.deltas import Content

CHUNK = "chat.completion.chunk"
router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """Answer a chat, as one JSON object or as a stream of chunks."""
    body = await read_body(request, ChatRequest)
    ask = chat_ask(body, dependencies(request).settings.vocab_size)
    return await respond(
        request,
        ask,
        lambda generation: ChatForm(generation, f"chatcmpl-{uuid4().hex}", int(time.time())),
    )


class ChatForm:
    """A chat completion: each choice's role first, then what each step adds. See writer.Form.

    What all chunks share is written once; of most of them the text alone is new.
    """

    def __init__(self, generation: Generation, identity: str, created: int) -> None:
        """``identity`` is the answer's id, ``created`` a Unix time."""
        ask = generation.ask
        self._vocabulary = generation.text.vocabulary
        self._told = ask.sampling.logprobs is not None
        self._usage = ask.wants_usage
        self._parts = told_parts(generation.model)
        """What is told of a mixture's parts: by the answer, or by a stream's first chunk."""
        self._identity, self._created, self._model = identity, created, ask.model
        self._head = self._begin(CHUNK)
        self._ends = {"usage": None} if self._usage else {}
        self._begins = f'data: {dumps(self._head)[:-1]},"choices":[{{"index":'
        rest = ',"usage":null}' if self._ends else "}"
        self._goes_on = f'}},"logprobs":null,"finish_reason":null}}]{rest}\n\n'

    @property
    def large(self) -> bool:
        """See writer.Form."""
        return self._told

    def whole(self, choices: Iterable[Choice], usage: Usage, *, at_once: bool) -> dict[str, object]:
        """See writer.Form."""
        made = (self._choice(index, choice) for index, choice in enumerate(choices))
        return {
            **self._begin("chat.completion"),
            **self._parts,
            "choices": list(made) if at_once else made,
            "usage": usage.to_json(),
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, object]:
        assert choice.finish is not None, "the engine ends every choice"
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": chat_logprobs(choice.logprobs, self._vocabulary) if self._told else None,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
        }

    async def events(self, step: Step) -> str:
        """See writer.Form."""
        begins = ""
        if step.first:
            begins = self._chunk(step.choice, {"role": "assistant", "content": ""}, None, None, self._parts)
            self._parts = {}
        if step.finish is not None or self._told:
            return begins + self._whole_chunk(step)
        for delta in step.deltas:  # none: it is held back for a stop string or half a character
            assert isinstance(delta, Content)
            begins += f'{self._begins}{step.choice},"delta":{{"content":{dumps(delta.text)}{self._goes_on}'
        return begins

    def last(self, usage: Usage) -> str:
        """See writer.Form."""
        if not self._usage:
            return DONE
        return event({**self._head, "choices": [], "usage": usage.to_json()}) + DONE

    def failed(self, envelope: Mapping[str, object]) -> str:
        """See writer.Form."""
        return event(envelope)

    def _whole_chunk(self, step: Step) -> str:
        output = step.output
        if not step.deltas and not output.logprobs and step.finish is None:
            return ""
        text = "".join(delta.text for delta in step.deltas if isinstance(delta, Content))
        logprobs = chat_logprobs(output.logprobs, self._vocabulary) if self._told else None
        return self._chunk(step.choice, {"content": text} if text else {}, logprobs, step.finish, {})

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: dict[str, object] | None,
        finish: str | None,
        parts: dict[str, object],
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**self._head, **parts, "choices": [choice], **self._ends})

    def _begin(self, kind: str) -> dict[str, object]:
        """Return what an answer and all of its chunks begin with."""
        return {
            "id": self._identity,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
        }
