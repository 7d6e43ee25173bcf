"""What a request for a response asks for, in the one shape of every route."""

from manylora.server.api.asks import Ask, ChatPrompt
from manylora.server.api.response_schemas import InputItem, ResponsesRequest, Said
from manylora.server.api.structured import ANY_OBJECT, schema_grammar
from manylora.server.api.tool_schemas import decoded_arguments
from manylora.server.api.turns import Turns
from manylora.server.chat.tools import INPUT
from manylora.server.engine.grammar import Grammar, GrammarKind
from manylora.server.engine.request import UNBOUNDED, SamplingParams
from manylora.server.errors import InvalidRequest


def response_ask(body: ResponsesRequest) -> Ask:
    """Return what is asked for. Raises InvalidRequest."""
    sampling = SamplingParams(
        logprobs=body.logprobs,
        temperature=body.temperature,
        top_p=body.top_p,
        max_tokens=UNBOUNDED if body.max_output_tokens is None else body.max_output_tokens,
    )
    return Ask(
        model=body.model,
        beside=body,
        prompt=_prompt(body),
        sampling=sampling,
        grammar=_grammar(body),
        stream=body.stream,
        priority=body.priority,
        by_token=body.logprobs is not None,
    )


def _prompt(body: ResponsesRequest) -> ChatPrompt:
    turns = Turns()
    if body.instructions:
        turns.said("system", body.instructions)
    if isinstance(body.input, str):
        turns.said("user", body.input)
    else:
        for item in body.input:
            _add(turns, item)
    if not turns.done:
        raise InvalidRequest("input: it says nothing", param="input")
    return ChatPrompt(
        messages=turns.done,
        variables=body.chat_template_kwargs,
        tools=body.tool_use,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        effort_if_known=True,
        param="input",
        as_sent=False,
    )


def _add(turns: Turns, item: InputItem) -> None:
    call_id, name = item.call_id or "", item.name or ""
    if item.type == "message":
        role = "system" if item.role == "developer" else str(item.role)
        turns.said(role, _text(item.content))
    elif item.type == "reasoning":
        thought = _text(item.content) or _text(item.summary)
        if thought:
            turns.thought(thought)
    elif item.type == "function_call":
        turns.called(call_id, name, decoded_arguments(item.arguments or ""))
    elif item.type == "custom_tool_call":
        turns.called(call_id, name, {INPUT: item.input or ""})
    else:
        turns.returned(call_id, _text(item.output))


def _text(said: Said | None) -> str:
    if said is None or isinstance(said, str):
        return said or ""
    return "".join(part.refusal if part.type == "refusal" else part.text for part in said)


def _grammar(body: ResponsesRequest) -> Grammar | None:
    held = None if body.text is None else body.text.format
    if held is None or held.type == "text":
        return None
    if held.schema_ is None:
        return Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT, param="text.format")
    return schema_grammar(held.schema_, "text.format.schema")
