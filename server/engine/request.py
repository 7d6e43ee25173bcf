"""What crosses between the API and the engine: requests in, outputs out. Plain data; imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from manylora.server.engine.detokenizer import TokenDecoder
from manylora.server.engine.grammar import CompiledGrammar

BASE_ADAPTER_ID = 0
"""The adapter id that means: the base model alone. Ids of adapters start at 1 and are never used again."""


UNBOUNDED = -1
"""max_tokens of a request that named none: as many as fit."""
Vector: TypeAlias = npt.NDArray[np.float32]


class Pooling(Enum):
    """How the last hidden states of a prompt's tokens become one vector."""

    LAST = "last"
    """The last token's: it has seen all the others."""
    MEAN = "mean"


class FinishReason(Enum):
    """Why a sequence ended. ABORTED and FAILED never reach a client as a finish_reason."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, already validated by the API. Defaults are OpenAI's; 0 or empty switches off."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output (CTRL, 1909.05858)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    stop_names: Mapping[int, str] = field(default_factory=dict)
    """Stop ids that were asked for as text, and the text: a control token has none of its own to be found by."""
    ignore_eos: bool = False
    min_tokens: int = 0
    """Before so many tokens neither eos, stop ids nor stop strings end the sequence."""
    max_tokens: int = 16
    """UNBOUNDED: as many as fit; the engine's door knows how many that are."""
    logprobs: int | None = None
    """Number of alternatives to report beside the chosen token's logprob (0 to 20); None: no logprobs."""
    prompt_logprobs: int | None = None
    """The same for each prompt token after the first (completions' echo with logprobs)."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt with ``n`` choices; each choice becomes a Sequence."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapters: tuple[tuple[int, float], ...] = ()
    """(adapter id, weight) pairs; empty is the base. One pair with weight 1 is the usual case.

    A key as it stands, of the prefix cache too, and the order in which the parts are summed: so whoever makes it puts
    it in one form, by id, without zeros, weights being float32's values. Two forms of one mixture are served as well,
    but share no prefix, and may differ in the last bit."""
    adapter_label: str = ""
    """The client's name for it, for metrics and log lines only."""
    n: int = 1
    arrival_time: float = 0.0
    """time.monotonic() at the door."""
    origin: str = ""
    """The client's request that this prompt came in: those of one origin share a place in the queue, and in a step.
    Empty: this one is the whole of it."""
    decoder: TokenDecoder | None = None
    """What the tokens of this request stand for; None: what those of the base do."""
    eos_ids: frozenset[int] | None = None
    """Ids that end its answers; None: the base's."""
    vocab_size: int | None = None
    """Ids that its adapter's embedding and head have rows for; None: as many as the base's."""
    grammar: CompiledGrammar | None = None
    """What its answers are held to; None: nothing."""
    tenant: str = ""
    """Whose it is: tenants have turns in the queue by their weights. Empty: the operator's own."""
    weight: float = 1.0
    """Turns of its tenant for each of one of weight 1."""
    share: float = 1.0
    """Tokens of its adapters for each that adapters of share 1 are served while both wait."""
    priority: int = 0
    """Those of a lower number begin before it."""
    cache_scope: str = ""
    """Cached prefixes are shared with requests of the same scope alone."""
    pooling: Pooling | None = None
    """The prompt is not continued: it ends, once it is computed, with its states pooled in this way. With n = 1."""
    pooled_from: int = 0
    """Of MEAN: the first token that counts. Those before it may come from the prefix cache."""

    @property
    def asked_tokens(self) -> int:
        """Tokens that a choice may have beyond the prompt."""
        return self.sampling.max_tokens if self.pooling is None else 0

    @property
    def goes_on(self) -> bool:
        """Whether it decodes after its prompt."""
        return self.asked_tokens > 1


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprob (natural log, of the raw model distribution before temperature) of a token and of the best."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), best first."""


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one step added to one choice. Deltas, never totals, but for the counts."""

    request_id: str
    index: int
    """Which of the n choices."""
    text: str
    """New text; whole characters only, nothing that may still turn out to be a stop string."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    """With the first output only, if asked for; None for the first token, which nothing predicts."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop id that was hit, if it was one of those."""
    error: Exception | None = None
    """With FAILED: what to tell the client (a class of manylora.server.errors)."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Totals so far."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    lengths: tuple[int, ...] = ()
    """Of outputs that were joined, where log probabilities are told: characters of ``text`` that each token brought."""
    pooled: Vector | None = None
    """[hidden]: the prompt's states, pooled, of whatever length; with the one output of a request that asks for it."""
    silent_end: bool = False
    """Whether the last of the tokens ended the choice as an id: it is of no text."""

    @property
    def spoken_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """``logprobs`` without that of a silent end: OpenAI's chats and responses leave it out."""
        return self.logprobs[:-1] if self.silent_end else self.logprobs
