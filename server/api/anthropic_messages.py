"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, on the road that chats take."""

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic_core import from_json

from manylora.adapters.names import AUTO
from manylora.server.api.answering import respond
from manylora.server.api.anthropic_asks import messages_ask, messages_prompt
from manylora.server.api.anthropic_errors import in_anthropics_shape, in_anthropics_words
from manylora.server.api.anthropic_schemas import CountRequest, MessagesRequest
from manylora.server.api.asked_models import found, text_of, told_parts
from manylora.server.api.auth import require_api_key
from manylora.server.api.blocks import Happening, Part, Parts
from manylora.server.api.body import read_body
from manylora.server.api.choices import Choice, Step
from manylora.server.api.dependencies import dependencies
from manylora.server.api.disconnect import unless_gone
from manylora.server.api.generation import Generation, Usage
from manylora.server.api.models import MAX_TOKENS
from manylora.server.api.openapi import body_of
from manylora.server.api.prompts import chat_tokens
from manylora.server.api.rendering import dumps, json_response
from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer import TooManyTokens

router = APIRouter(dependencies=[Depends(require_api_key)], tags=["Anthropic"])


@router.post("/v1/messages", openapi_extra=body_of(MessagesRequest))
async def messages(request: Request) -> Response:
    """Answer messages, as one JSON object or as a stream of events."""
    body = await read_body(request, MessagesRequest)
    identity = f"msg_{uuid4().hex}"
    with in_anthropics_words():
        return await respond(
            request, messages_ask(body), lambda generation: MessageForm(generation, identity)
        )


@router.post("/v1/messages/count_tokens", openapi_extra=body_of(CountRequest))
async def count_tokens(request: Request) -> Response:
    """Return how many tokens the prompt of such messages has."""
    deps = dependencies(request)
    body = await read_body(request, CountRequest)
    # Whose the messages will be isn't asked for their length: they are counted as the base reads them.
    name = deps.settings.base_model if body.model == AUTO else body.model
    model = await unless_gone(request, found(deps, name, body))
    text = await unless_gone(request, text_of(deps, model, body))
    prompt, most = messages_prompt(body), deps.settings.max_tokenize_characters
    lane = deps.tokenising.looks
    counting = chat_tokens(deps, model, text, prompt, at_most=MAX_TOKENS, lane=lane, most=most)
    try:
        ids = await unless_gone(request, counting)
    except TooManyTokens as error:
        raise InvalidRequest(
            f"the messages have {error}, at most {MAX_TOKENS} are counted", param="messages"
        ) from None
    return await json_response(lambda: {"input_tokens": len(ids)}, None)


class MessageForm:
    """A message: its content is one block after the other. See writer.Form."""

    def __init__(self, generation: Generation, identity: str) -> None:
        """``identity`` is the answer's id."""
        self._told = told_parts(generation.model)
        self._identity, self._model = identity, generation.ask.model
        self._thoughts = generation.ask.wants_reasoning
        self._parts = Parts(thoughts=self._thoughts)
        self._end: Step | None = None

    @property
    def large(self) -> bool:
        """See writer.Form."""
        return False

    def whole(self, choices: Iterable[Choice], usage: Usage, *, at_once: bool) -> dict[str, object]:
        """See writer.Form."""
        [choice] = choices
        parts = Parts(thoughts=self._thoughts)
        list(parts.push(choice.deltas))
        list(parts.end())
        finish = _finish(choice.finish, choice.stop_reason, parts)
        return {
            **self._begin([_block(part) for part in parts.done], usage_of(usage)),
            **finish,
        }

    async def events(self, step: Step) -> str:
        """See writer.Form."""
        told = ""
        if step.first:
            output = step.output
            usage = usage_of(Usage(output.prompt_tokens, 0, output.cached_tokens))
            begun = {**self._begin([], usage), "stop_reason": None, "stop_sequence": None}
            told = event("message_start", {"message": begun}) + event("ping", {})
        told += "".join(map(_event, self._parts.push(step.deltas)))
        if step.finish is not None:
            self._end = step
            told += "".join(map(_event, self._parts.end()))
        return told

    def last(self, usage: Usage) -> str:
        """See writer.Form."""
        assert self._end is not None, "the engine ends every choice"
        delta = _finish(self._end.finish, self._end.output.stop_reason, self._parts)
        ends = event("message_delta", {"delta": delta, "usage": usage_of(usage)})
        return ends + event("message_stop", {})

    def failed(self, envelope: Mapping[str, object]) -> str:
        """See writer.Form."""
        return event("error", in_anthropics_shape(envelope))

    def _begin(self, content: list[dict[str, Any]], usage: Mapping[str, object]) -> dict[str, object]:
        return {
            "id": self._identity,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            **self._told,
            "content": content,
            "usage": usage,
        }


def event(kind: str, data: Mapping[str, object]) -> str:
    """Return an event of a type."""
    return f"event: {kind}\ndata: {dumps({'type': kind, **data})}\n\n"


def usage_of(usage: Usage) -> dict[str, object]:
    """Return the tokens as Anthropic counts them: those that were in the cache aren't in input_tokens."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }


def _finish(finish: str | None, stop: str | int | None, parts: Parts) -> dict[str, object]:
    """Return why an answer ended, as Anthropic names it."""
    text = stop if isinstance(stop, str) else None
    if finish == "length":
        reason, text = "max_tokens", None
    elif any(part.kind == "call" for part in parts.done):
        reason, text = "tool_use", None
    else:
        reason = "end_turn" if text is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": text}


def _event(happening: Happening) -> str:
    what, part, text, _ = happening
    if what == "begins":
        begun = _block(Part(part.index, part.kind, part.call))
        return event("content_block_start", {"index": part.index, "content_block": begun})
    if what == "ends":
        return event("content_block_stop", {"index": part.index})
    kind, name = {
        "text": ("text_delta", "text"),
        "thought": ("thinking_delta", "thinking"),
        "call": ("input_json_delta", "partial_json"),
    }[part.kind]
    return event("content_block_delta", {"index": part.index, "delta": {"type": kind, name: text}})


def _block(part: Part) -> dict[str, Any]:
    if part.kind == "text":
        return {"type": "text", "text": part.text}
    if part.kind == "thought":
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    assert part.call is not None
    return {
        "type": "tool_use",
        "id": part.call.call_id,
        "name": part.call.name,
        "input": _as_far_as_it_came(part.text),
    }


def _as_far_as_it_came(arguments: str) -> dict[str, Any]:
    """Return a call's arguments; of those that were cut off, the members that are whole, as clients read a stream."""
    try:
        found = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
