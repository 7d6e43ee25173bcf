"""One stream of tokens and the request it belongs to. Holds state; the scheduler says when it changes.

Only this file changes a sequence's status.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum, auto

from manylora.server.engine.activation import AdapterKey, Stages
from manylora.server.engine.detokenizer import Detokenizer
from manylora.server.engine.grammar import Matcher
from manylora.server.engine.logits import SamplerState
from manylora.server.engine.pooling import PooledStates
from manylora.server.engine.prompt_logprobs import PromptLogprobs
from manylora.server.engine.request import FinishReason, GenerationRequest, Pooling
from manylora.server.engine.stop import StopChecker
from manylora.server.kernels.sampling import UNTOLD

Group = tuple[str, int]
"""Among whom adapters have their shares: a tenant's requests of one priority."""
Account = tuple[int, ...]
"""Whose tokens a sequence's are: its adapters', whatever their weights. Empty is the base."""
_NOBODY: frozenset[int] = frozenset()


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    PREEMPTED = auto()
    """Waits as well, but began already: it keeps its claim on its adapters."""
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True)
class TextState:
    """What turns a sequence's logits into text: sampler state, detokenizer, stop conditions, and its grammar if any.

    All of it follows the tokens that there are, so it stays as it is where a sequence is preempted.
    """

    sampler: SamplerState
    detokenizer: Detokenizer
    stop: StopChecker
    grammar: Matcher | None = None


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request in the engine, with the sequences made so far and the times of its life (time.monotonic())."""

    request: GenerationRequest
    choices: int
    """How many sequences it is to have: n, or those made already once nothing more is to come of it."""
    stages: Stages
    """From which token on which of its adapters act: the same in all of them, as they share the prompt."""
    sequences: list["Sequence"] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs = field(default_factory=PromptLogprobs)
    pooled: PooledStates | None = None
    """What its chunks brought so far, if its prompt is pooled."""
    arrived: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    blocked_since: float | None = None
    """Since when it has waited for its adapters."""
    holds_adapters: bool = False
    """Whether they have been given their rows: from then on these are its own until it ends."""
    overtaken: int = 0
    """How often others began while it was the first that waited for rows, with adapters that might have made room."""

    @property
    def origin(self) -> str:
        """Whose turn in the queue it shares."""
        return self.request.origin or self.request.request_id

    @property
    def num_unmade(self) -> int:
        """Choices that are not yet sequences."""
        return self.choices - len(self.sequences)

    @property
    def adapter_ids(self) -> frozenset[int]:
        """Ids of all adapters that it uses."""
        return frozenset(adapter_id for adapter_id, _ in self.request.adapters)

    @property
    def acting_ids(self) -> frozenset[int]:
        """Ids of those that act on some of its tokens: an activated one does if the prompt has its invocation."""
        return frozenset(adapter_id for adapter_id, _ in self.stages.last)

    @property
    def live(self) -> list["Sequence"]:
        """The sequences that have not ended."""
        return [s for s in self.sequences if s.status is not SequenceStatus.FINISHED]


class Sequence:
    """One choice of a request. ``number`` grows with age: a larger one is younger."""

    __slots__ = (
        "account",
        "adapter_ids",
        "adapters",
        "finish_reason",
        "goes_ahead",
        "group",
        "index",
        "last_step",
        "last_token",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "number",
        "owner",
        "pooled_from",
        "pooling",
        "reported",
        "room",
        "stages",
        "status",
        "text",
        "token_ids",
        "told",
        "wants_prompt_logprobs",
    )

    def __init__(self, number: int, index: int, owner: LiveRequest, text: TextState) -> None:
        self.number = number
        self.index = index
        self.owner = owner
        self.text = text
        self.token_ids = list(owner.request.prompt_token_ids)
        self.stages = owner.stages
        self.adapters: AdapterKey = owner.stages.last
        """What acts in the end; ``stages`` say from where on."""
        self.adapter_ids = frozenset(adapter_id for adapter_id, _ in self.adapters)
        self.group: Group = (owner.request.tenant, owner.request.priority)
        self.account: Account = tuple([adapter_id for adapter_id, _ in owner.request.adapters])
        self.goes_ahead = self.stages.base_until > 0
        """Whether it may begin before its adapters are there, with tokens of its prompt that are the base's: once."""
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        """Prompt tokens that came from the prefix cache when it was first admitted."""
        self.reported = False
        self.finish_reason: FinishReason | None = None
        self.status = SequenceStatus.WAITING
        self.room = 0
        """Tokens that its blocks hold."""
        self.last_token: float | None = None
        """When it got its last one (time.monotonic())."""
        self.last_step = 0
        """The step that last computed something of it."""
        asked = owner.request.sampling.logprobs
        self.told = UNTOLD if asked is None else asked
        """Alternatives that are told beside each token's own log probability."""
        self.pooling = owner.request.pooling
        self.pooled_from = owner.request.pooled_from
        self.wants_prompt_logprobs = owner.request.sampling.prompt_logprobs is not None and index == 0
        """Whether this pass must compute every prompt token: the first choice, until it has its first token."""

    @property
    def priority(self) -> int:
        """How urgent it is: less is more."""
        return self.owner.request.priority

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_to_compute(self) -> int:
        """Tokens that are not in the KV cache."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def needed_ids(self) -> frozenset[int]:
        """Ids of the adapters that must be there for its next token: all of them, or none before the first one acts."""
        return _NOBODY if self.num_computed_tokens < self.stages.base_until else self.adapter_ids

    @property
    def borrowable(self) -> Seq[int]:
        """The tokens of which a beginning may come from the prefix cache: those before the first that is told of."""
        if self.wants_prompt_logprobs:
            return ()
        if self.pooling is Pooling.MEAN:
            # One more: a look-up leaves the last to be computed.
            return self.token_ids[: self.pooled_from + 1] if self.pooled_from else ()
        return self.token_ids

    def admit(self, cached_tokens: int) -> None:
        """Start computing, behind ``cached_tokens`` that the prefix cache has."""
        assert self.status in (SequenceStatus.WAITING, SequenceStatus.PREEMPTED)
        if self.status is SequenceStatus.WAITING:
            self.num_cached_tokens = cached_tokens
        self.num_computed_tokens = cached_tokens
        self.status = SequenceStatus.RUNNING

    def preempt(self) -> None:
        """Go back to the queue; everything is computed again."""
        assert self.status is SequenceStatus.RUNNING
        self.num_computed_tokens = self.room = 0
        self.status = SequenceStatus.PREEMPTED

    def finish(self, reason: FinishReason) -> None:
        """End, once."""
        assert self.status is not SequenceStatus.FINISHED
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
