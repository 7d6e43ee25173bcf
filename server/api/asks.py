"""What a client asks for, in one shape whatever route it came by, and how chats and completions become that."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from manylora.server.api.messages import Message, for_template
from manylora.server.api.mixture_fields import ModelFields
from manylora.server.api.schemas import (
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    TokenizeRequest,
)
from manylora.server.api.structured import asked_grammar
from manylora.server.api.token_ids import check_token_ids
from manylora.server.api.tool_schemas import tools_of
from manylora.server.catalog import ResolvedModel, Routed
from manylora.server.chat.tools import ToolUse
from manylora.server.engine.grammar import Grammar
from manylora.server.engine.request import UNBOUNDED, Pooling, SamplingParams
from manylora.server.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """Messages, for the model's chat template."""

    messages: Sequence[Mapping[str, object]]
    """As templates take them."""
    variables: Mapping[str, object] = field(default_factory=dict)
    """What else the template may read."""
    tools: ToolUse = field(default_factory=ToolUse)
    reasoning_effort: str | None = None
    """How much is to be thought, if the template knows of that; "none": nothing."""
    effort_if_known: bool = False
    """Whether a template that knows no levels isn't told, instead of the request refused."""
    param: str = "messages"
    """The field that the messages came in."""
    as_sent: bool = True
    """Whether they are that field's, one by one."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPrompts:
    """Texts and token ids, as they are."""

    prompts: Sequence[str | Sequence[int]]
    add_special_tokens: bool = True
    """Around texts, as the tokenizer has it."""
    suffix: str = ""
    """What is to stand behind the answers; with one, they fill in what lies between."""
    echo: bool = False
    """Whether they are told again, before their answers."""
    param: str = "prompt"
    """The field that they came in."""


Prompt: TypeAlias = ChatPrompt | PlainPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A client's request: which model, of what prompts, how, and how it wants to hear."""

    model: str
    """By its name; for "auto", once that is found, what was chosen."""
    beside: ModelFields
    """What else names adapters."""
    prompt: Prompt
    sampling: SamplingParams
    grammar: Grammar | None = None
    """What answers are held to."""
    pooling: Callable[[ResolvedModel], Pooling] | None = None
    """Prompts aren't continued, their states are pooled, for each model in its way. Raises InvalidRequest."""
    n: int = 1
    """Choices for each prompt."""
    stream: bool = False
    wants_usage: bool = False
    """Whether a stream tells it too."""
    priority: int = 0
    """Less is sooner."""
    by_token: bool = False
    """Whether answers tell which token brought what."""
    wants_reasoning: bool = True
    """Whether what is thought is told."""
    routed: Routed | None = None
    """How the model was chosen, if the request left that to the server."""

    @property
    def num_prompts(self) -> int:
        """How many prompts are to be answered."""
        return len(self.prompt.prompts) if isinstance(self.prompt, PlainPrompts) else 1


def chat_ask(body: ChatRequest) -> Ask:
    """Return what a chat asks for. Raises InvalidRequest."""
    prompt = ChatPrompt(
        messages=for_template(body.messages),
        variables=body.chat_template_kwargs,
        tools=body.tool_use,
        reasoning_effort=body.reasoning_effort,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    ask = _ask(body, prompt, sampling_params(body, body.asked_tokens, logprobs))
    return replace(ask, wants_reasoning=body.include_reasoning)


def tokenize_prompt(body: TokenizeRequest, messages: Sequence[Message]) -> ChatPrompt:
    """Return the chat whose tokens are asked for."""
    return ChatPrompt(
        messages=for_template(messages),
        tools=ToolUse(tools_of(body.tools), "none"),
        variables=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )


def completion_ask(body: CompletionRequest) -> Ask:
    """Return what a completion asks for. Raises InvalidRequest."""
    prompt = PlainPrompts(
        prompts=body.prompts(),
        add_special_tokens=body.add_special_tokens,
        suffix=body.suffix,
        echo=body.echo,
    )
    # The engine always makes a token; echo alone lets go of it.
    max_tokens = max(1, body.asked_tokens)
    told = body.logprobs if body.echo else None
    return _ask(body, prompt, sampling_params(body, max_tokens, body.logprobs, told))


def _ask(body: SamplingFields, prompt: Prompt, sampling: SamplingParams) -> Ask:
    return Ask(
        model=body.model,
        beside=body,
        prompt=prompt,
        sampling=sampling,
        grammar=asked_grammar(body),
        n=body.n,
        stream=body.stream,
        priority=body.priority,
        wants_usage=body.wants_usage,
    )


_TOKEN_ID = re.compile("0|[1-9][0-9]{0,11}")
"""A token id as logit_bias names it; Python itself refuses to read numbers of thousands of digits."""


def sampling_params(
    fields: SamplingFields,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Return the engine's parameters. What ids there are the model decides: see check_ids."""
    if max_tokens is not None and fields.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {fields.min_tokens}, over max_tokens {max_tokens}", param="min_tokens"
        )
    return SamplingParams(
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=max(0, fields.top_k),
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=_logit_bias(fields.logit_bias),
        seed=fields.seed,
        stop=fields.stops,
        stop_token_ids=tuple(fields.stop_token_ids),
        ignore_eos=fields.ignore_eos,
        min_tokens=fields.min_tokens,
        max_tokens=UNBOUNDED if max_tokens is None else max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def check_ids(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest for ids that the model doesn't have."""
    check_token_ids(sampling.stop_token_ids, vocab_size, "stop_token_ids")
    check_token_ids(tuple(sampling.logit_bias), vocab_size, "logit_bias")


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    # Digits of other scripts and leading zeros would be second names of one id: the last of them would win.
    wrong = next((token for token in bias if not _TOKEN_ID.fullmatch(token)), None)
    if wrong is not None:
        raise InvalidRequest(f"logit_bias: {wrong[:40]!r} is not a token id", param="logit_bias")
    return {int(token): value for token, value in bias.items()}
