"""POST /v1/chat/completions."""

import time
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from manylora.server.api.answering import respond
from manylora.server.api.asked_models import told_parts
from manylora.server.api.asks import chat_ask
from manylora.server.api.auth import require_api_key
from manylora.server.api.body import read_body
from manylora.server.api.choices import Choice, Step
from manylora.server.api.generation import Generation, Usage
from manylora.server.api.logprobs import chat_logprobs
from manylora.server.api.openapi import body_of
from manylora.server.api.rendering import dumps
from manylora.server.api.schemas import ChatRequest
from manylora.server.api.writer import DONE, event
from manylora.server.chat.deltas import CallBegins, Content, Reasoning

CHUNK = "chat.completion.chunk"
router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """Answer a chat, as one JSON object or as a stream of chunks."""
    body = await read_body(request, ChatRequest)
    ask = chat_ask(body)
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
        self._wants_reasoning = ask.wants_reasoning
        self._custom: dict[tuple[int, int], bool] = {}
        """Whether each choice's calls are of custom tools, in a stream."""
        self._identity, self._created, self._model = identity, created, ask.model
        self._fingerprint = generation.model.answers
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
            "message": self._message(choice),
            "logprobs": chat_logprobs(choice.spoken_logprobs, self._vocabulary) if self._told else None,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
        }

    def _message(self, choice: Choice) -> dict[str, object]:
        content = "".join(choice.text)
        message: dict[str, object] = {
            "role": "assistant",
            "content": content if content or not choice.calls else None,
            "refusal": None,
        }
        if choice.reasoning and self._wants_reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message["tool_calls"] = [
                call_object(call.call_id, call.name, "".join(call.arguments), custom=call.custom)
                for call in choice.calls
            ]
        return message

    async def events(self, step: Step) -> str:
        """See writer.Form."""
        begins = ""
        if step.first:
            begins = self._chunk(step.choice, {"role": "assistant", "content": ""}, None, None, self._parts)
            self._parts = {}
        if step.finish is not None or self._told:
            return begins + self._whole_chunk(step)
        if not step.deltas:  # it is held back for a stop string or half a character
            return begins
        if len(step.deltas) == 1 and isinstance(step.deltas[0], Content):
            told = dumps(step.deltas[0].text)
            return f'{begins}{self._begins}{step.choice},"delta":{{"content":{told}{self._goes_on}'
        return begins + self._whole_chunk(step)

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
        delta = self._delta(step)
        if not delta and not output.logprobs and step.finish is None:
            return ""
        spoken = output.spoken_logprobs
        logprobs = chat_logprobs(spoken, self._vocabulary) if spoken else None
        return self._chunk(step.choice, delta, logprobs, step.finish, {})

    def _delta(self, step: Step) -> dict[str, object]:
        """Return what a step adds to a message. A call's id and name are told once: clients join what is told again."""
        texts = {"reasoning_content": "", "content": ""}
        calls: dict[int, dict[str, Any]] = {}
        for delta in step.deltas:
            if isinstance(delta, Content):
                texts["content"] += delta.text
            elif isinstance(delta, Reasoning):
                texts["reasoning_content"] += delta.text if self._wants_reasoning else ""
            elif isinstance(delta, CallBegins):
                self._custom[step.choice, delta.number] = delta.custom
                begun = call_object(delta.call_id, delta.name, "", custom=delta.custom)
                calls[delta.number] = {"index": delta.number, **begun}
            else:
                custom = self._custom[step.choice, delta.number]
                call = calls.setdefault(delta.number, {"index": delta.number})
                inside = call.setdefault("custom" if custom else "function", {})
                name = "input" if custom else "arguments"
                inside[name] = inside.get(name, "") + delta.text
        told: dict[str, object] = {key: text for key, text in texts.items() if text}
        return {**told, "tool_calls": list(calls.values())} if calls else told

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, object],
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
            "system_fingerprint": self._fingerprint,
        }


def call_object(call_id: str, name: str, arguments: str, *, custom: bool) -> dict[str, Any]:
    """Return a call in OpenAI's shape; ``arguments`` are a custom tool's input."""
    if custom:
        return {"id": call_id, "type": "custom", "custom": {"name": name, "input": arguments}}
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
