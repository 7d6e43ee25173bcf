"""What Anthropic's messages ask for, in the one shape of every route."""

from collections.abc import Sequence
from typing import Literal

from manylora.server.api.anthropic_schemas import Block, CountRequest, MessagesRequest, TextBlock
from manylora.server.api.asks import Ask, ChatPrompt
from manylora.server.api.structured import schema_grammar
from manylora.server.api.turns import BETWEEN, Turns
from manylora.server.engine.grammar import Grammar
from manylora.server.engine.request import SamplingParams
from manylora.server.errors import InvalidRequest

FAILED = "Error: "
"""Before what a call returned that failed: templates have no other place for that."""


def messages_ask(body: MessagesRequest) -> Ask:
    """Return what messages ask for. Raises InvalidRequest."""
    sampling = SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(0, body.top_k),
        stop=tuple(body.stop_sequences),
        max_tokens=body.max_tokens,
    )
    return Ask(
        model=body.model,
        beside=body,
        prompt=messages_prompt(body),
        sampling=sampling,
        grammar=_grammar(body),
        stream=body.stream,
        priority=body.priority,
        wants_reasoning=body.thinks and (body.thinking is None or body.thinking.display != "omitted"),
    )


def messages_prompt(body: CountRequest) -> ChatPrompt:
    """Return the chat that messages are; one that ends with the assistant's text is gone on with."""
    turns = Turns(joins=True)
    system = _joined(body.system, BETWEEN)
    if system:
        turns.said("system", system)
    for turn in body.messages:
        _add(turns, turn.role, turn.blocks)
    if not turns.done:
        raise InvalidRequest("messages: they say nothing", param="messages")
    last = turns.done[-1]
    continues = last["role"] == "assistant" and bool(last["content"]) and not last.get("tool_calls")
    effort = None if body.output_config is None else body.output_config.effort
    return ChatPrompt(
        messages=turns.done,
        variables=body.chat_template_kwargs,
        tools=body.tool_use,
        reasoning_effort=effort if body.thinks else "none",
        effort_if_known=True,
        as_sent=False,
        add_generation_prompt=not continues,
        continue_final_message=continues,
    )


def _add(turns: Turns, role: Literal["user", "assistant", "system"], blocks: Sequence[Block]) -> None:
    """Add a message: texts that stand side by side are one, an assistant's as it wrote them."""
    texts: list[str] = []

    def say() -> None:
        if texts or not blocks:
            turns.said(role, ("" if role == "assistant" else "\n").join(texts))
        texts.clear()

    for block in blocks:
        if block.type == "text":
            texts.append(block.text or "")
        elif block.type == "thinking":
            turns.thought(block.thinking or "")
        elif block.type == "tool_use":
            say()
            turns.called(block.id or "", block.name or "", block.input or {})
        elif block.type == "tool_result":
            say()
            text = _joined(block.content or "", "\n")
            turns.returned(block.tool_use_id or "", FAILED + text if block.is_error else text)
    say()


def _joined(texts: str | Sequence[TextBlock], between: str) -> str:
    return texts if isinstance(texts, str) else between.join(block.text or "" for block in texts)


def _grammar(body: MessagesRequest) -> Grammar | None:
    held = None if body.output_config is None else body.output_config.format
    if held is not None:
        return schema_grammar(held.schema_, "output_config.format.schema")
    if body.output_format is not None:
        return schema_grammar(body.output_format.schema_, "output_format.schema")
    return None
