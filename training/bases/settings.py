"""What can be asked of LoRA, and which questions don't go together whatever the base."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from manylora.training.errors import InvalidArgument

INITS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq")
_FROM_BASE = re.compile(r"pissa(_niter_[1-9]\d*)?|olora")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """One adapter. Raises InvalidArgument for values that can't be, or not together."""

    r: int = 64
    alpha: float = 16
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """PEFT's: ranks of modules whose path ends with a key, or matches it."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.05
    targets: tuple[str, ...] = ()
    """Names that module paths end with; none: every linear layer of the blocks."""
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    """Scale by α/√r (2312.03732), not α/r."""
    use_dora: bool = False
    """Train the rows' lengths apart from their directions (2402.09353)."""
    init: str = "default"
    """One of INITS."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole and saved with the adapter."""
    new_tokens: tuple[str, ...] = ()
    """Tokens that were added to the tokenizer (chat.prepare_chat), whose embeddings must be trained."""
    invocation: tuple[int, ...] = ()
    """Token ids from whose last place in a prompt on it acts (aLoRA, 2504.12397); (): it always does."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InvalidArgument(f"--lora_r {self.r}: a rank is a whole number from 1 up")
        if self.alpha <= 0:
            raise InvalidArgument(f"--lora_alpha {self.alpha:g}: the scale must be above zero")
        if not 0 <= self.dropout < 1:
            raise InvalidArgument(f"--lora_dropout {self.dropout:g} is not a share from 0 up to below 1")
        if self.bias not in ("none", "all", "lora_only"):
            raise InvalidArgument(f"--lora_bias {self.bias!r} is not one of none, all, lora_only")
        if self.init not in INITS[:-1] and self.init != "loftq" and not self.starts_from_base:
            raise InvalidArgument(f"--init_lora_weights {self.init!r} is not one of {', '.join(INITS)}")
        if self.use_dora and self.init not in ("default", "gaussian"):
            raise InvalidArgument(
                f"--use_dora goes with --init_lora_weights default or gaussian, not with {self.init}"
            )
        if self.init == "orthogonal" and self.r % 2:
            raise InvalidArgument(f"--init_lora_weights orthogonal needs an even rank, not {self.r}")
        if self.invocation:
            self._check_activated()

    def _check_activated(self) -> None:
        """Refuse what would change the base before the invocation, or what peft has no activated form of."""
        others = {
            "--use_dora": self.use_dora,
            f"--lora_bias {self.bias}": self.bias != "none",
            "--modules_to_save": bool(self.modules_to_save),
            "an added token": bool(self.new_tokens),
            f"--init_lora_weights {self.init}": self.starts_from_base or self.init == "loftq",
            "--lora_target_modules embed_tokens": any(
                name.rpartition(".")[2] == "embed_tokens" for name in self.targets
            ),
        }
        named = next((name for name, given in others.items() if given), None)
        if named is not None:
            raise InvalidArgument(
                f"{named} doesn't go with an invocation: what comes before that is the base's as it is"
            )

    @property
    def starts_from_base(self) -> bool:
        """Whether the factors start as part of the base's weight (PiSSA, OLoRA)."""
        return _FROM_BASE.fullmatch(self.init) is not None

    @property
    def used_dropout(self) -> float:
        """The dropout before A: none where the factors hold part of the base, which would change its function."""
        return 0.0 if self.starts_from_base else self.dropout

    @property
    def saved_rank(self) -> int:
        """The rank of the adapter that is saved: twice r where the start is saved with it."""
        largest = max((self.r, *self.rank_pattern.values()))
        return 2 * largest if self.starts_from_base else largest
