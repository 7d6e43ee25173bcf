"""POST /v1/completions: texts or token ids, one prompt or several, echoed if asked."""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from manylora.server.api.answering import respond
from manylora.server.api.asked_models import told_parts
from manylora.server.api.asks import PlainPrompts, completion_ask
from manylora.server.api.auth import require_api_key
from manylora.server.api.body import read_body
from manylora.server.api.choices import Choice, Step
from manylora.server.api.generation import Generation, Usage
from manylora.server.api.logprobs import CompletionLogprobs
from manylora.server.api.openapi import body_of
from manylora.server.api.rendering import dumps
from manylora.server.api.request_context import note
from manylora.server.api.schemas import CompletionRequest
from manylora.server.api.writer import DONE, event

router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])


@router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
async def completions(request: Request) -> Response:
    """Continue each prompt, as one JSON object or as a stream of chunks."""
    body = await read_body(request, CompletionRequest)
    ask = completion_ask(body)
    return await respond(
        request,
        ask,
        lambda generation: CompletionForm(
            generation, f"cmpl-{uuid4().hex}", int(time.time()), echo_only=body.max_tokens == 0
        ),
    )


class CompletionForm:
    """A completion; with echo, a choice begins with its prompt. See writer.Form.

    What all chunks share is written once; of most of them the text alone is new.
    """

    def __init__(
        self, generation: Generation, identity: str, created: int, *, echo_only: bool = False
    ) -> None:
        """``identity`` is the answer's id, ``created`` a Unix time; ``echo_only``: the prompt alone is asked for."""
        ask = generation.ask
        assert isinstance(ask.prompt, PlainPrompts)
        self._generation = generation
        self._prompt = ask.prompt
        self._told = ask.sampling.logprobs is not None
        self._usage = ask.wants_usage
        self._echo_only = echo_only
        self._parts = told_parts(generation.model)
        """What is told of a mixture's parts: by the answer, or by a stream's first chunk."""
        self._logprobs: dict[int, CompletionLogprobs] = {}
        """What writes the log probabilities of each choice."""
        self._head = {
            "id": identity,
            "object": "text_completion",
            "created": created,
            "model": ask.model,
            "system_fingerprint": generation.model.answers,
        }
        self._ends = {"usage": None} if self._usage else {}
        self._plain = not self._told and not self._prompt.echo
        self._begins = f'data: {dumps(self._head)[:-1]},"choices":[{{"index":'
        rest = ',"usage":null}' if self._ends else "}"
        self._goes_on = f',"logprobs":null,"finish_reason":null,"stop_reason":null}}]{rest}\n\n'

    @property
    def large(self) -> bool:
        """See writer.Form."""
        return self._prompt.echo or self._told

    def whole(self, choices: Iterable[Choice], usage: Usage, *, at_once: bool) -> dict[str, object]:
        """See writer.Form."""
        make = self._echoed_piece if self._prompt.echo else self._piece
        made = (make(index, choice) for index, choice in enumerate(choices))
        done = list(made) if at_once else made
        return {**self._head, **self._parts, "choices": done, "usage": self._usage_of(usage)}

    async def events(self, step: Step) -> str:
        """See writer.Form."""
        if self._plain and step.finish is None and not self._parts:
            text = step.output.text
            return f'{self._begins}{step.choice},"text":{dumps(text)}{self._goes_on}' if text else ""
        return await self._whole_chunk(step)

    def last(self, usage: Usage) -> str:
        """See writer.Form."""
        if not self._usage:
            return DONE
        return event({**self._head, "choices": [], "usage": self._usage_of(usage)}) + DONE

    def failed(self, envelope: Mapping[str, object]) -> str:
        """See writer.Form."""
        return event(envelope)

    async def _whole_chunk(self, step: Step) -> str:
        choice = Choice()
        choice.add(step.output)
        if step.first and self._prompt.echo:
            # The prompt may be long.
            piece = await asyncio.to_thread(self._echoed_piece, step.choice, choice)
        else:
            piece = self._piece(step.choice, choice)
        if not (piece["text"] or piece["logprobs"] or piece["finish_reason"]):
            return ""
        parts, self._parts = self._parts, {}
        return event({**self._head, **parts, "choices": [piece], **self._ends})

    def _echoed_piece(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a choice, whole or its beginning, with the prompt before it."""
        number = index // self._generation.ask.n
        text = self._generation.echoed[number]
        if choice.prompt_logprobs is None:
            return self._piece(index, choice, text)
        prompt = self._generation.prompts[number]
        # What the tokenizer puts around a text of its own accord is no part of the prompt as it was sent.
        added = isinstance(self._prompt.prompts[number], str) and self._prompt.add_special_tokens
        of_prompt = self._writes(index).of_prompt(prompt, choice.prompt_logprobs, text, added=added)
        piece = self._piece(index, choice, text)
        own = piece["logprobs"]
        whole = of_prompt if own is None else {name: part + own[name] for name, part in of_prompt.items()}
        return {**piece, "logprobs": whole}

    def _piece(self, index: int, choice: Choice, prompt_text: str = "") -> dict[str, Any]:
        """Return a choice, whole or what a step added to it."""
        finish = choice.finish
        return {
            "index": index,
            "text": prompt_text + ("" if self._echo_only else "".join(choice.text)),
            "logprobs": self._own_logprobs(index, choice),
            "finish_reason": "length" if self._echo_only and finish else finish,
            "stop_reason": None if self._echo_only else choice.stop_reason,
        }

    def _own_logprobs(self, index: int, choice: Choice) -> dict[str, list[Any]] | None:
        if self._echo_only or not self._told or not choice.token_ids:
            return None
        tokens: Sequence[Any] = choice.logprobs
        return self._writes(index).of(choice.token_ids, tokens)

    def _writes(self, index: int) -> CompletionLogprobs:
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(self._generation.text.vocabulary)
        return self._logprobs[index]

    def _usage_of(self, usage: Usage) -> dict[str, object]:
        if self._echo_only:
            usage = replace(usage, completion=0)
            note(completion_tokens=0)
        return usage.to_json()
