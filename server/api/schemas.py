"""Requests as clients may send them. A field is here only if it takes effect; inert.py has those that may pass.

Checking stops at the first fault of a list or an object: a million of them would take seconds, interpreter lock
in hand.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from manylora.server.api.inert import refused
from manylora.server.api.messages import Message
from manylora.server.api.mixture_fields import ModelFields
from manylora.server.api.strict import Strict
from manylora.server.api.structured import StructuredFields
from manylora.server.api.template_variables import TemplateVariables
from manylora.server.api.tool_schemas import MAX_TOOLS, ToolFields, ToolSpec

MAX_STOPS = 16
MAX_STOP_IDS = 1024
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16
MAX_PROMPTS = 256

Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
TokenIdLists = Annotated[list[TokenIds], Field(fail_fast=True)]


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False


class SamplingFields(StructuredFields):
    """What chat and completions share: OpenAI's parameters, and vLLM's where OpenAI has none."""

    model: str = Field(
        min_length=1,
        description="The base, or the adapter or the mixture that is to answer: by its name, or as sql:0.7+pirate:0.3.",
    )
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, description="0 and -1: no limit.")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Texts = Field(default_factory=list)
    stop_token_ids: TokenIds = Field(default_factory=list, max_length=MAX_STOP_IDS)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    max_tokens: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = Field(
        0, ge=-(2**31), lt=2**31, description="Less begins sooner; a key says down to what it may ask."
    )

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_BIASES:
            raise ValueError(f"give at most {MAX_BIASES} biases, not {len(value)}")
        return value

    @field_validator("stop")
    @classmethod
    def _few_and_not_empty(cls, value: str | list[str]) -> list[str]:
        stops = [value] if isinstance(value, str) else value
        if len(stops) > MAX_STOPS or not all(stops):
            raise ValueError(f"give at most {MAX_STOPS} stop strings, none of them empty")
        return stops

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_prompts(self) -> int:
        """How many prompts are to be answered."""
        return 1

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


Messages = Annotated[list[Message], Field(fail_fast=True)]


def _one_end(body: "ChatRequest | TokenizeRequest") -> None:
    if body.continue_final_message and body.add_generation_prompt:
        raise refused("continue_final_message", "goes with add_generation_prompt: false")


class ChatRequest(SamplingFields, ToolFields):
    """POST /v1/chat/completions."""

    messages: Messages = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description='"none": templates are told not to think; levels are for templates that know them.'
    )
    include_reasoning: bool = Field(True, description="Whether what was thought is told.")

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "goes with logprobs: true")
        _one_end(self)
        if self.max_tokens == 0:
            raise refused("max_tokens", "0 goes with a completion's echo: true")
        return self

    @property
    def asked_tokens(self) -> int | None:
        """How many tokens at most; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: str | Texts | TokenIds | TokenIdLists
    suffix: str = Field("", description="What follows: the model fills in what lies between.")
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(None, ge=1)
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _some_prompts(cls, value: Any) -> Any:
        if isinstance(value, list) and not (value and isinstance(value[0], int)):
            count = len(value)
            if not 1 <= count <= MAX_PROMPTS:
                raise ValueError(f"it holds {count} prompts; 1 to {MAX_PROMPTS} are served")
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> "CompletionRequest":
        if self.best_of not in (None, 1, self.n):
            raise refused("best_of", "can't be honoured: leave it out or set it to 1 or n")
        if self.suffix and self.echo:
            raise refused("echo", "doesn't go with suffix: the answer stands between the two")
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "0 goes with echo: true")
        return self

    @property
    def asked_tokens(self) -> int:
        """How many tokens at most; OpenAI's default is small."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_prompts(self) -> int:
        """How many prompts are to be answered."""
        return len(self.prompts())

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        return [item for item in prompt if not isinstance(item, int)]


class TokenizeRequest(ModelFields):
    """POST /tokenize: a text, or a chat through its template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list
    )
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None:
            _one_end(self)
        return self


class DetokenizeRequest(ModelFields):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
