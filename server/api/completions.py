"""POST /v1/completions: texts or token ids, one prompt or several, echoed if asked."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from manylora.server.api.asked_models import told_parts, with_parts
from manylora.server.api.auth import require_api_key
from manylora.server.api.body import read_body
from manylora.server.api.dependencies import dependencies
from manylora.server.api.disconnect import done_within, unless_gone
from manylora.server.api.generation import Choice, Generation, begin, sampling_params, usage_of
from manylora.server.api.logprobs import CompletionLogprobs
from manylora.server.api.openapi import body_of
from manylora.server.api.prompts import completion_prompts, echoed_texts
from manylora.server.api.rendering import dumps, json_response
from manylora.server.api.request_context import note
from manylora.server.api.schemas import CompletionRequest
from manylora.server.api.streaming import event, event_stream
from manylora.server.catalog import ResolvedModel
from manylora.server.engine.request import SequenceOutput
from manylora.server.tokenizer import ModelText

router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])


@router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
async def completions(request: Request) -> Response:
    """Continue each prompt, as one JSON object or as a stream of chunks."""
    deps = dependencies(request)
    body = await read_body(request, CompletionRequest)
    sampling = sampling_params(
        body,
        deps.settings.vocab_size,
        # The engine always makes a token; echo alone lets go of it.
        max_tokens=max(1, body.asked_tokens),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    echoed: list[str] = []

    async def tokenise(model: ResolvedModel, text: ModelText) -> list[Sequence[int]]:
        prompts = await completion_prompts(deps, body, text)
        # After the check of the ids: those that no vocabulary has can't be spelled.
        echoed[:] = await echoed_texts(deps, body, text) if body.echo else []
        return prompts

    generation = await unless_gone(request, begin(deps, body, tokenise, sampling))
    answer = CompletionAnswer(body, generation, tuple(echoed), f"cmpl-{uuid4().hex}", int(time.time()))
    if body.stream:
        events = CompletionEvents(answer)
        return with_parts(
            await event_stream(request, generation, events, deps.settings.keep_alive_seconds),
            generation.model,
        )
    choices = asyncio.ensure_future(generation.collect())
    await done_within(request, choices)
    done = choices.result()
    large = body.echo or body.logprobs is not None
    whole = await json_response(lambda: answer.whole(done, at_once=not large), deps.rests if large else None)
    return with_parts(whole, generation.model)


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """One answer in the making: what all of its chunks share."""

    body: CompletionRequest
    generation: Generation
    echoed: tuple[str, ...]
    """The prompts as they were sent; empty if they aren't echoed."""
    identity: str
    created: int

    @property
    def parts(self) -> dict[str, object]:
        """What is told of a mixture's parts: by the answer, or by a stream's first chunk."""
        return told_parts(self.generation.model)

    @property
    def echo_only(self) -> bool:
        """Whether the prompt alone is asked for."""
        return self.body.max_tokens == 0

    def whole(self, choices: list[Choice], *, at_once: bool) -> dict[str, object]:
        """Return the answer as one object; its choices are made ``at_once``, or as they are written."""
        made = (self._choice(index, choice) for index, choice in enumerate(choices))
        done = list(made) if at_once else made
        usage = self.usage([choice.last for choice in choices])
        return {**self.head(), **self.parts, "choices": done, "usage": usage}

    def logprobs(self) -> CompletionLogprobs:
        """Return what writes the log probabilities of a choice."""
        return CompletionLogprobs(self.generation.text.vocabulary)

    def _choice(self, index: int, choice: Choice) -> dict[str, object]:
        make = self.echoed_piece if self.body.echo else self.piece
        return make(index, choice, self.logprobs())

    def echoed_piece(self, index: int, choice: Choice, logprobs: CompletionLogprobs) -> dict[str, object]:
        """Return a choice, whole or its beginning, with the prompt before it."""
        number = index // self.body.n
        text = self.echoed[number]
        if choice.prompt_logprobs is None:
            return self.piece(index, choice, logprobs, text)
        prompt = self.generation.prompts[number]
        # What the tokenizer puts around a text of its own accord is no part of the prompt as it was sent.
        added = isinstance(self.body.prompts()[number], str) and self.body.add_special_tokens
        of_prompt = logprobs.of_prompt(prompt, choice.prompt_logprobs, text, added=added)
        piece = self.piece(index, choice, logprobs, text)
        own = piece["logprobs"]
        whole = of_prompt if own is None else {name: part + own[name] for name, part in of_prompt.items()}
        return {**piece, "logprobs": whole}

    def _own_logprobs(self, choice: Choice, logprobs: CompletionLogprobs) -> dict[str, list[Any]] | None:
        if self.echo_only or self.body.logprobs is None or not choice.token_ids:
            return None
        return logprobs.of(choice.token_ids, choice.logprobs)

    def piece(
        self, index: int, choice: Choice, logprobs: CompletionLogprobs, prompt_text: str = ""
    ) -> dict[str, Any]:
        """Return a choice, whole or what a step added to it."""
        finish = None if choice.finish_reason is None else choice.finish_reason.value
        return {
            "index": index,
            "text": prompt_text + ("" if self.echo_only else "".join(choice.text)),
            "logprobs": self._own_logprobs(choice, logprobs),
            "finish_reason": "length" if self.echo_only and finish else finish,
            "stop_reason": None if self.echo_only else choice.stop_reason,
        }

    def usage(self, last: Sequence[SequenceOutput | None]) -> dict[str, object]:
        """Return the usage object; ``last`` are the choices' last outputs."""
        usage = usage_of(last, self.body.n).to_json()
        if self.echo_only:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
            note(completion_tokens=0)
        return usage

    def head(self) -> dict[str, object]:
        """Return what an answer and all of its chunks begin with."""
        return {
            "id": self.identity,
            "object": "text_completion",
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": None,
        }


class CompletionEvents:
    """The answer as chunks; with echo, a choice's first begins with its prompt. See streaming.Events.

    What all chunks share is written once; of most of them the text alone is new.
    """

    def __init__(self, answer: CompletionAnswer) -> None:
        self._answer = answer
        count = answer.body.n * len(answer.generation.prompts)
        self._parts = answer.parts
        self._last: list[SequenceOutput | None] = [None] * count
        self._logprobs = [answer.logprobs() for _ in range(count)]
        self._head = answer.head()
        self._ends = {"usage": None} if answer.body.wants_usage else {}
        self._plain = answer.body.logprobs is None and not answer.body.echo and not answer.echo_only
        self._begins = f'data: {dumps(self._head)[:-1]},"choices":[{{"index":'
        rest = ',"usage":null}' if self._ends else "}"
        self._goes_on = f',"logprobs":null,"finish_reason":null,"stop_reason":null}}]{rest}\n\n'

    async def of(self, outputs: Sequence[tuple[int, SequenceOutput]]) -> bytes:
        """See streaming.Events."""
        texts: list[str] = []
        for index, output in outputs:
            if self._plain and output.finish_reason is None and not self._parts:
                if output.text:
                    texts.append(f'{self._begins}{index},"text":{dumps(output.text)}{self._goes_on}')
            else:
                texts.append(await self._whole(index, output))
            self._last[index] = output
        return "".join(texts).encode()

    def last(self) -> bytes:
        """See streaming.Events: the usage."""
        if not self._answer.body.wants_usage:
            return b""
        return event(dumps({**self._head, "choices": [], "usage": self._answer.usage(self._last)}))

    def note(self) -> None:
        """See streaming.Events."""
        self._answer.generation.note_tokens(self._last)

    async def _whole(self, index: int, output: SequenceOutput) -> str:
        choice = Choice()
        choice.add(output)
        if self._last[index] is None and self._answer.body.echo:
            # The prompt may be long.
            piece = await asyncio.to_thread(self._answer.echoed_piece, index, choice, self._logprobs[index])
        else:
            piece = self._answer.piece(index, choice, self._logprobs[index])
        if not (piece["text"] or piece["logprobs"] or piece["finish_reason"]):
            return ""
        parts, self._parts = self._parts, {}
        return f"data: {dumps({**self._head, **parts, 'choices': [piece], **self._ends})}\n\n"
