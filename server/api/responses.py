"""POST /v1/responses: OpenAI's newer API, on the road that chats take. Nothing is kept of a response."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from manylora.server.api.answering import respond
from manylora.server.api.asked_models import told_parts
from manylora.server.api.auth import require_api_key
from manylora.server.api.blocks import Happening, Part, Parts
from manylora.server.api.body import read_body
from manylora.server.api.choices import Choice, Step
from manylora.server.api.generation import Generation, Usage
from manylora.server.api.logprobs import token_logprobs
from manylora.server.api.openapi import body_of
from manylora.server.api.rendering import dumps, pieces_of
from manylora.server.api.response_asks import response_ask
from manylora.server.api.response_items import Status, Tokens, TokenTexts, events_of, item_of
from manylora.server.api.response_schemas import ResponsesRequest

router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])


@router.post("/v1/responses", openapi_extra=body_of(ResponsesRequest))
async def responses(request: Request) -> Response:
    """Answer a conversation, as one JSON object or as a stream of events."""
    body = await read_body(request, ResponsesRequest)
    mark, created = uuid4().hex, int(time.time())
    return await respond(
        request, response_ask(body), lambda generation: ResponseForm(generation, body, mark, created)
    )


class ResponseForm:
    """A response: items one after the other, each event with its number. See writer.Form."""

    def __init__(self, generation: Generation, body: ResponsesRequest, mark: str, created: int) -> None:
        """``mark`` is what makes ids the answer's own, ``created`` a Unix time."""
        self._mark = mark
        self._told = generation.ask.by_token
        self._vocabulary = generation.text.vocabulary
        self._texts = TokenTexts(self._vocabulary)
        answering = {"model": generation.ask.model, **told_parts(generation.model)}
        self._head = {**_echoed(body, mark, created), **answering}
        self._parts = Parts(thoughts=True)
        self._finish: str | None = None
        self._number = 0

    @property
    def large(self) -> bool:
        """See writer.Form."""
        return self._told

    def whole(self, choices: Iterable[Choice], usage: Usage, *, at_once: bool) -> dict[str, object]:
        """See writer.Form."""
        [choice] = choices
        parts = Parts(thoughts=True)
        list(_pushed(parts, choice))
        list(parts.end())
        return self._ended(parts, choice.finish, usage, self._one_by_one)

    async def events(self, step: Step) -> str:
        """See writer.Form."""
        told: list[str] = []
        if step.first:
            begun = {**self._head, "status": "in_progress", "output": [], "usage": None}
            told += self._event("response.created", {"response": begun})
            told += self._event("response.in_progress", {"response": begun})
        for happening in _pushed(self._parts, step):
            told += self._happened(happening)
        if step.finish is not None:
            self._finish = step.finish
            for happening in self._parts.end():
                told += self._happened(happening)
        return "".join(told)

    def last(self, usage: Usage) -> str:
        """See writer.Form."""
        ended = self._ended(self._parts, self._finish, usage, self._texts.of)
        return "".join(self._event(f"response.{ended['status']}", {"response": ended}))

    def failed(self, envelope: Mapping[str, object]) -> str:
        """See writer.Form."""
        error: Any = envelope["error"]
        told = {"code": error["code"] or "server_error", "message": error["message"]}
        done = [item_of(part, self._mark, "incomplete", self._texts.of) for part in self._parts.done]
        ended = {**self._head, "status": "failed", "error": told, "output": done, "usage": None}
        return "".join(self._event("response.failed", {"response": ended}))

    def _one_by_one(self, part: Part) -> object:
        """Return what is told of a whole answer's tokens, each made when it is written."""
        if not part.tokens:
            return []
        return (told for token in part.tokens for told in token_logprobs((token,), self._vocabulary))

    def _ended(self, parts: Parts, finish: str | None, usage: Usage, tokens: Tokens) -> dict[str, object]:
        cut = finish == "length"
        last = len(parts.done) - 1
        items = [
            item_of(part, self._mark, "incomplete" if cut and part.index == last else "completed", tokens)
            for part in parts.done
        ]
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": items,
            "usage": _usage(usage),
        }

    def _happened(self, happening: Happening) -> Iterator[str]:
        last = happening.what == "ends" and happening.part is self._parts.done[-1]
        status: Status = "incomplete" if last and self._finish == "length" else "completed"
        for kind, fields in events_of(happening, self._mark, status, self._texts):
            yield from self._event(kind, fields)

    def _event(self, kind: str, fields: Mapping[str, object]) -> Sequence[str]:
        """Return the pieces of an event: those that are long are joined once, with all of a step's."""
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        text = pieces_of(data) if self._told else (dumps(data),)
        return (f"event: {kind}\ndata: ", *text, "\n\n")


def _pushed(parts: Parts, come: Choice | Step) -> Iterator[Happening]:
    """Have the parts take what has come, by its tokens where they are told of."""
    if not come.brought:
        yield from parts.push(come.deltas)
    for each in come.brought:
        yield from parts.push(each.deltas, each.token, thought=each.thought)


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0},
        "total_tokens": usage.prompt + usage.completion,
    }


def _echoed(body: ResponsesRequest, mark: str, created: int) -> dict[str, object]:
    """Return what a response says of its request, and of itself whatever comes."""
    given = body.model_dump(
        by_alias=True,
        exclude_none=True,
        include={"tool_choice": True, "text": True, "reasoning": True, "metadata": True},
    )
    return {
        "id": f"resp_{mark}",
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "temperature": body.temperature,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
        **given,
        "tools": [tool.model_dump(by_alias=True, exclude_none=True) for tool in body.served_tools],
        "reasoning": {"effort": None, "summary": None, **given.get("reasoning", {})},
        "text": {"format": {"type": "text"}, **given.get("text", {})},
    }
